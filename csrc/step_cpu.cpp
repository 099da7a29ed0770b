// The step's loops. Compiled once per instruction set, with ALR_CPU_NAMESPACE naming the copy, and
// twice for each: precise, and (ALR_PRECISE 0) with contraction into fused multiply-adds. No standard
// library code here: the linker could pick a copy of it that needs AVX for everyone.
//
// One loop serves every form of storage: what an operand is kept as is asked anew for each vector. Such
// branches always go the same way and run beside the arithmetic, which is what limits a step in few
// bytes; a loop for every combination would be thousands of loops, and a pass over a tile per operand is
// no faster (AVX-512, 11/2026). Divisions and square roots are IEEE in both: rcp14 and rsqrt14 with a
// Newton step are more operations than they save. Prefetching gained nothing either.
#include "cpu.h"
#include "simd.h"

#if ALR_PRECISE
#define ALR_STEP_RANGE step_range_precise
#else
#define ALR_STEP_RANGE step_range_fast
#endif

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

constexpr int64_t kTile = 4 * kBlock;  // elements whose new moments wait in the L1 cache to be encoded

using Scalars = StepScalars<V>;

// Everything a loop needs to know besides the numbers.
struct Loop {
  StepTensor t;
  StepFormats formats;
  int64_t first;  // global index of element 0 of `t`, for the random generator
  bool scaled;    // whether gradients are, by anything but 1
  V* statistics;  // [kStepStatistics] sums of this tile, or null
};

// Fewest bytes, most arithmetic: here the branches cost, 4 % with AVX-512 and 16 % with AVX2, so that
// this one combination (with any importance) has a loop of its own.
ALR_HOST_DEVICE StepFormats narrow(StepFormats f) { return {kSplit, kBFloat16, kCodes8, f.importance, kBFloat16}; }

ALR_HOST_DEVICE bool is_narrow(StepFormats f) {
  return f.param == kSplit && f.grad == kBFloat16 && f.moments == kCodes8 && f.anchor == kBFloat16;
}

ALR_HOST_DEVICE V load_as(int format, const void* from, int64_t i) {
  if (format == kFloat32) return load_float(static_cast<const float*>(from) + i);
  const uint16_t* halves = static_cast<const uint16_t*>(from) + i;
  if (format == kFloat16) return load_float16(halves);
  return load_bfloat16(halves);
}

ALR_HOST_DEVICE V load_param(const Loop& l, int64_t i) {
  if (l.formats.param != kSplit) return load_as(l.formats.param, l.t.param, i);
  return join<V>(load_u16(static_cast<const uint16_t*>(l.t.param) + i), load_i16(l.t.remainder + i));
}

// Stores the parameter and returns it as it was stored; `random`: 16 bits for stochastic rounding.
ALR_HOST_DEVICE V store_param(const Loop& l, int64_t i, V x, U random) {
  if (l.formats.param == kFloat32) {
    store_float(static_cast<float*>(l.t.param) + i, x);
    return x;
  }
  uint16_t* param = static_cast<uint16_t*>(l.t.param) + i;
  if (l.formats.param == kSplit) {
    U high, low;
    split(x, high, low);
    store_16(param, high);
    store_16(l.t.remainder + i, low);
    return x;
  }
  if (l.formats.param == kFloat16) {
    store_float16(param, x);
    return load_float16(param);
  }
  const U rounded = l.formats.param == kStochastic ? round_stochastic(x, random) : to_bfloat16(x);
  store_16(param, rounded);
  return from_bfloat16<V>(rounded);
}

// What a block's codes are decoded with.
struct BlockScales {
  V exp_avg, exp_avg_sq;
  V importance;  // AVX-512: of 4-bit codes the curvature of each of the 16, in a register
};

ALR_HOST_DEVICE float block_scale(const uint16_t* scales, int64_t block, int bits) {
  return from_bfloat16<float>(scales[block]) * importance_unit(bits);
}

