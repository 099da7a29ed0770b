// What every formula header shares: host/device qualifier, storage types and their conversions.
// Arithmetic is float32 everywhere; a storage type is only loaded from and stored to.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ALR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ALR_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace alr {

// Codes handed over by alr_kernels/step/native.py and alr_kernels/importance/native.py.
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
constexpr int kDTypes = 3;

// Distinct types, yet scalars: GCC 12 does not vectorise loops over a struct of one uint16_t.
enum class BFloat16 : uint16_t {};
enum class Float16 : uint16_t {};

ALR_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

ALR_HOST_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

ALR_HOST_DEVICE float load(float x) { return x; }

ALR_HOST_DEVICE float load(BFloat16 x) { return bits_float(uint32_t(x) << 16); }

// Integer code without branches: it vectorises for any instruction set, and flush-to-zero modes
// cannot reach it, because no float32 in it is subnormal.
ALR_HOST_DEVICE float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(uint16_t(x)));
#else
  const uint32_t sign = (uint32_t(x) & 0x8000u) << 16;
  const int32_t magnitude = int32_t(x) & 0x7fff;
  const uint32_t normal = (uint32_t(magnitude) << 13) + (112u << 23);  // exponent bias 15 -> 127
  const uint32_t special = normal + (112u << 23);                      // exponent 31 -> 255
  const uint32_t subnormal = float_bits(float(magnitude) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x400 ? subnormal : normal;
  return bits_float((magnitude < 0x7c00 ? finite : special) | sign);
#endif
}

// store<T>(x) rounds to nearest, ties to even; NaN stays NaN and keeps its sign.
template <typename T>
struct Store;

template <>
struct Store<float> {
  ALR_HOST_DEVICE static float from(float x) { return x; }
};

template <>
struct Store<BFloat16> {
  ALR_HOST_DEVICE static BFloat16 from(float x) {
    const uint32_t bits = float_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    const bool is_nan = int32_t(bits & 0x7fffffffu) > 0x7f800000;
    return BFloat16(uint16_t(is_nan ? quiet_nan : rounded));
  }
};

template <>
struct Store<Float16> {
  ALR_HOST_DEVICE static Float16 from(float x) {
#if defined(__CUDA_ARCH__)
    return Float16(__half_as_ushort(__float2half_rn(x)));
#else
    const uint32_t bits = float_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const int32_t magnitude = int32_t(bits & 0x7fffffffu);
    const uint32_t odd = (uint32_t(magnitude) >> 13) & 1u;
    const uint32_t normal = (uint32_t(magnitude) - (112u << 23) + 0xfffu + odd) >> 13;
    // Below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded, in the low mantissa bits.
    const uint32_t subnormal = float_bits(bits_float(uint32_t(magnitude)) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u;
    return Float16(uint16_t((magnitude < 0x477ff000 ? finite : special) | sign));  // 65520 rounds to inf
#endif
  }
};

template <typename T>
ALR_HOST_DEVICE T store(float x) {
  return Store<T>::from(x);
}

}  // namespace alr
