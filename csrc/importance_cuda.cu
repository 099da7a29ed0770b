// accumulate and finalise on NVIDIA GPUs: launches and loops over lists of tensors.
//
// Pointers and sizes of up to kTableTensors tensors travel by value in the kernel's parameters
// (under the 4 KB of old drivers), so nothing is allocated or copied to the device. One block works
// on one chunk. Sums are float64: per thread, then a tree per block, then a tree over the chunks of
// a tensor; their order depends on the sizes alone, so results repeat exactly.
#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "importance_cuda.h"

namespace alr {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 8;              // elements a thread loads at once: 16 bytes of bf16, 2 x 16 of fp32
constexpr int64_t kCudaChunk = 16384;  // elements a block works on: 8 rounds of kThreads * kPack
constexpr int kOperands = 4;
constexpr int kTableTensors = 56;

struct Table {
  void* pointers[kOperands][kTableTensors];
  int64_t numels[kTableTensors];
  int64_t first_chunks[kTableTensors + 1];  // numbered over the whole call
  int rows[kTableTensors];                  // place of the tensor in the caller's list
  int tensors;
};
static_assert(sizeof(Table) < 4000, "must fit the kernel parameters of CUDA 11 and 12.0");

struct BlockChunk {
  int tensor;
  int64_t begin;
  int64_t numel;
};

__device__ BlockChunk find_chunk(const Table& table) {
  const int64_t chunk = table.first_chunks[0] + blockIdx.x;
  int tensor = 0;
  while (chunk >= table.first_chunks[tensor + 1]) ++tensor;
  const int64_t begin = (chunk - table.first_chunks[tensor]) * kCudaChunk;
  const int64_t left = table.numels[tensor] - begin;
  return BlockChunk{tensor, begin, left < kCudaChunk ? left : kCudaChunk};
}

template <typename T>
__device__ T* operand(const Table& table, int index, const BlockChunk& chunk) {
  return static_cast<T*>(table.pointers[index][chunk.tensor]) + chunk.begin;
}

__device__ bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

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
    for (int w = 0; w < kWords; ++w) reinterpret_cast<uint4*>(to)[w] = words[w];
  }
};

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

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
accumulate_kernel(const __grid_constant__ Table table,  // path_integral fp32 mutated; grad G; param P; previous P mutated
                  float grad_sign) {                    // -1 to maximise
  const BlockChunk chunk = find_chunk(table);
  float* path_integral = operand<float>(table, 0, chunk);
  const G* grad = operand<G>(table, 1, chunk);
  const P* param = operand<P>(table, 2, chunk);
  P* previous = operand<P>(table, 3, chunk);

  const bool vector = aligned(path_integral) && aligned(grad) && aligned(param) && aligned(previous);
  const int64_t packed = vector ? chunk.numel / kPack * kPack : 0;
  for (int64_t i = int64_t(threadIdx.x) * kPack; i < packed; i += kThreads * kPack) {
    Pack<float> omega = Pack<float>::read(path_integral + i);
    const Pack<G> g = Pack<G>::read(grad + i);
    const Pack<P> now = Pack<P>::read(param + i);
    const Pack<P> before = Pack<P>::read(previous + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      omega.at[j] = accumulate(omega.at[j], load(g.at[j]) * grad_sign, load(now.at[j]), load(before.at[j]));
    }
    omega.write(path_integral + i);
    now.write(previous + i);
  }
  for (int64_t i = packed + threadIdx.x; i < chunk.numel; i += kThreads) {
    const P now = param[i];
    path_integral[i] = accumulate(path_integral[i], load(grad[i]) * grad_sign, load(now), load(previous[i]));
    previous[i] = now;
  }
}

