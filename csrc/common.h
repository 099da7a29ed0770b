// What every formula header shares: host/device qualifier, storage types and their conversions.
// Arithmetic is float32 everywhere; a storage type is only loaded from and stored to.
#pragma once

#include <cmath>
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

// What a float, or (in simd.h) a vector of floats, brings along: formulas are templates over F and
// mean the same for both. `condition ? a : b` selects lane by lane.
template <typename F>
struct Number;

template <>
struct Number<float> {
  using Int = int32_t;
  using Bits = uint32_t;
  ALR_HOST_DEVICE static float of(int32_t x) { return float(x); }
  // Towards zero. NaN gives a number whose low byte is 0: 0x80000000 on x86, 0 elsewhere.
  ALR_HOST_DEVICE static int32_t whole(float x) { return int32_t(x); }
  ALR_HOST_DEVICE static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
  ALR_HOST_DEVICE static float positive_part(float x) { return x > 0.0f ? x : 0.0f; }  // 0 of NaN
  ALR_HOST_DEVICE static float negative_part(float x) { return x > 0.0f ? 0.0f : x; }  // NaN of NaN
  ALR_HOST_DEVICE static float square_root(float x) { return sqrtf(x); }
  ALR_HOST_DEVICE static float rough_fourth_root(float x) {
#if defined(__CUDA_ARCH__)
    return rsqrtf(rsqrtf(x));
#else
    return sqrtf(sqrtf(x));
#endif
  }
};

template <typename F>
using Int = typename Number<F>::Int;
template <typename F>
using Bits = typename Number<F>::Bits;

template <typename F>
ALR_HOST_DEVICE Bits<F> float_bits(F x) {
  Bits<F> bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <typename F = float>
ALR_HOST_DEVICE F bits_float(Bits<F> bits) {
  F x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

template <typename F>
ALR_HOST_DEVICE F from_bfloat16(Bits<F> x) {
  return bits_float<F>(x << 16);
}

// Integer code without branches: it vectorises for any instruction set, and flush-to-zero modes
// cannot reach it, because no float32 in it is subnormal.
template <typename F>
ALR_HOST_DEVICE F from_float16(Bits<F> x) {
  const Bits<F> sign = (x & 0x8000u) << 16;
  const Int<F> magnitude = Int<F>(x & 0x7fffu);
  const Bits<F> normal = (Bits<F>(magnitude) << 13) + (112u << 23);  // exponent bias 15 -> 127
  const Bits<F> special = normal + (112u << 23);                     // exponent 31 -> 255
  const Bits<F> subnormal = float_bits(Number<F>::of(magnitude) * 0x1p-24f);
  const Bits<F> finite = magnitude < 0x400 ? subnormal : normal;
  return bits_float<F>((magnitude < 0x7c00 ? finite : special) | sign);
}

// To 16 bits, to nearest, ties to even; NaN stays NaN and keeps its sign.
template <typename F>
ALR_HOST_DEVICE Bits<F> to_bfloat16(F x) {
  const Bits<F> bits = float_bits(x);
  const Bits<F> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits<F> quiet_nan = (bits >> 16) | 0x40u;
  return Int<F>(bits & 0x7fffffffu) > 0x7f800000 ? quiet_nan : rounded;
}

template <typename F>
ALR_HOST_DEVICE Bits<F> to_float16(F x) {
  const Bits<F> bits = float_bits(x);
  const Bits<F> sign = (bits >> 16) & 0x8000u;
  const Int<F> magnitude = Int<F>(bits & 0x7fffffffu);
  const Bits<F> odd = (bits >> 13) & 1u;
  const Bits<F> normal = (Bits<F>(magnitude) - (112u << 23) + 0xfffu + odd) >> 13;
  // Below 2^-14: adding 0.5 leaves the multiple of 2^-24, rounded, in the low mantissa bits.
  const Bits<F> subnormal = float_bits(bits_float<F>(Bits<F>(magnitude)) + 0.5f) - 0x3f000000u;
  const Bits<F> finite = magnitude < 0x38800000 ? subnormal : normal;
  const Bits<F> infinite = Bits<F>{} + 0x7c00u;
  const Bits<F> special = magnitude > 0x7f800000 ? infinite + 0x200u : infinite;
  return (magnitude < 0x477ff000 ? finite : special) | sign;  // 65520 rounds to inf
}

ALR_HOST_DEVICE float load(float x) { return x; }

ALR_HOST_DEVICE float load(BFloat16 x) { return from_bfloat16<float>(uint32_t(x)); }

ALR_HOST_DEVICE float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(uint16_t(x)));
#else
  return from_float16<float>(uint32_t(x));
#endif
}

template <typename T>
struct Store;

template <>
struct Store<float> {
  ALR_HOST_DEVICE static float from(float x) { return x; }
};

template <>
struct Store<BFloat16> {
  ALR_HOST_DEVICE static BFloat16 from(float x) { return BFloat16(uint16_t(to_bfloat16(x))); }
};

template <>
struct Store<Float16> {
  ALR_HOST_DEVICE static Float16 from(float x) {
#if defined(__CUDA_ARCH__)
    return Float16(__half_as_ushort(__float2half_rn(x)));
#else
    return Float16(uint16_t(to_float16(x)));
#endif
  }
};

template <typename T>
ALR_HOST_DEVICE T store(float x) {
  return Store<T>::from(x);
}

}  // namespace alr