ALR_HOST_DEVICE V load_curvature(const Loop& l, const BlockScales& b, V curvature_scale, int64_t i) {
  const int format = l.formats.importance;
  if (format == kCodes4) {
    const U codes = load_u4(static_cast<const uint8_t*>(l.t.importance) + i / 2);
#if defined(__AVX512F__)
    return V(_mm512_permutexvar_ps(__m512i(codes), __m512(b.importance)));
#else
    return curvature(fourth_power(Number<V>::of(I(codes & 15u)), b.importance), curvature_scale);
#endif
  }
  if (format != kCodes8) return curvature(load_as(format, l.t.importance, i), curvature_scale);
  const I codes = I(load_u8(static_cast<const uint8_t*>(l.t.importance) + i));
  return curvature(fourth_power(Number<V>::of(codes), b.importance), curvature_scale);
}

ALR_HOST_DEVICE BlockScales load_scales(const Loop& l, [[maybe_unused]] const Scalars& s, int64_t block) {
  BlockScales b{};
  if (l.formats.moments == kCodes8) {
    b.exp_avg = splat(l.t.exp_avg_scales[block] * kExpAvgUnit);
    b.exp_avg_sq = splat(l.t.exp_avg_sq_scales[block] * kExpAvgSqUnit);
  }
  if (l.formats.importance == kCodes8) b.importance = splat(block_scale(l.t.importance_scales, block, 8));
  if (l.formats.importance == kCodes4) {
    b.importance = splat(block_scale(l.t.importance_scales, block, 4));
#if defined(__AVX512F__)
    b.importance = curvature(fourth_power(Number<V>::of(lanes()), b.importance), s.curvature_scale);
#endif
  }
  return b;
}

ALR_HOST_DEVICE void load_moments(const Loop& l, const BlockScales& b, int64_t i, V& exp_avg, V& exp_avg_sq) {
  if (l.formats.moments != kCodes8) {
    exp_avg = load_as(l.formats.moments, l.t.exp_avg, i);
    exp_avg_sq = load_as(l.formats.moments, l.t.exp_avg_sq, i);
    return;
  }
  exp_avg = decode_exp_avg(Number<V>::of(load_i8(static_cast<int8_t*>(l.t.exp_avg) + i)), b.exp_avg);
  const I codes = I(load_u8(static_cast<uint8_t*>(l.t.exp_avg_sq) + i));
  exp_avg_sq = fourth_power(Number<V>::of(codes), b.exp_avg_sq);
}

// The random bits of elements `index` and on. One vector in 2^32 elements has a carry in it, where shards begin anywhere.
ALR_HOST_DEVICE U noise_from(uint32_t key, int64_t index) {
  const uint32_t first = uint32_t(index), high = uint32_t(index >> 32);
  const U low = U(lanes()) + first;
  if (first > 0u - uint32_t(kLanes)) return noise(key, low, low < first ? U{} + (high + 1u) : U{} + high);
  return noise(key, low, high);
}

// New moments of a tile that are to be encoded, and the largest of each block.
struct Waiting {
  alignas(64) float exp_avg[kTile];
  alignas(64) float root[kTile];
  float exp_avg_peak[kTile / kBlock];
  float exp_avg_sq_peak[kTile / kBlock];
};

template <int kMode>
ALR_HOST_DEVICE void add_vector(V* sums, const Scalars& s, V before, V g, V anchor, V k, V denom) {
  const StepStatistics<V> row = statistics_element<kMode>(before, g, anchor, k, s.lr, denom);
  for (int j = 0; j < kStepStatistics; ++j) {
    sums[j] = j == kStiffness ? stiffer(sums[j], row.at[j]) : sums[j] + row.at[j];
  }
}

