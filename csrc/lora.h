// LoRA in effective space, U = s B A: recording and the penalty's pull, with every dense matrix but omega and Omega
// known as a product of low-rank factors. The formulas: alr_kernels/lora/reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu.h"

namespace alr {

// A dense [rows, columns] as left [rows, depth] times right [depth, columns].
struct LowRank {
  const float* left;
  const float* right;
  int64_t depth;
};

struct RecordPair {
  float* path_integral;   // [rows, columns], mutated
  const float* gradient;  // [rows, columns], or null: `factors` are
  LowRank factors;        // of the gradient
  LowRank move;
  int64_t rows;
  int64_t columns;
};

struct PullPair {
  Kept importance;  // [rows, columns], which is whole blocks where they are codes
  float scale;
  LowRank drift;
  LowRank factors;  // up [rows, rank] and down [rank, columns]
  int64_t rows;
  int64_t columns;
  double* value;          // [1], added to
  float* grad_up;         // [rows, rank], added to, or null; so are the others
  float* grad_down;       // [rank, columns]
  float* curvature_up;    // [rows, rank]
  float* curvature_down;  // [rank, columns]
};

// Rows and columns of a path integral that one thread works on.
struct RecordTile {
  int64_t row;
  int64_t column;
  int64_t rows;
  int64_t columns;
};

// What some rows of a pair contribute to the sums over all rows: [blocks of kBlock columns][padded rank][kBlock], or
// null; overwritten.
struct DownSums {
  float* grad;
  float* curvature;
};

// One copy an instruction set; scratch: [..._scratch(...)] floats, aligned to 64 bytes. lora_pull_rows returns the sum
// of k gap^2 over its rows.
#define ALR_DECLARE_LORA(NAMESPACE)                                                                       \
  namespace NAMESPACE {                                                                                   \
  int64_t lora_padded_rank(int64_t rank);                                                                 \
  int64_t lora_record_scratch(const RecordPair&, int64_t columns);                                        \
  void lora_record_tile(const RecordPair&, const RecordTile&, bool clamp, float* scratch);                \
  int64_t lora_pull_scratch(const PullPair&);                                                             \
  double lora_pull_rows(const PullPair&, int64_t begin, int64_t end, const DownSums&, float* scratch);    \
  }

ALR_DECLARE_LORA(cpu_default)
#if defined(ALR_CPU_X86)
ALR_DECLARE_LORA(cpu_avx2)
ALR_DECLARE_LORA(cpu_avx512)
#endif

// Rows of a pull's tile: whole micro-tiles of every instruction set, and two blocks a row fit a cache of 32 KB. With 48
// a pull took 4 % longer at rank 8, as long at rank 64 (4096 x 4096 of int8; EPYC, 2026-11).
constexpr int64_t kLoraRows = 24;

// Columns whose packed factors are kept at a time, whole blocks; `depth`: numbers of all factors a column. With half
// the least, left factors are packed twice as often: a pull took 12 % longer at rank 256, a recording 3 %
// (EPYC, 2026-11).
inline int64_t lora_columns(int64_t depth) {
  constexpr int64_t kFloats = 32768, kLeast = 2 * kBlock, kMost = 8 * kBlock;
  const int64_t columns = kFloats / (depth > 0 ? depth : 1) / kBlock * kBlock;
  return columns < kLeast ? kLeast : columns > kMost ? kMost : columns;
}

// One parallel region over the tiles of all pairs; results do not depend on num_threads.
void lora_record_cpu(const std::vector<RecordPair>& pairs, bool clamp, int num_threads);
void lora_pull_cpu(const std::vector<PullPair>& pairs, int num_threads);

}  // namespace alr
