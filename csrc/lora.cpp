// LoRA in effective space over lists of pairs, on the threads and the instruction set that serve.
#include "lora.h"

#include <algorithm>
#include <string>
#include <vector>

#include "jobs.h"

namespace alr {
namespace {

struct Kernels {
  int64_t (*padded_rank)(int64_t rank);
  int64_t (*record_scratch)(const RecordPair&, int64_t columns);
  void (*record_tile)(const RecordPair&, const RecordTile&, bool clamp, float* scratch);
  int64_t (*pull_scratch)(const PullPair&);
  double (*pull_rows)(const PullPair&, int64_t begin, int64_t end, const DownSums&, float* scratch);
};

#define ALR_LORA_KERNELS(NAMESPACE)                                                               \
  {                                                                                               \
    NAMESPACE::lora_padded_rank, NAMESPACE::lora_record_scratch, NAMESPACE::lora_record_tile,     \
        NAMESPACE::lora_pull_scratch, NAMESPACE::lora_pull_rows                                   \
  }

Kernels kernels() {
#if defined(ALR_CPU_X86)
  const std::string name = cpu_capability();
  if (name == "avx512") return ALR_LORA_KERNELS(cpu_avx512);
  if (name == "avx2") return ALR_LORA_KERNELS(cpu_avx2);
#endif
  return ALR_LORA_KERNELS(cpu_default);
}

constexpr int64_t kRecordRows = 4 * kLoraRows;
constexpr int64_t kMostChunks = 8;             // of the rows of a pair, each with sums over its rows
constexpr int64_t kSumFloats = int64_t(4) << 20;  // of such sums at a time, unless one pair has more

struct RecordJob {
  size_t pair;
  RecordTile tile;
};

// Rows of a pair, and where their sums are.
struct PullJob {
  size_t pair;
  int64_t begin;
  int64_t end;
  DownSums down;
  double value;
};

// As many as keep their sums a small part of the importance, a function of the shape alone.
int64_t chunks_of(const PullPair& p) {
  const int64_t tiles = (p.rows + kLoraRows - 1) / kLoraRows, rank = std::max<int64_t>(p.factors.depth, 1);
  const int64_t chunks = std::min(std::max<int64_t>(p.rows / (16 * rank), 2), kMostChunks);
  return p.columns ? std::min(chunks, tiles) : 0;
}

int64_t blocks_of(const PullPair& p) { return (p.columns + kBlock - 1) / kBlock; }

// Floats of one result's sums of one chunk.
int64_t sums_of(const PullPair& p, const Kernels& call) {
  return blocks_of(p) * kBlock * call.padded_rank(p.factors.depth);
}

int64_t all_sums_of(const PullPair& p, const Kernels& call) {
  return chunks_of(p) * ((p.grad_down ? 1 : 0) + (p.curvature_down ? 1 : 0)) * sums_of(p, call);
}

// Adds a block of columns of every chunk's sums to result [rank, columns], in order.
void add_sums(const PullPair& p, int64_t block, const std::vector<PullJob>& jobs, size_t first, size_t last,
              float* DownSums::*sums, int64_t padded_rank, float* result) {
  const int64_t column = block * kBlock, columns = std::min(p.columns - column, kBlock);
  for (int64_t q = 0; q < p.factors.depth; ++q) {
    float* to = result + q * p.columns + column;
    for (size_t i = first; i < last; ++i) {
      const float* from = jobs[i].down.*sums + (block * padded_rank + q) * kBlock;
      for (int64_t j = 0; j < columns; ++j) to[j] += from[j];
    }
  }
}

double work_of(const PullPair& p) {
  const double wanted = double(!!p.grad_up + !!p.grad_down + !!p.curvature_up + !!p.curvature_down);
  return double(p.rows) * double(p.columns) * (double(p.drift.depth) + wanted * double(p.factors.depth) + 4.0);
}

// Pairs [first, last), with all their chunks' sums in memory.
void pull_some(const std::vector<PullPair>& pairs, size_t first, size_t last, const Kernels& call, int num_threads) {
  int64_t floats = 0, sums = 0;
  double work = 0.0;
  for (size_t i = first; i < last; ++i) {
    sums += all_sums_of(pairs[i], call);
    floats = std::max(floats, call.pull_scratch(pairs[i]));
    work += work_of(pairs[i]);
  }
  const Scratch scratch(sums);
  float* memory = static_cast<float*>(scratch.memory);
  const auto take = [&](bool wanted, int64_t size) { return wanted ? (memory += size) - size : nullptr; };
  std::vector<PullJob> jobs;
  std::vector<size_t> first_jobs;
  struct Block { size_t pair; int64_t index; };
  std::vector<Block> blocks;
  for (size_t i = first; i < last; ++i) {
    const PullPair& p = pairs[i];
    const int64_t chunks = chunks_of(p), tiles = (p.rows + kLoraRows - 1) / kLoraRows, size = sums_of(p, call);
    first_jobs.push_back(jobs.size());
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = tiles * c / chunks * kLoraRows;
      const int64_t end = std::min(p.rows, tiles * (c + 1) / chunks * kLoraRows);
      jobs.push_back({i, begin, end, {take(p.grad_down, size), take(p.curvature_down, size)}, 0.0});
    }
    for (int64_t b = 0; chunks && (p.grad_down || p.curvature_down) && b < blocks_of(p); ++b) blocks.push_back({i, b});
  }
  first_jobs.push_back(jobs.size());
  const int threads = threads_for(work, num_threads);
  for_jobs(int64_t(jobs.size()), threads, floats, [&](int64_t i, float* own) {
    PullJob& job = jobs[size_t(i)];
    job.value = call.pull_rows(pairs[job.pair], job.begin, job.end, job.down, own);
  });
  for (const PullJob& job : jobs) *pairs[job.pair].value += 0.5 * job.value;
  for_jobs(int64_t(blocks.size()), threads, 0, [&](int64_t i, float*) {
    const Block& b = blocks[size_t(i)];
    const PullPair& p = pairs[b.pair];
    const size_t begin = first_jobs[b.pair - first], end = first_jobs[b.pair - first + 1];
    const int64_t rank = call.padded_rank(p.factors.depth);
    if (p.grad_down) add_sums(p, b.index, jobs, begin, end, &DownSums::grad, rank, p.grad_down);
    if (p.curvature_down) add_sums(p, b.index, jobs, begin, end, &DownSums::curvature, rank, p.curvature_down);
  });
}

}  // namespace

