// One block of importance: out of the form in which it is kept, and into it, with what its tensor's
// statistics and histogram need. Included once per instruction set.
#pragma once

#include "cpu.h"
#include "simd.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

// Sums run in this many lanes whatever the vector width, so that every copy rounds alike.
constexpr int kSumLanes = 16;
constexpr int kParts = kSumLanes / kLanes;

template <typename T>
ALR_HOST_DEVICE V load_as(const T* from);
template <>
ALR_HOST_DEVICE V load_as<float>(const float* from) {
  return load_float(from);
}
template <>
ALR_HOST_DEVICE V load_as<BFloat16>(const BFloat16* from) {
  return load_bfloat16(from);
}
template <>
ALR_HOST_DEVICE V load_as<Float16>(const Float16* from) {
  return load_float16(from);
}

// A float32 sum over one block.
struct BlockSum {
  V part[kParts];
};

constexpr int kHalf = kSumLanes / 2;

// Its upper lanes added to its lower ones.
struct HalfSum {
  float at[kHalf];

  ALR_HOST_DEVICE explicit HalfSum(const BlockSum& sum) {
#if defined(__AVX512F__)
    const __m512 x = __m512(sum.part[0]);
    _mm256_storeu_ps(at, _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
#else
    for (int part = 0; part < kParts / 2; ++part) {
      store_float(at + part * kLanes, sum.part[part] + sum.part[part + kParts / 2]);
    }
#endif
  }
};

// Whether both are, in every lane: neither they nor their difference left float32.
ALR_HOST_DEVICE bool both_finite(const HalfSum& positive, const HalfSum& negative) {
#if defined(__AVX512F__)
  return _mm256_fpclass_ps_mask(_mm256_sub_ps(_mm256_loadu_ps(positive.at), _mm256_loadu_ps(negative.at)), 0x99) == 0;
#else
  bool finite = true;
  for (int i = 0; i < kHalf; i += kLanes) {
    finite &= all_finite(load_float(positive.at + i) - load_float(negative.at + i));
  }
  return finite;
#endif
}

// Where such sums are added up over blocks.
struct LaneSum {
  double lane[kHalf];

  ALR_HOST_DEVICE void add(const HalfSum& sum, double scale) {
#pragma omp simd
    for (int i = 0; i < kHalf; ++i) lane[i] += double(sum.at[i]) * scale;
  }

  double total() const {
    double sum = 0.0;
    for (int i = 0; i < kHalf; ++i) sum += lane[i];
    return sum;
  }
};

// What a chunk gathers. `positive` and `negative`: of the path integral.
struct Gathered {
  LaneSum positive, negative, importance, importance_sq;
  double importance_max, nonfinite;
  uint32_t counts[256];  // by a float's upper byte

  Sums sums() const {
    const double lost = -negative.total();
    return {positive.total() - lost, lost, importance.total(), importance_sq.total(), importance_max, nonfinite};
  }
};

// ---- counting

constexpr int kSteps = 4;  // bytes looked for between two looks at whether all are found

#if defined(__AVX512F__)
struct UpperBytes {  // of 64 floats, in any order
  __m512i bytes;
  ALR_HOST_DEVICE explicit UpperBytes(const float* x) {
    const auto upper = [x](int i) { return _mm512_srli_epi32(_mm512_loadu_si512(x + 16 * i), 24); };
    bytes = _mm512_packus_epi16(_mm512_packus_epi32(upper(0), upper(1)), _mm512_packus_epi32(upper(2), upper(3)));
  }
  ALR_HOST_DEVICE int count(int byte) const {
    return __builtin_popcountll(_mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(char(byte))));
  }
};
#elif defined(__AVX2__)
struct UpperBytes {  // of 32 floats, in any order
  __m256i bytes;
  ALR_HOST_DEVICE explicit UpperBytes(const float* x) {
    const auto upper = [x](int i) {
      return _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x) + i), 24);
    };
    bytes = _mm256_packus_epi16(_mm256_packus_epi32(upper(0), upper(1)), _mm256_packus_epi32(upper(2), upper(3)));
  }
  ALR_HOST_DEVICE int count(int byte) const {
    return __builtin_popcount(unsigned(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(char(byte))))));
  }
};
#endif

