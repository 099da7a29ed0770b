// Sums and counts over a CUDA block, and sums over the chunks of a tensor, in an order that the sizes alone decide.
#pragma once

#include "table_cuda.cuh"

namespace alr {
namespace {

constexpr int kWarps = kThreads / 32;

__device__ void add_sums(double& sum, double other) { sum += other; }

// Returns the block's sum to every thread.
template <typename S>
__device__ S block_sum(const S& mine) {
  __shared__ S shared[kThreads];
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) add_sums(shared[threadIdx.x], shared[threadIdx.x + width]);
    __syncthreads();
  }
  return shared[0];
}

// Returns the sum over the chunks of the tensor this block stands for.
template <typename S>
__device__ S tensor_sum(const Table& table, const S* partials) {
  S mine{};
  for (int64_t i = table.first_chunks[blockIdx.x] + threadIdx.x; i < table.first_chunks[blockIdx.x + 1]; i += kThreads) {
    add_sums(mine, partials[i]);
  }
  return block_sum(mine);
}

// What the threads of a CUDA block gather beside their sums.
struct Counts {
  unsigned at[kWarps][kBins];

  __device__ __forceinline__ void clear() {
    for (int i = threadIdx.x; i < kWarps * kBins; i += kThreads) at[i / kBins][i % kBins] = 0;
    __syncthreads();
  }

  // `lowest`: this thread's share of bin 0, where half of the elements are, kept out of the atomics.
  __device__ __forceinline__ void write(unsigned lowest, unsigned long long* to) {
    if (lowest > 0) atomicAdd(&at[threadIdx.x / 32][0], lowest);
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      unsigned count = 0;
      for (int warp = 0; warp < kWarps; ++warp) count += at[warp][bin];
      if (count > 0) atomicAdd(to + bin, static_cast<unsigned long long>(count));  // integers: any order will do
    }
  }
};

}  // namespace
}  // namespace alr