// Steps elements [begin, end) of one block, and leaves what is to be encoded in `w`.
template <int kMode>
ALR_HOST_DEVICE void step_block(const Loop& l, const Scalars& s, int64_t begin, int64_t end, int64_t tile,
                                Waiting& w) {
  const BlockScales b = load_scales(l, s, begin / kBlock);
  const int moments = l.formats.moments;
  const bool random = l.formats.param == kStochastic || moments == kBFloat16;
  V exp_avg_peak{}, exp_avg_sq_peak{};
  for (int64_t i = begin; i < end; i += kLanes) {
    const V before = load_param(l, i);
    V g = load_as(l.formats.grad, l.t.grad, i), clipped = g;
    if (l.scaled) {
      g = g * s.grad_scale;
      clipped = g * s.clip;
    }
    V exp_avg, exp_avg_sq, k{}, anchor = before;
    load_moments(l, b, i, exp_avg, exp_avg_sq);
    if (kMode != kPlain) {
      k = load_curvature(l, b, s.curvature_scale, i);
      anchor = load_as(l.formats.anchor, l.t.anchor, i);
    }
    const Stepped<V> to = step_element<kMode>(before, clipped, exp_avg, exp_avg_sq, k, anchor, s);
    U bits{};
    if (random) bits = noise_from(l.t.key, l.first + i);
    const V stored = store_param(l, i, to.param, bits & 0xffffu);
    if (moments == kFloat32) {
      store_float(static_cast<float*>(l.t.exp_avg) + i, to.exp_avg);
      store_float(static_cast<float*>(l.t.exp_avg_sq) + i, to.exp_avg_sq);
    } else if (moments == kCodes8) {
      store_float(w.exp_avg + i - tile, to.exp_avg);
      store_float(w.root + i - tile, to.root);
      exp_avg_peak = larger_magnitude(to.exp_avg, exp_avg_peak);
      exp_avg_sq_peak = larger(to.exp_avg_sq, exp_avg_sq_peak);
    } else {
      store_16(static_cast<uint16_t*>(l.t.exp_avg) + i, to_bfloat16(to.exp_avg));
      store_16(static_cast<uint16_t*>(l.t.exp_avg_sq) + i, round_stochastic(to.exp_avg_sq, bits >> 16));
    }
    if (l.t.path_integral) {
      float* path_integral = l.t.path_integral + i;
      store_float(path_integral, record_element(load_float(path_integral), g, stored, before));
    }
    if (l.statistics) add_vector<kMode>(l.statistics, s, before, g, anchor, k, to.denom);
  }
  if (moments == kCodes8) {
    w.exp_avg_peak[(begin - tile) / kBlock] = largest(exp_avg_peak);
    w.exp_avg_sq_peak[(begin - tile) / kBlock] = largest(exp_avg_sq_peak);
  }
}

ALR_HOST_DEVICE void encode_block(const Loop& l, int64_t begin, int64_t tile, const Waiting& w) {
  const int64_t block = (begin - tile) / kBlock, index = (l.first + begin) / kBlock;
  const float peak = w.exp_avg_peak[block], peak_sq = w.exp_avg_sq_peak[block];
  l.t.exp_avg_scales[begin / kBlock] = peak;
  l.t.exp_avg_sq_scales[begin / kBlock] = peak_sq;
  const V exp_avg_inverse = splat(inverse(peak)), root_inverse = splat(inverse(sqrtf(peak_sq)));
  U turn = U(lanes()) * kGolden + noise(l.t.key, uint32_t(index), uint32_t(index >> 32));
  for (int64_t i = begin; i < begin + kBlock; i += kLanes, turn += kGolden * uint32_t(kLanes)) {
    const V u = dither<V>(turn);
    store_8(static_cast<int8_t*>(l.t.exp_avg) + i,
            encode_exp_avg<ALR_PRECISE>(load_float(w.exp_avg + i - tile), exp_avg_inverse, u));
    store_8(static_cast<uint8_t*>(l.t.exp_avg_sq) + i,
            encode_exp_avg_sq<ALR_PRECISE>(load_float(w.root + i - tile), root_inverse, u));
  }
}

void add_tile(double* sums, const V* partials) {
  for (int lane = 0; lane < kLanes; ++lane) {
    double row[kStepStatistics];
    for (int j = 0; j < kStepStatistics; ++j) row[j] = double(partials[j][lane]);
    add_statistics(sums, row);
  }
}

template <int kMode, bool kNarrow>
void step_loop(const Loop& given, const Scalars& s, int64_t begin, int64_t end, double* sums) {
  Loop l = given;
  if (kNarrow) l.formats = narrow(l.formats);
  V partials[kStepStatistics];
  Waiting w;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t tile_end = tile + kTile < end ? tile + kTile : end;
    if (sums) {
      for (V& partial : partials) partial = V{};
      l.statistics = partials;
    }
    for (int64_t i = tile; i < tile_end; i += kBlock) {
      step_block<kMode>(l, s, i, i + kBlock < tile_end ? i + kBlock : tile_end, tile, w);
    }
    if (l.formats.moments == kCodes8) {
      for (int64_t i = tile; i < tile_end; i += kBlock) encode_block(l, i, tile, w);
    }
    if (sums) add_tile(sums, partials);
  }
}

