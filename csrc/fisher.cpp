// fisher_linear_ over the tiles of one importance, on the threads and the instruction set that serve.
#include "fisher.h"

#include <algorithm>
#include <string>
#include <vector>

#include "jobs.h"

namespace alr {
namespace {

struct Kernels {
  int64_t row_step;
  int64_t (*scratch)(int64_t rows, int64_t columns);
  void (*tile)(const FisherTensor&, const FisherPlan&, const FisherTile&, float* scratch);
};

Kernels kernels() {
#if defined(ALR_CPU_X86)
  const std::string name = cpu_capability();
  if (name == "avx512") return {cpu_avx512::fisher_row_step(), cpu_avx512::fisher_scratch, cpu_avx512::fisher_linear_tile};
  if (name == "avx2") return {cpu_avx2::fisher_row_step(), cpu_avx2::fisher_scratch, cpu_avx2::fisher_linear_tile};
#endif
  return {cpu_default::fisher_row_step(), cpu_default::fisher_scratch, cpu_default::fisher_linear_tile};
}

constexpr int64_t kTileRows = 192;     // with kTileColumns: operands and sums of one sample fit a 1 MB cache
constexpr int64_t kTileColumns = 256;  // whole panels of every instruction set
constexpr int64_t kFewTiles = 4;       // a thread: up to here a piece more for one thread is noticed

// Cuts `size` into equal pieces of whole steps, as many for each thread where they are few.
std::vector<int64_t> cuts(int64_t size, int64_t largest, int64_t step, int64_t threads) {
  const int64_t steps = (size + step - 1) / step;
  int64_t count = (size + largest - 1) / largest;
  if (count < kFewTiles * threads) count = (count + threads - 1) / threads * threads;
  count = std::min(steps, count);
  std::vector<int64_t> bounds{0};
  for (int64_t i = 1; i <= count; ++i) bounds.push_back(std::min(size, steps * i / count * step));
  return bounds;
}

}  // namespace

void fisher_linear_cpu(const FisherTensor& tensor, int num_threads) {
  if (!tensor.samples || !tensor.tokens || !tensor.rows || !tensor.columns) return;
  const FisherPlan plan = fisher_plan(tensor);
  const double work = double(plan.samples) * double(plan.tokens) * double(tensor.rows) * double(tensor.columns);
  const int threads = threads_for(work, num_threads);
  const Kernels call = kernels();
  const std::vector<int64_t> columns = cuts(tensor.columns, kTileColumns, kTileColumns, 1);
  const std::vector<int64_t> rows = cuts(tensor.rows, kTileRows, call.row_step, threads);
  std::vector<FisherTile> tiles;
  int64_t floats = 0;
  for (size_t i = 1; i < rows.size(); ++i) {
    for (size_t j = 1; j < columns.size(); ++j) {
      tiles.push_back({rows[i - 1], columns[j - 1], rows[i] - rows[i - 1], columns[j] - columns[j - 1]});
      floats = std::max(floats, call.scratch(tiles.back().rows, tiles.back().columns));
    }
  }
  for_jobs(int64_t(tiles.size()), threads, floats,
           [&](int64_t i, float* scratch) { call.tile(tensor, plan, tiles[size_t(i)], scratch); });
}

}  // namespace alr