void lora_record_cpu(const std::vector<RecordPair>& pairs, bool clamp, int num_threads) {
  const Kernels call = kernels();
  std::vector<RecordJob> jobs;
  int64_t floats = 0;
  double work = 0.0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const RecordPair& p = pairs[i];
    const int64_t depth = (p.gradient ? 0 : p.factors.depth) + p.move.depth, step = lora_columns(depth);
    work += double(p.rows) * double(p.columns) * (double(depth) + 4.0);
    floats = std::max(floats, call.record_scratch(p, std::min(step, p.columns)));
    for (int64_t row = 0; row < p.rows; row += kRecordRows) {
      for (int64_t column = 0; column < p.columns; column += step) {
        jobs.push_back({i, {row, column, std::min(kRecordRows, p.rows - row), std::min(step, p.columns - column)}});
      }
    }
  }
  for_jobs(int64_t(jobs.size()), threads_for(work, num_threads), floats, [&](int64_t i, float* scratch) {
    const RecordJob& job = jobs[size_t(i)];
    call.record_tile(pairs[job.pair], job.tile, clamp, scratch);
  });
}

void lora_pull_cpu(const std::vector<PullPair>& pairs, int num_threads) {
  const Kernels call = kernels();
  for (size_t first = 0, last = 0; first < pairs.size(); first = last) {
    int64_t sums = 0;
    while (last < pairs.size() && (last == first || sums + all_sums_of(pairs[last], call) <= kSumFloats)) {
      sums += all_sums_of(pairs[last++], call);
    }
    pull_some(pairs, first, last, call, num_threads);
  }
}

}  // namespace alr
