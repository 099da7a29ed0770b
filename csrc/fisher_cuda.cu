// fisher_linear_ on NVIDIA GPUs: a matrix product per sample, squared and added in registers before the next.
//
// A block owns a square tile of the importance, a thread 8 x 8 of its elements, and walks over all samples: the tile is
// read and written once, and each element sums samples and tokens in order whatever the tile. Tokens come in stages
// through two buffers of shared memory: while one is multiplied, the next is on its way to registers.
#include "cuda_host.h"
#include "fisher.h"

namespace alr {
namespace {

constexpr int kDepth = 16;     // tokens of a stage
constexpr int kQuad = 4;       // floats of one 16-byte access
constexpr int kPerThread = 8;  // rows, and columns, of a thread: two quads, half a tile apart
constexpr int64_t kManyTiles = 128;  // from here on large tiles still give every multiprocessor work

template <int kTile>
constexpr int kThreads = (kTile / kPerThread) * (kTile / kPerThread);

// One operand's part of a stage as this thread carries it: packs of 16 bytes.
template <typename T, int kTile>
struct Carried {
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kPacksPerRow = kTile / kPack;
  static constexpr int kPacks = kDepth * kPacksPerRow / kThreads<kTile>;
  uint4 words[kPacks];

  // from: the stage's first token at the tile's first column; `left` tokens and `width` columns exist.
  __device__ __forceinline__ void read(const T* from, int64_t stride, int64_t left, int64_t width, bool vector) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int index = p * kThreads<kTile> + threadIdx.x;
      const int token = index / kPacksPerRow, column = index % kPacksPerRow * kPack;
      words[p] = make_uint4(0, 0, 0, 0);
      if (token >= left || column >= width) continue;
      const T* at = from + token * stride + column;
      if (vector && column + kPack <= width) {
        words[p] = *reinterpret_cast<const uint4*>(at);
      } else {
        T values[kPack] = {};
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (column + j < width) values[j] = at[j];
        }
        memcpy(&words[p], values, sizeof(values));
      }
    }
  }

  __device__ __forceinline__ void write(float (*to)[kTile], Term term) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int index = p * kThreads<kTile> + threadIdx.x;
      const int token = index / kPacksPerRow, column = index % kPacksPerRow * kPack;
      T values[kPack];
      memcpy(values, &words[p], sizeof(values));
#pragma unroll
      for (int j = 0; j < kPack; j += kQuad) {
        float4 quad = make_float4(raised(load(values[j]), term), raised(load(values[j + 1]), term),
                                  raised(load(values[j + 2]), term), raised(load(values[j + 3]), term));
        *reinterpret_cast<float4*>(&to[token][column + j]) = quad;
      }
    }
  }
};

// The 8 numbers of a thread in one token: two quads, half a tile apart, so that a warp reads without bank conflicts.
template <int kTile>
__device__ __forceinline__ void read_fragment(const float* row, int lane, float (&to)[kPerThread]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 quad = *reinterpret_cast<const float4*>(row + half * (kTile / 2) + lane * kQuad);
    to[half * kQuad] = quad.x;
    to[half * kQuad + 1] = quad.y;
    to[half * kQuad + 2] = quad.z;
    to[half * kQuad + 3] = quad.w;
  }
}

