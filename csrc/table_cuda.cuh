// Lists of tensors on NVIDIA GPUs: tables of them, 16-byte loads, launches.
//
// Pointers and sizes of up to kTableTensors tensors travel by value in the kernel's parameters
// (under the 4 KB of old drivers), so nothing is allocated or copied to the device. One block works
// on one chunk.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>

#include "chunk_index.h"
#include "cuda_host.h"
#include "importance_cuda.h"

namespace alr {
namespace {

constexpr int kOperands = 6;
constexpr int kTableTensors = 56;

struct Table {
  void* pointers[kOperands][kTableTensors];
  int64_t numels[kTableTensors];
  int64_t first_chunks[kTableTensors + 1];  // numbered over the whole call
  int rows[kTableTensors];                  // place of the tensor in the caller's list
  int8_t formats[2][kTableTensors];         // of the two sides of merge
  int tensors;
};
static_assert(sizeof(Table) < 4000, "must fit the kernel parameters of CUDA 11 and 12.0");

struct BlockChunk {
  int tensor;
  int64_t begin;
  int64_t numel;
};

__device__ __forceinline__ BlockChunk find_chunk(const Table& table) {
  const ChunkPlace place = chunk_place(table.first_chunks, table.numels, table.first_chunks[0] + blockIdx.x);
  return BlockChunk{place.tensor, place.begin, place.numel};
}

template <typename T>
__device__ __forceinline__ T* operand(const Table& table, int index, const BlockChunk& chunk) {
  return static_cast<T*>(table.pointers[index][chunk.tensor]) + chunk.begin;
}

__device__ __forceinline__ bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
struct Pack {
  static constexpr int kWords = sizeof(T) * kPack / 16;
  T at[kPack];

  __device__ __forceinline__ static Pack read(const T* from) {
    uint4 words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = reinterpret_cast<const uint4*>(from)[w];
    Pack pack;
    memcpy(pack.at, words, sizeof(words));
    return pack;
  }

  __device__ __forceinline__ void write(T* to) const {
    uint4 words[kWords];
    memcpy(words, at, sizeof(words));
#pragma unroll
    for (int w = 0; w < kWords; ++w) __stcs(reinterpret_cast<uint4*>(to) + w, words[w]);  // a plain one may become four
  }
};

struct Launch {
  Table table;
  int key;          // the combination of dtypes and formats
  unsigned blocks;  // chunks in the table
};

constexpr int kKeys = 8;  // more than there are formats

// What plan() asks of a kind of tensor.
template <typename Tensor>
int launch_key(const Tensor& t);
template <typename Tensor>
void set_operands(Table& table, int at, const Tensor& t);

// Sorts the list by key and cuts it into tables, each of one key.
template <typename Tensor>
std::vector<Launch> plan(const std::vector<Tensor>& tensors) {
  std::vector<int> order(tensors.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return launch_key(tensors[size_t(a)]) < launch_key(tensors[size_t(b)]); });
  std::vector<Launch> launches;
  int64_t chunk = 0;
  for (int row : order) {
    const Tensor& t = tensors[size_t(row)];
    const int key = launch_key(t);
    if (launches.empty() || key != launches.back().key || launches.back().table.tensors == kTableTensors) {
      launches.emplace_back();
      launches.back().key = key;
      launches.back().table.first_chunks[0] = chunk;
    }
    Launch& launch = launches.back();
    const int at = launch.table.tensors++;
    set_operands(launch.table, at, t);
    launch.table.numels[at] = t.numel;
    launch.table.rows[at] = row;
    chunk += cuda_chunks_of(t.numel);
    launch.table.first_chunks[at + 1] = chunk;
    launch.blocks = unsigned(chunk - launch.table.first_chunks[0]);
  }
  return launches;
}

}  // namespace
}  // namespace alr