template <typename P>
__global__ void __launch_bounds__(kThreads)
move_sq_kernel(const __grid_constant__ Table table,  // param P, start P
               double* partials) {                   // [chunks of the call], written
  const BlockChunk chunk = find_chunk(table);
  const P* param = operand<P>(table, 1, chunk);
  const P* start = operand<P>(table, 2, chunk);

  double mine = 0.0;
  const int64_t packed = aligned(param) && aligned(start) ? chunk.numel / kPack * kPack : 0;
  for (int64_t i = int64_t(threadIdx.x) * kPack; i < packed; i += kThreads * kPack) {
    const Pack<P> end = Pack<P>::read(param + i);
    const Pack<P> begin = Pack<P>::read(start + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) mine += double(move_sq(load(end.at[j]), load(begin.at[j])));
  }
  for (int64_t i = packed + threadIdx.x; i < chunk.numel; i += kThreads) {
    mine += double(move_sq(load(param[i]), load(start[i])));
  }
  const double sum = block_sum(mine);
  if (threadIdx.x == 0) partials[table.first_chunks[0] + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
floor_kernel(const __grid_constant__ Table table,
             const double* partials,  // [chunks of the call], from move_sq_kernel
             double* floors,          // [tensors of the call], written
             double xi) {
  const double sum = tensor_sum(table, partials);
  if (threadIdx.x == 0) floors[table.rows[blockIdx.x]] = relative_floor(xi, sum, table.numels[blockIdx.x]);
}

template <typename P>
__global__ void __launch_bounds__(kThreads)
finalise_kernel(const __grid_constant__ Table table,  // path_integral fp32, param P, start P, importance fp32 written
                Sums* partials,                       // [chunks of the call], written
                const double* floors,                 // [tensors of the call], or null for xi
                float xi) {
  const BlockChunk chunk = find_chunk(table);
  const float* path_integral = operand<const float>(table, 0, chunk);
  const P* param = operand<P>(table, 1, chunk);
  const P* start = operand<P>(table, 2, chunk);
  float* importance = operand<float>(table, 3, chunk);
  const float floor = floors == nullptr ? xi : float(floors[table.rows[chunk.tensor]]);

  Sums mine{};
  const bool vector = aligned(path_integral) && aligned(param) && aligned(start) && aligned(importance);
  const int64_t packed = vector ? chunk.numel / kPack * kPack : 0;
  for (int64_t i = int64_t(threadIdx.x) * kPack; i < packed; i += kThreads * kPack) {
    const Pack<float> omega = Pack<float>::read(path_integral + i);
    const Pack<P> end = Pack<P>::read(param + i);
    const Pack<P> begin = Pack<P>::read(start + i);
    Pack<float> out;
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      bool finite;
      out.at[j] = finalise(omega.at[j], move_sq(load(end.at[j]), load(begin.at[j])), floor, finite);
      add_element(mine, omega.at[j], out.at[j], finite);
    }
    out.write(importance + i);
  }
  for (int64_t i = packed + threadIdx.x; i < chunk.numel; i += kThreads) {
    bool finite;
    const float omega = path_integral[i];
    const float out = finalise(omega, move_sq(load(param[i]), load(start[i])), floor, finite);
    importance[i] = out;
    add_element(mine, omega, out, finite);
  }
  const Sums sums = block_sum(mine);
  if (threadIdx.x == 0) partials[table.first_chunks[0] + blockIdx.x] = sums;
}

__global__ void __launch_bounds__(kThreads)
statistics_kernel(const __grid_constant__ Table table,
                  const Sums* partials,  // [chunks of the call], from finalise_kernel
                  double* statistics) {  // [tensors of the call, 7], written
  const Sums sums = tensor_sum(table, partials);
  if (threadIdx.x == 0) {
    write_statistics(statistics + int64_t(table.rows[blockIdx.x]) * kStatistics, sums, table.numels[blockIdx.x]);
  }
}

int64_t chunks_of(int64_t numel) { return (numel + kCudaChunk - 1) / kCudaChunk; }

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorString(error) + "; run `alr-kernels doctor`");
}

// Makes `device` current and restores the previous one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice", device);
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

void set_operands(Table& table, int at, const AccumulateTensor& t) {
  table.pointers[0][at] = t.path_integral;
  table.pointers[1][at] = const_cast<void*>(t.grad);
  table.pointers[2][at] = const_cast<void*>(t.param);
  table.pointers[3][at] = t.previous;
}

void set_operands(Table& table, int at, const FinaliseTensor& t) {
  table.pointers[0][at] = const_cast<float*>(t.path_integral);
  table.pointers[1][at] = const_cast<void*>(t.param);
  table.pointers[2][at] = const_cast<void*>(t.start);
  table.pointers[3][at] = t.importance;
}

int dtype_key(const AccumulateTensor& t) { return t.param_dtype * kDTypes + t.grad_dtype; }
int dtype_key(const FinaliseTensor& t) { return t.param_dtype * kDTypes; }

struct Launch {
  Table table;
  int param_dtype;
  int grad_dtype;
  unsigned blocks;  // chunks in the table
};

