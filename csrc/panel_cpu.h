// A matrix product by micro-tiles that stay in registers, over packed panels. Included once per instruction set, by
// sources that are compiled with contraction into fused multiply-adds.
#pragma once

#include "simd.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

// A micro-tile of kRows x (kVectors * kLanes) sums stays in registers. With AVX-512 16 of 32: enough to hide the
// latency, and 8 rows divide what layers have.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * kLanes;

inline int64_t padded(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

ALR_HOST_DEVICE V load_vector(const float* from) { return load_float(from); }
ALR_HOST_DEVICE V load_vector(const BFloat16* from) { return load_bfloat16(from); }
ALR_HOST_DEVICE V load_vector(const Float16* from) { return load_float16(from); }

// Copies `size` columns of `depth` rows into panels of kWidth columns, [panel][depth][kWidth], each number as `map`
// gives it; zeros beyond the last.
template <int kWidth, typename T, typename Map>
void pack(const T* from, int64_t stride, int64_t depth, int64_t size, float* to, const Map& map) {
  for (int64_t begin = 0; begin < size; begin += kWidth, to += depth * kWidth) {
    const int64_t left = size - begin;
    for (int64_t t = 0; t < depth; ++t) {
      const T* row = from + t * stride + begin;
      float* out = to + t * kWidth;
      if (kWidth % kLanes == 0 && left >= kWidth) {
        for (int j = 0; j < kWidth; j += kLanes) store_float(out + j, map(load_vector(row + j)));
      } else if (left >= kWidth) {
        for (int j = 0; j < kWidth; ++j) out[j] = map(load(row[j]));
      } else {
        for (int j = 0; j < kWidth; ++j) out[j] = j < left ? map(load(row[j])) : 0.0f;
      }
    }
  }
}

ALR_HOST_DEVICE int64_t at_most(int64_t size, int64_t most) { return size < most ? size : most; }

// Copies rows x depth numbers, row by row, into panels of kRows rows, [panel][depth][kRows]; zeros beyond the last.
inline void pack_rows(const float* from, int64_t depth, int64_t rows, float* to) {
  for (int64_t begin = 0; begin < rows; begin += kRows, to += depth * kRows) {
    for (int i = 0; i < kRows; ++i) {
      const float* row = from + (begin + i) * depth;
      if (begin + i < rows) {
        for (int64_t k = 0; k < depth; ++k) to[k * kRows + i] = row[k];
      } else {
        for (int64_t k = 0; k < depth; ++k) to[k * kRows + i] = 0.0f;
      }
    }
  }
}

template <int kCount = kRows>
struct MicroTile {
  V at[kCount][kVectors];
};

// Adds left [depth][kCount] transposed times right [depth][kStride], of which kColumns are read.
template <int kStride = kColumns, int kCount>
ALR_HOST_DEVICE void multiply(const float* left, const float* right, int64_t depth, MicroTile<kCount>& sums) {
  for (int64_t t = 0; t < depth; ++t) {
    V x[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) x[j] = load_float(right + t * kStride + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const V factor = splat(left[t * kCount + i]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums.at[i][j] += factor * x[j];
    }
  }
}

// Reads and writes a micro-tile in rows of `stride`.
template <int kCount>
ALR_HOST_DEVICE void load_tile(const float* from, int64_t stride, MicroTile<kCount>& tile) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) tile.at[i][j] = load_float(from + i * stride + j * kLanes);
  }
}

template <int kCount>
ALR_HOST_DEVICE void store_tile(float* to, int64_t stride, const MicroTile<kCount>& tile) {
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store_float(to + i * stride + j * kLanes, tile.at[i][j]);
  }
}

}  // namespace
}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