// Counts a block's upper bytes, none of which but negative ones' is above `top`. A block has few: each is looked for,
// from the top: finalise then takes 0.50 ns an element on one core, and 0.70 with tables that elements are added to one by
// one (EPYC 9004, 2026-11).
ALR_HOST_DEVICE void count_block(const float* x, int top, uint32_t* counts) {
#if defined(__AVX2__)
  constexpr int kFloats = int(sizeof(UpperBytes)), kParts = int(kBlock) / kFloats;
  UpperBytes parts[kParts] = {
      UpperBytes(x), UpperBytes(x + kFloats),
#if !defined(__AVX512F__)
      UpperBytes(x + 2 * kFloats), UpperBytes(x + 3 * kFloats),
#endif
  };
  const auto count = [&](int byte) {
    int found = 0;
    for (const UpperBytes& part : parts) found += part.count(byte);
    return found;
  };
  int left = int(kBlock) - count(0);
  counts[0] += uint32_t(int(kBlock) - left);
  for (int byte = top; left > 0 && byte >= kLowestByte; byte -= kSteps) {
    for (int i = 0; i < kSteps; ++i) {
      const int found = count(byte - i);
      counts[byte - i] += uint32_t(found);
      left -= found;
    }
  }
  counts[1] += uint32_t(left);  // small or negative: bin 0 as well
#else
  (void)top;
  for (int i = 0; i < kBlock; ++i) ++counts[float_bits(x[i]) >> 24];
#endif
}

// ---- decoding

template <int kBits>
ALR_HOST_DEVICE void decode_block(const Kept& kept, int64_t begin, float* to) {
  const V scale = splat(from_bfloat16<float>(kept.scales[begin / kBlock]) * importance_unit(kBits));
  const uint8_t* codes = static_cast<const uint8_t*>(kept.values) + begin * kBits / 8;
  for (int i = 0; i < kBlock; i += kLanes) {
    const U code = kBits == 4 ? load_u4(codes + i / 2) & 15u : load_u8(codes + i);
    store_float(to + i, fourth_power(Number<V>::of(I(code)), scale));
  }
}

template <typename T>
ALR_HOST_DEVICE void widen_block(const Kept& kept, int64_t begin, int numel, float* to) {
  const T* from = static_cast<const T*>(kept.values) + begin;
  if (numel == kBlock) {
    for (int i = 0; i < kBlock; i += kLanes) store_float(to + i, load_as<T>(from + i));
  } else {
    for (int i = 0; i < kBlock; ++i) to[i] = i < numel ? load(from[i]) : 0.0f;
  }
}

// Writes [kBlock] floats, 0 beyond `numel`.
inline void load_block(const Kept& kept, int64_t begin, int numel, float* to) {
  if (kept.values == nullptr) {
    memset(to, 0, kBlock * sizeof(float));
    return;
  }
  switch (kept.format) {
    case kFloat32: return widen_block<float>(kept, begin, numel, to);
    case kBFloat16: return widen_block<BFloat16>(kept, begin, numel, to);
    case kFloat16: return widen_block<Float16>(kept, begin, numel, to);
    case kCodes8: return decode_block<8>(kept, begin, to);
    default: return decode_block<4>(kept, begin, to);
  }
}

// ---- encoding

// What encode_importance() asks for the threshold above a code.
template <int kBits>
struct Thresholds {
  ALR_HOST_DEVICE V operator()(I code) const { return next_threshold<kBits, V>(code); }
};

#if defined(__AVX512F__)
template <>
struct Thresholds<4> {  // all sixteen in a register
  V all = next_threshold<4, V>(lanes());
  ALR_HOST_DEVICE V operator()(I code) const { return V(_mm512_permutexvar_ps(__m512i(code), __m512(all))); }
};
#endif

