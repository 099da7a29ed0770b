// Vectors of floats for the loops of one instruction set, by the compiler's vector extension: the
// operators of C++ work on them as on numbers. Only what it lacks, or does badly, is spelled out here.
// Included with ALR_CPU_NAMESPACE naming the copy; vectors of different length are different types.
#pragma once

#include "codec_math.h"

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own header (PR 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

namespace alr {
namespace ALR_CPU_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using V = float __attribute__((vector_size(4 * kLanes)));
using I = int32_t __attribute__((vector_size(4 * kLanes)));
using U = uint32_t __attribute__((vector_size(4 * kLanes)));

}  // namespace ALR_CPU_NAMESPACE

template <>
struct Number<ALR_CPU_NAMESPACE::V> {
  using V = ALR_CPU_NAMESPACE::V;
  using Int = ALR_CPU_NAMESPACE::I;
  using Bits = ALR_CPU_NAMESPACE::U;

  ALR_HOST_DEVICE static V of(Int x) { return __builtin_convertvector(x, V); }

  // Towards zero; NaN gives a number whose low byte is 0.
  ALR_HOST_DEVICE static Int whole(V x) { return __builtin_convertvector(x, Int); }

  ALR_HOST_DEVICE static V square_root(V x) {
#if defined(__AVX512F__)
    return V(_mm512_sqrt_ps(__m512(x)));
#elif defined(__AVX2__)
    return V(_mm256_sqrt_ps(__m256(x)));
#else
    for (int i = 0; i < ALR_CPU_NAMESPACE::kLanes; ++i) x[i] = sqrtf(x[i]);
    return x;
#endif
  }

  ALR_HOST_DEVICE static Int smaller(Int a, int32_t b) {
#if defined(__AVX512F__)
    return Int(_mm512_min_epi32(__m512i(a), _mm512_set1_epi32(b)));
#elif defined(__AVX2__)
    return Int(_mm256_min_epi32(__m256i(a), _mm256_set1_epi32(b)));
#else
    return a < b ? a : Int{} + b;
#endif
  }

  // One instruction each, which the compiler does not find; their second operand is what NaN gives.
  ALR_HOST_DEVICE static V positive_part(V x) {
#if defined(__AVX512F__)
    return V(_mm512_max_ps(__m512(x), _mm512_setzero_ps()));
#elif defined(__AVX2__)
    return V(_mm256_max_ps(__m256(x), _mm256_setzero_ps()));
#else
    return x > 0.0f ? x : V{};
#endif
  }
  ALR_HOST_DEVICE static V negative_part(V x) {
#if defined(__AVX512F__)
    return V(_mm512_min_ps(_mm512_setzero_ps(), __m512(x)));
#elif defined(__AVX2__)
    return V(_mm256_min_ps(_mm256_setzero_ps(), __m256(x)));
#else
    return x > 0.0f ? V{} : x;
#endif
  }

  // x^(1/4) to 6e-4, of 0 it is 0: for whoever corrects it, as what the instruction gives is the maker's choice.
  ALR_HOST_DEVICE static V rough_fourth_root(V x) {
#if defined(__AVX512F__)
    return V(_mm512_rsqrt14_ps(_mm512_rsqrt14_ps(__m512(x))));
#elif defined(__AVX2__)
    return V(_mm256_rsqrt_ps(_mm256_rsqrt_ps(__m256(x))));
#else
    return approximate_sqrt(approximate_sqrt(x));
#endif
  }

  // To 6e-5 with AVX-512, exact elsewhere, where the exact one is not slower; of 0 it is 0.
  ALR_HOST_DEVICE static V rough_square_root(V x) {
#if defined(__AVX512F__)
    const __mmask16 nonzero = _mm512_cmp_ps_mask(__m512(x), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return x * V(_mm512_maskz_rsqrt14_ps(nonzero, __m512(x)));
#else
    return square_root(x);
#endif
  }
};

namespace ALR_CPU_NAMESPACE {

ALR_HOST_DEVICE V splat(float x) {
#if defined(__AVX512F__)
  return V(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return V(_mm256_set1_ps(x));
#else
  return V{x, x, x, x};
#endif
}

// 0, 1, 2, ...
ALR_HOST_DEVICE I lanes() {
  I result{};
  for (int i = 0; i < kLanes; ++i) result[i] = i;
  return result;
}

// The larger; `b` where either is NaN.
ALR_HOST_DEVICE V larger(V a, V b) {
#if defined(__AVX512F__)
  return V(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return V(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

// The larger magnitude; `b`'s where `a` is NaN.
ALR_HOST_DEVICE V larger_magnitude(V a, V b) {
#if defined(__AVX512F__)
  return V(_mm512_range_ps(__m512(a), __m512(b), 0x0b));  // of magnitudes the larger, sign cleared
#else
  return larger(magnitude(a), b);
#endif
}

// The largest of numbers without NaN.
ALR_HOST_DEVICE float largest(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(__m512(x));
#else
  float result = x[0];
  for (int i = 1; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
  return result;
#endif
}

// Whether no lane is NaN or infinite.
ALR_HOST_DEVICE bool all_finite(V x) {
#if defined(__AVX512F__)
  return _mm512_fpclass_ps_mask(__m512(x), 0x99) == 0;  // quiet and signalling NaN, both infinities
#else
  const I bad = !(magnitude(x) <= 3.40282347e+38f);
#if defined(__AVX2__)
  return _mm256_movemask_ps(__m256(bad)) == 0;
#else
  return (bad[0] | bad[1] | bad[2] | bad[3]) == 0;
#endif
#endif
}

ALR_HOST_DEVICE V load_float(const void* from) {
  V x;
  memcpy(&x, from, sizeof(x));
  return x;
}

ALR_HOST_DEVICE void store_float(void* to, V x) { memcpy(to, &x, sizeof(x)); }

#if defined(__AVX512F__)

ALR_HOST_DEVICE U load_u16(const void* from) {
  return U(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
}
ALR_HOST_DEVICE I load_i16(const void* from) {
  return I(_mm512_cvtepi16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
}
ALR_HOST_DEVICE U load_u8(const void* from) {
  return U(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
ALR_HOST_DEVICE I load_i8(const void* from) {
  return I(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
ALR_HOST_DEVICE void store_16(void* to, U x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(x)));
}
ALR_HOST_DEVICE void store_8(void* to, I x) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(__m512i(x)));
}
// Four vectors of codes of 8 bits, or of 4 bits two to a byte, low half first; no other bits may be set.
ALR_HOST_DEVICE __m512i bytes_in_order(const I* x) {  // packing works within quarters of a register
  const __m512i low = _mm512_packus_epi32(__m512i(x[0]), __m512i(x[1]));
  const __m512i high = _mm512_packus_epi32(__m512i(x[2]), __m512i(x[3]));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}
ALR_HOST_DEVICE void store_codes8(void* to, const I* x) { _mm512_storeu_si512(to, bytes_in_order(x)); }
ALR_HOST_DEVICE void store_codes4(void* to, const I* x) {
  const __m512i pairs = _mm512_maddubs_epi16(bytes_in_order(x), _mm512_set1_epi16(0x1001));
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi16_epi8(pairs));
}
// Codes of 4 bits, low half first, in the low bits of each lane; what is above them is left over.
ALR_HOST_DEVICE U load_u4(const void* from) {
  const __m512i pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
  return U(_mm512_or_si512(pairs, _mm512_slli_epi64(pairs, 28)));
}

#elif defined(__AVX2__)

ALR_HOST_DEVICE U load_u16(const void* from) {
  return U(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
ALR_HOST_DEVICE I load_i16(const void* from) {
  return I(_mm256_cvtepi16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
ALR_HOST_DEVICE U load_u8(const void* from) {
  return U(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
}
ALR_HOST_DEVICE I load_i8(const void* from) {
  return I(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from))));
}
// The wanted bytes of each 128-bit half move to its bottom, then the halves meet.
ALR_HOST_DEVICE void store_16(void* to, U x) {
  const __m256i low = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,
                                       0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(__m256i(x), low), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(halves));
}
ALR_HOST_DEVICE void store_8(void* to, I x) {
  const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                       -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i halves = _mm256_shuffle_epi8(__m256i(x), low);
  const __m128i both = _mm_or_si128(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storel_epi64(static_cast<__m128i*>(to), both);
}
// As with AVX-512.
ALR_HOST_DEVICE __m256i bytes_in_order(const I* x) {
  const __m256i low = _mm256_packus_epi32(__m256i(x[0]), __m256i(x[1]));
  const __m256i high = _mm256_packus_epi32(__m256i(x[2]), __m256i(x[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
}
ALR_HOST_DEVICE void store_codes8(void* to, const I* x) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), bytes_in_order(x));
}
ALR_HOST_DEVICE void store_codes4(void* to, const I* x) {
  const __m256i pairs = _mm256_maddubs_epi16(bytes_in_order(x), _mm256_set1_epi16(0x1001));
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_castsi256_si128(halves));
}
ALR_HOST_DEVICE U load_u4(const void* from) {
  int32_t bytes;
  memcpy(&bytes, from, sizeof(bytes));
  const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
  return U(_mm256_or_si256(pairs, _mm256_slli_epi64(pairs, 28)));
}

#else

using I8 = int8_t __attribute__((vector_size(kLanes)));
using U8 = uint8_t __attribute__((vector_size(kLanes)));
using I16 = int16_t __attribute__((vector_size(2 * kLanes)));
using U16 = uint16_t __attribute__((vector_size(2 * kLanes)));

template <typename T>
ALR_HOST_DEVICE T loaded(const void* from) {
  T values;
  memcpy(&values, from, sizeof(values));
  return values;
}

ALR_HOST_DEVICE U load_u16(const void* from) { return __builtin_convertvector(loaded<U16>(from), U); }
ALR_HOST_DEVICE I load_i16(const void* from) { return __builtin_convertvector(loaded<I16>(from), I); }
ALR_HOST_DEVICE U load_u8(const void* from) { return __builtin_convertvector(loaded<U8>(from), U); }
ALR_HOST_DEVICE I load_i8(const void* from) { return __builtin_convertvector(loaded<I8>(from), I); }
ALR_HOST_DEVICE void store_16(void* to, U x) {
  const U16 values = __builtin_convertvector(x, U16);
  memcpy(to, &values, sizeof(values));
}
ALR_HOST_DEVICE void store_8(void* to, I x) {
  const I8 values = __builtin_convertvector(x, I8);
  memcpy(to, &values, sizeof(values));
}
// As with AVX-512.
ALR_HOST_DEVICE void store_codes8(void* to, const I* x) {
  for (int part = 0; part < 4; ++part) store_8(static_cast<uint8_t*>(to) + part * kLanes, x[part]);
}
ALR_HOST_DEVICE void store_codes4(void* to, const I* x) {
  uint8_t codes[4 * kLanes];
  store_codes8(codes, x);
  for (int i = 0; i < 2 * kLanes; ++i) static_cast<uint8_t*>(to)[i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
}
ALR_HOST_DEVICE U load_u4(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  return U{uint32_t(bytes[0]), uint32_t(bytes[0] >> 4), uint32_t(bytes[1]), uint32_t(bytes[1] >> 4)};
}

#endif

ALR_HOST_DEVICE V load_bfloat16(const void* from) { return from_bfloat16<V>(load_u16(from)); }

// As from_float16 and to_float16, which are 9 and 14 operations.
ALR_HOST_DEVICE V load_float16(const void* from) {
#if defined(__AVX512F__)
  return V(_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return V(_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))));
#else
  return from_float16<V>(load_u16(from));
#endif
}

ALR_HOST_DEVICE void store_float16(void* to, V x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
  store_16(to, to_float16(x));
#endif
}

}  // namespace ALR_CPU_NAMESPACE

}  // namespace alr