// Sorts the list by dtype and cuts it into tables, each of one combination of dtypes.
template <typename Tensor>
std::vector<Launch> plan(const std::vector<Tensor>& tensors) {
  std::vector<int> order(tensors.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return dtype_key(tensors[size_t(a)]) < dtype_key(tensors[size_t(b)]); });
  std::vector<Launch> launches;
  int64_t chunk = 0;
  int last_key = -1;
  for (int row : order) {
    const Tensor& t = tensors[size_t(row)];
    const int key = dtype_key(t);
    if (key != last_key || launches.back().table.tensors == kTableTensors) {
      launches.emplace_back();
      launches.back().param_dtype = key / kDTypes;
      launches.back().grad_dtype = key % kDTypes;
      launches.back().table.first_chunks[0] = chunk;
      last_key = key;
    }
    Launch& launch = launches.back();
    const int at = launch.table.tensors++;
    set_operands(launch.table, at, t);
    launch.table.numels[at] = t.numel;
    launch.table.rows[at] = row;
    chunk += chunks_of(t.numel);
    launch.table.first_chunks[at + 1] = chunk;
    launch.blocks = unsigned(chunk - launch.table.first_chunks[0]);
  }
  return launches;
}

template <typename P>
void launch_accumulate(const Launch& launch, float grad_sign, cudaStream_t stream) {
  switch (launch.grad_dtype) {
    case kFloat32: accumulate_kernel<P, float><<<launch.blocks, kThreads, 0, stream>>>(launch.table, grad_sign); break;
    case kBFloat16: accumulate_kernel<P, BFloat16><<<launch.blocks, kThreads, 0, stream>>>(launch.table, grad_sign); break;
    default: accumulate_kernel<P, Float16><<<launch.blocks, kThreads, 0, stream>>>(launch.table, grad_sign); break;
  }
}

struct FinaliseBuffers {
  double* scratch;     // partial sums, [chunks] double or Sums
  double* floors;      // [tensors], or null
  double* statistics;  // [tensors, 7]
};

template <typename P>
void launch_finalise(const Launch& launch, double xi, const FinaliseBuffers& buffers, cudaStream_t stream) {
  const unsigned tensors = unsigned(launch.table.tensors);
  Sums* partials = reinterpret_cast<Sums*>(buffers.scratch);
  if (buffers.floors != nullptr) {
    if (launch.blocks > 0) move_sq_kernel<P><<<launch.blocks, kThreads, 0, stream>>>(launch.table, buffers.scratch);
    floor_kernel<<<tensors, kThreads, 0, stream>>>(launch.table, buffers.scratch, buffers.floors, xi);
  }
  if (launch.blocks > 0) {
    finalise_kernel<P><<<launch.blocks, kThreads, 0, stream>>>(launch.table, partials, buffers.floors, float(xi));
  }
  statistics_kernel<<<tensors, kThreads, 0, stream>>>(launch.table, partials, buffers.statistics);
}

}  // namespace

void accumulate_cuda(const std::vector<AccumulateTensor>& tensors, float grad_sign, int device, void* stream) {
  const DeviceGuard guard(device);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  for (const Launch& launch : plan(tensors)) {
    if (launch.blocks == 0) continue;
    switch (launch.param_dtype) {
      case kFloat32: launch_accumulate<float>(launch, grad_sign, on); break;
      case kBFloat16: launch_accumulate<BFloat16>(launch, grad_sign, on); break;
      default: launch_accumulate<Float16>(launch, grad_sign, on); break;
    }
    check(cudaGetLastError(), "accumulate_cuda", device);
  }
}

int64_t finalise_cuda_scratch(const std::vector<int64_t>& numels) {
  int64_t chunks = 0;
  for (int64_t numel : numels) chunks += chunks_of(numel);
  return chunks * kSums + int64_t(numels.size());
}

void finalise_cuda(const std::vector<FinaliseTensor>& tensors, double xi, bool relative, double* scratch,
                   double* statistics, int device, void* stream) {
  const DeviceGuard guard(device);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  int64_t chunks = 0;
  for (const FinaliseTensor& t : tensors) chunks += chunks_of(t.numel);
  const FinaliseBuffers buffers{scratch, relative ? scratch + chunks * kSums : nullptr, statistics};
  for (const Launch& launch : plan(tensors)) {
    switch (launch.param_dtype) {
      case kFloat32: launch_finalise<float>(launch, xi, buffers, on); break;
      case kBFloat16: launch_finalise<BFloat16>(launch, xi, buffers, on); break;
      default: launch_finalise<Float16>(launch, xi, buffers, on); break;
    }
    check(cudaGetLastError(), "finalise_cuda", device);
  }
}

}  // namespace alr