template <int kBits>
ALR_HOST_DEVICE void encode_block(const float* from, uint16_t scale, const Kept& kept, int64_t begin) {
  const float factor = inverse(from_bfloat16<float>(scale));
  const Thresholds<kBits> thresholds;
  uint8_t* codes = static_cast<uint8_t*>(kept.values) + begin * kBits / 8;
  for (int i = 0; i < kBlock; i += 4 * kLanes) {
    I code[4];
    for (int part = 0; part < 4; ++part) {
      code[part] = encode_importance<kBits>(load_float(from + i + part * kLanes) * factor, thresholds);
    }
    kBits == 4 ? store_codes4(codes + i / 2, code) : store_codes8(codes + i, code);
  }
}

ALR_HOST_DEVICE void store_16_bits(BFloat16* to, V x) { store_16(to, to_bfloat16(x)); }
ALR_HOST_DEVICE void store_16_bits(Float16* to, V x) { store_float16(to, x); }

template <typename T>
ALR_HOST_DEVICE void narrow_block(const float* from, const Kept& kept, int64_t begin, int numel) {
  T* to = static_cast<T*>(kept.values) + begin;
  T block[kBlock];
  T* whole = numel == kBlock ? to : block;
  for (int i = 0; i < kBlock; i += kLanes) store_16_bits(whole + i, load_float(from + i));
  if (numel < kBlock) memcpy(to, block, size_t(numel) * sizeof(T));
}

inline void store_block(float* block, float peak, const Kept& kept, int64_t begin, int numel) {
  switch (kept.format) {
    case kFloat32: memcpy(static_cast<float*>(kept.values) + begin, block, size_t(numel) * sizeof(float)); return;
    case kBFloat16: return narrow_block<BFloat16>(block, kept, begin, numel);
    case kFloat16: return narrow_block<Float16>(block, kept, begin, numel);
    default: break;
  }
  const uint16_t scale = importance_scale(peak);
  if (!is_finite(peak)) {
    for (int i = 0; i < kBlock; ++i) block[i] = tamed(block[i], peak);
  }
  kept.scales[begin / kBlock] = scale;
  kept.format == kCodes4 ? encode_block<4>(block, scale, kept, begin) : encode_block<8>(block, scale, kept, begin);
}

// The largest of a block; NaN where one is.
ALR_HOST_DEVICE float block_peak(const float* block) {
  V peak = load_float(block), nan{};
  for (int i = 0; i < kBlock; i += kLanes) {
    const V x = load_float(block + i);
    peak = larger(x, peak);
    nan += x - x;  // 0, or NaN
  }
  if (all_finite(nan)) return largest(peak);
  float most = block[0];
  for (int i = 1; i < kBlock; ++i) most = block[i] > most || block[i] != block[i] ? block[i] : most;
  return most;
}

// Adds a block to what is gathered and stores it. `block`: [kBlock], 0 beyond `numel`; overwritten. `peak`: its largest.
inline __attribute__((noinline)) void emit_block(float* block, float peak, const Kept& kept, int64_t begin, int numel, Gathered& gathered) {
  const BlockUnit unit = block_unit(peak);
  BlockSum sum{}, square{};
  for (int i = 0; i < kBlock; i += kSumLanes) {
    for (int part = 0; part < kParts; ++part) {
      const V x = load_float(block + i + part * kLanes) * unit.scale;
      sum.part[part] += x;
      square.part[part] += x * x;
    }
  }
  gathered.importance.add(HalfSum(sum), unit.unscale);
  gathered.importance_sq.add(HalfSum(square), unit.unscale * unit.unscale);
  gathered.importance_max = maximum(gathered.importance_max, double(peak));
  count_block(block, is_finite(peak) ? int(float_bits(peak) >> 24) & 127 : 127, gathered.counts);
  gathered.counts[0] -= uint32_t(kBlock - numel);
  store_block(block, peak, kept, begin, numel);
}

}  // namespace
}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
