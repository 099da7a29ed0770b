// Importance from per-sample gradients of a linear layer: importance += scale * sum_n |delta_n^T x_n|^power.
#pragma once

#include <cstdint>

#include "codec_math.h"

namespace alr {

struct FisherTensor {
  float* importance;   // [rows, columns], mutated
  const void* deltas;  // [samples, tokens, rows]
  const void* inputs;  // [samples, tokens, columns]
  int64_t samples;
  int64_t tokens;
  int64_t rows;
  int64_t columns;
  float scale;
  int dtype;  // DType of deltas and inputs
  int power;  // 2: Fisher; 1: MAS
};

// What becomes of one number: kSquare and kMagnitude are the powers.
enum Term : int { kIdentity = 0, kMagnitude = 1, kSquare = 2 };

template <typename F>
ALR_HOST_DEVICE F raised(F x, Term term) {
  return term == kSquare ? x * x : term == kMagnitude ? magnitude(x) : x;
}

// With one token a sample |delta x|^p = |delta|^p |x|^p: the samples become the tokens of one sample, whose operands
// are raised when they are read and whose product is taken as it is.
struct FisherPlan {
  int64_t samples;
  int64_t tokens;
  Term operand;
  Term product;
};

inline FisherPlan fisher_plan(const FisherTensor& t) {
  const Term term = t.power == 2 ? kSquare : kMagnitude;
  if (t.tokens == 1) return {1, t.samples, term, kIdentity};
  return {t.samples, t.tokens, kIdentity, term};
}

// Rows and columns of the importance that one thread works on.
struct FisherTile {
  int64_t row;
  int64_t column;
  int64_t rows;
  int64_t columns;
};

// One copy an instruction set; tiles begin at multiples of fisher_row_step() rows; scratch: [fisher_scratch(...)] floats,
// aligned to 64 bytes.
#define ALR_DECLARE_FISHER(NAMESPACE)                                                       \
  namespace NAMESPACE {                                                                     \
  int64_t fisher_row_step();                                                                \
  int64_t fisher_scratch(int64_t rows, int64_t columns);                                    \
  void fisher_linear_tile(const FisherTensor&, const FisherPlan&, const FisherTile&, float* scratch); \
  }

ALR_DECLARE_FISHER(cpu_default)
#if defined(ALR_CPU_X86)
ALR_DECLARE_FISHER(cpu_avx2)
ALR_DECLARE_FISHER(cpu_avx512)
#endif

// Each element sums samples and tokens in order, whatever num_threads.
void fisher_linear_cpu(const FisherTensor& tensor, int num_threads);

// Returns after launching on `stream` of `device`; throws std::runtime_error with CUDA's text.
void fisher_linear_cuda(const FisherTensor& tensor, int device, void* stream);

}  // namespace alr