template <typename T, int kTile>
__global__ void __launch_bounds__(kThreads<kTile>)
fisher_kernel(const __grid_constant__ FisherTensor t,  // importance fp32 mutated; deltas T; inputs T
              const __grid_constant__ FisherPlan plan,
              int64_t column_tiles,
              bool vector) {  // every row of every operand is aligned to 16 bytes
  __shared__ __align__(16) float deltas[2][kDepth][kTile];
  __shared__ __align__(16) float inputs[2][kDepth][kTile];
  const int64_t row = blockIdx.x / column_tiles * kTile, column = blockIdx.x % column_tiles * kTile;
  const int64_t rows = t.rows - row, columns = t.columns - column;
  const int lane_row = threadIdx.x / (kTile / kPerThread), lane_column = threadIdx.x % (kTile / kPerThread);
  const T* delta = static_cast<const T*>(t.deltas) + row;
  const T* input = static_cast<const T*>(t.inputs) + column;

  float sums[kPerThread][kPerThread] = {}, grads[kPerThread][kPerThread] = {};
  Carried<T, kTile> next_deltas, next_inputs;
  const int64_t tokens = plan.samples * plan.tokens;  // of all samples, which lie one after the other
  int64_t end = plan.tokens;                          // of the sample that is read
  int64_t token = 0;                                  // the first of the stage that is read
  const auto read = [&]() {
    next_deltas.read(delta + token * t.rows, t.rows, end - token, rows, vector);
    next_inputs.read(input + token * t.columns, t.columns, end - token, columns, vector);
  };
  const auto write = [&](int buffer) {
    next_deltas.write(deltas[buffer], plan.operand);
    next_inputs.write(inputs[buffer], plan.operand);
  };
  read();
  write(0);
  __syncthreads();
  for (int buffer = 0;; buffer ^= 1) {
    token += kDepth;
    const bool last = token >= end;  // stage of its sample
    if (last) {
      token = end;
      end += plan.tokens;
    }
    const bool more = token < tokens;
    if (more) read();
#pragma unroll 4
    for (int d = 0; d < kDepth; ++d) {
      float a[kPerThread], b[kPerThread];
      read_fragment<kTile>(deltas[buffer][d], lane_row, a);
      read_fragment<kTile>(inputs[buffer][d], lane_column, b);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) grads[i][j] += a[i] * b[j];
      }
    }
    if (last) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          sums[i][j] += raised(grads[i][j], plan.product);
          grads[i][j] = 0.0f;
        }
      }
    }
    if (!more) break;
    write(buffer ^ 1);
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t r = (i / kQuad) * (kTile / 2) + lane_row * kQuad + i % kQuad;
    if (r >= rows) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t c = half * (kTile / 2) + lane_column * kQuad;
      float* at = t.importance + (row + r) * t.columns + column + c;
      if (vector && c + kQuad <= columns) {
        float4 quad = *reinterpret_cast<float4*>(at);
        quad.x += t.scale * sums[i][half * kQuad];
        quad.y += t.scale * sums[i][half * kQuad + 1];
        quad.z += t.scale * sums[i][half * kQuad + 2];
        quad.w += t.scale * sums[i][half * kQuad + 3];
        *reinterpret_cast<float4*>(at) = quad;
      } else {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          if (c + j < columns) at[j] += t.scale * sums[i][half * kQuad + j];
        }
      }
    }
  }
}

int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

bool aligned(const FisherTensor& t, int64_t width) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(t.importance) | reinterpret_cast<uintptr_t>(t.deltas) |
                              reinterpret_cast<uintptr_t>(t.inputs);
  return addresses % 16 == 0 && t.rows * width % 16 == 0 && t.columns * width % 16 == 0;
}

template <typename T, int kTile>
void launch(const FisherTensor& t, cudaStream_t stream) {
  const int64_t column_tiles = tiles_of(t.columns, kTile);
  const unsigned blocks = unsigned(tiles_of(t.rows, kTile) * column_tiles);
  fisher_kernel<T, kTile>
      <<<blocks, kThreads<kTile>, 0, stream>>>(t, fisher_plan(t), column_tiles, aligned(t, sizeof(T)));
}

template <typename T>
void launch_tile(const FisherTensor& t, cudaStream_t stream) {
  const bool large = tiles_of(t.rows, 128) * tiles_of(t.columns, 128) >= kManyTiles;
  return large ? launch<T, 128>(t, stream) : launch<T, 64>(t, stream);
}

}  // namespace

void fisher_linear_cuda(const FisherTensor& t, int device, void* stream) {
  if (!t.samples || !t.tokens || !t.rows || !t.columns) return;
  const CurrentDevice current(device);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (t.dtype) {
    case kFloat32: launch_tile<float>(t, on); break;
    case kBFloat16: launch_tile<BFloat16>(t, on); break;
    default: launch_tile<Float16>(t, on); break;
  }
  check_cuda(cudaGetLastError(), "fisher_linear_cuda", device);
}

}  // namespace alr
