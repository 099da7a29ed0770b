// Block codes of importance and moments, the split master and stochastic rounding, per element. The
// same lines, in the same order, as alr_kernels/codecs/reference.py and rounding.py. F is float or a
// vector of floats; scales come prepared, once a block.
#pragma once

#include "common.h"

namespace alr {

constexpr int64_t kBlock = 128;  // consecutive elements that share a scale
constexpr float kBFloat16Max = 3.3895313892515355e38f;
constexpr float kTiny = 1.17549435e-38f;  // the smallest normal float32: blocks below it are zero
constexpr uint32_t kGolden = 0x9E3779B9u;

template <typename F>
ALR_HOST_DEVICE F join(Bits<F> param, Int<F> remainder) {
  return bits_float<F>((param << 16) + Bits<F>(remainder));
}

// The low halves of `param` and `remainder` are what is stored.
template <typename F>
ALR_HOST_DEVICE void split(F x, Bits<F>& param, Bits<F>& remainder) {
  const Bits<F> bits = float_bits(x);
  remainder = x != x ? Bits<F>{} + 0x7fc00000u : bits;
  param = (remainder + 0x8000u) >> 16;
}

// A hash of 32 bits.
template <typename U>
ALR_HOST_DEVICE U mix(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 32 random bits of an element, a function of key and index alone; `high` is the index's upper half, of all or of each.
template <typename U, typename High>
ALR_HOST_DEVICE U noise(uint32_t key, U low, High high) {
  return mix((low ^ key) + high * kGolden);
}

// bf16 of x, up with the probability of the part that is cut off; `bits` are 16 random ones.
template <typename F>
ALR_HOST_DEVICE Bits<F> round_stochastic(F x, Bits<F> bits) {
  const Bits<F> rounded = (float_bits(x) + bits) >> 16;
  return x != x ? Bits<F>{} + 0x7fc0u : rounded;
}

// u in [0, 1) of the codes of moments; `turn` is the block's noise plus kGolden times the place in it.
template <typename F>
ALR_HOST_DEVICE F dither(Bits<F> turn) {
  return Number<F>::of(Int<F>(turn >> 8)) * 0x1p-24f;
}

template <typename F>
ALR_HOST_DEVICE F magnitude(F x) {
  return bits_float<F>(float_bits(x) & 0x7fffffffu);
}

// sqrt(x) of x >= 0 to 3e-7: a first guess by its exponent, three Newton steps of 1 / sqrt(x).
template <typename F>
ALR_HOST_DEVICE F approximate_sqrt(F x) {
  const F half = x * 0.5f;
  F y = bits_float<F>(0x5f37642fu - Bits<F>(Int<F>(float_bits(x)) >> 1));
  y = y * (1.5f - half * y * y);
  y = y * (1.5f - half * y * y);
  y = y * (1.5f - half * y * y);
  return x * y;
}

ALR_HOST_DEVICE float inverse(float peak) { return peak < kTiny ? 0.0f : 1.0f / peak; }

template <typename F>
ALR_HOST_DEVICE F fourth_power(F code, F scale) {
  const F square = code * code;
  return square * square * scale;
}

// m = scale c |c|, with scale = the block's max / 127^2; c = floor(sqrt(|m| inverse) 127 + u), signed.
constexpr float kExpAvgUnit = float(1.0 / (127 * 127));

template <typename F>
ALR_HOST_DEVICE F decode_exp_avg(F code, F scale) {
  return code * magnitude(code) * scale;
}

template <bool kPrecise, typename F>
ALR_HOST_DEVICE Int<F> encode_exp_avg(F exp_avg, F inverse, F u) {
  const F ratio = magnitude(exp_avg) * inverse;
  const F root = kPrecise ? approximate_sqrt(ratio) : Number<F>::rough_square_root(ratio);
  const Int<F> whole = Number<F>::whole(root * 127.0f + u);
  const Int<F> code = Number<F>::smaller(whole, 127);
  return exp_avg < 0.0f ? -code : code;
}

// v = scale c^4, with scale = the block's max / 255^4; c = floor(sqrt(sqrt(v) inverse) 255 + u), >= 1 where v > 0.
constexpr float kExpAvgSqUnit = float(1.0 / (255.0 * 255.0 * 255.0 * 255.0));

template <bool kPrecise, typename F>
ALR_HOST_DEVICE Int<F> encode_exp_avg_sq(F root, F inverse, F u) {
  // A root that is off by e moves v by 4 e in every step, against a memory of 1 / (1 - beta2) steps: no rough one here.
  const F ratio = root * inverse;
  const F code_root = kPrecise ? approximate_sqrt(ratio) : Number<F>::square_root(ratio);
  const Int<F> whole = Number<F>::whole(code_root * 255.0f + u);
  const Int<F> most = Number<F>::smaller(whole, 255);
  const Int<F> code = most > 1 ? most : Int<F>{} + 1;
  return root > 0.0f ? code : Int<F>{};
}

// importance = scale c^4, with scale = the block's max as bf16 / top^4; c = #{j: t(j) <= importance inverse}.
ALR_HOST_DEVICE constexpr float importance_unit(int bits) {
  return float(bits == 4 ? 1.0 / (15.0 * 15.0 * 15.0 * 15.0) : 1.0 / (255.0 * 255.0 * 255.0 * 255.0));
}

ALR_HOST_DEVICE uint16_t importance_scale(float peak) {
  return peak != peak ? uint16_t(0x7fc0) : uint16_t(to_bfloat16(peak > kBFloat16Max ? kBFloat16Max : peak));
}

// Codes are of finite numbers: NaN costs its block, infinity counts as the largest number.
ALR_HOST_DEVICE float tamed(float importance, float peak) {
  return peak != peak || importance < 0.0f ? 0.0f : fminf(importance, 3.40282347e+38f);
}

// t(c + 1) = ((c + 1/2) / top)^4: from there on the code is no longer c.
template <int kBits, typename F>
ALR_HOST_DEVICE F next_threshold(Int<F> code) {
  constexpr float kStep = float(1.0 / ((1 << kBits) - 1));
  const F root = (Number<F>::of(code) + 0.5f) * kStep;
  const F square = root * root;
  return square * square;
}

// A fourth root that is off by 7e-4 at most (rsqrtps twice: 5.5e-4) gives c or c - 1; one comparison says which.
// `ratio` is at most 1 + 2^-8, where the scale was rounded down: below t(top + 1). Of NaN the low byte is 0.
// thresholds(c): next_threshold of it.
template <int kBits, typename F, typename Thresholds>
ALR_HOST_DEVICE Int<F> encode_importance(F ratio, const Thresholds& thresholds) {
  constexpr float kTop = float((1 << kBits) - 1);
  const Int<F> code = Number<F>::whole(Number<F>::rough_fourth_root(ratio) * kTop + 0.3f);
  return ratio >= thresholds(code) ? code + 1 : code;
}

}  // namespace alr