template <int kMode>
void step_mode(const Loop& l, const Scalars& s, int64_t begin, int64_t end, double* sums) {
  if (is_narrow(l.formats)) return step_loop<kMode, true>(l, s, begin, end, sums);
  step_loop<kMode, false>(l, s, begin, end, sums);
}

void step_vectors(const Loop& l, const Scalars& s, int mode, int64_t begin, int64_t end, double* sums) {
  if (mode == kPlain) return step_mode<kPlain>(l, s, begin, end, sums);
  if (mode == kCoupled) return step_mode<kCoupled>(l, s, begin, end, sums);
  step_mode<kProximal>(l, s, begin, end, sums);
}

// A few elements of an operand, in a copy that is one vector long.
struct Copy {
  char* original = nullptr;
  size_t bytes = 0;
  alignas(64) char values[4 * kLanes] = {};
};

template <typename T>
ALR_HOST_DEVICE void move_to(Copy& copy, T*& operand, int64_t begin, int64_t count, int format) {
  if (!operand) return;
  const int64_t width = format == kFloat32 ? 4 : 2;
  copy.original = const_cast<char*>(reinterpret_cast<const char*>(operand)) + begin * width;
  copy.bytes = size_t(count * width);
  memcpy(copy.values, copy.original, copy.bytes);
  operand = reinterpret_cast<T*>(copy.values);
}

// The last elements, fewer than a vector; never codes. What is beyond them adds nothing to the statistics.
void step_rest(Loop l, const Scalars& s, const StepOptions& o, int64_t begin, int64_t count, double* sums) {
  StepTensor& t = l.t;
  const StepFormats& f = l.formats;
  Copy param, remainder, grad, exp_avg, exp_avg_sq, importance, anchor, path_integral;
  for (size_t j = 0; j < sizeof(exp_avg_sq.values); j += 2) memcpy(exp_avg_sq.values + j, "\x80\x3f", 2);  // v = 1
  move_to(param, t.param, begin, count, f.param);
  move_to(remainder, t.remainder, begin, count, kSplit);
  move_to(grad, t.grad, begin, count, f.grad);
  move_to(exp_avg, t.exp_avg, begin, count, f.moments);
  move_to(exp_avg_sq, t.exp_avg_sq, begin, count, f.moments);
  move_to(importance, t.importance, begin, count, f.importance);
  move_to(anchor, t.anchor, begin, count, f.anchor);
  move_to(path_integral, t.path_integral, begin, count, kFloat32);
  l.first += begin;
  step_vectors(l, s, o.mode, 0, kLanes, sums);
  const Copy* mutated[] = {&param, &remainder, &exp_avg, &exp_avg_sq, &path_integral};
  for (const Copy* copy : mutated) {
    if (copy->original) memcpy(copy->original, copy->values, copy->bytes);
  }
}

}  // namespace

void ALR_STEP_RANGE(const StepTensor& t, const StepScalars<float>& scalars, const StepOptions& o, int64_t begin,
                    int64_t end, double* sums) {
  const Scalars s{splat(scalars.lr),          splat(scalars.decay),           splat(scalars.one_minus_beta1),
                  splat(scalars.beta2),       splat(scalars.one_minus_beta2), splat(scalars.eps),
                  splat(scalars.step_size),   splat(scalars.rsqrt_bias2),     splat(scalars.grad_scale),
                  splat(scalars.clip),        splat(t.curvature_scale)};
  const Loop l{t, o.formats, t.offset, scalars.grad_scale != 1.0f || scalars.clip != 1.0f, nullptr};
  const int64_t whole = begin + (end - begin) / kLanes * kLanes;
  if (begin < whole) step_vectors(l, s, o.mode, begin, whole, sums);
  if (whole < end) step_rest(l, s, o, whole, end - whole, sums);
}

}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
