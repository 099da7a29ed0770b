// Recording, finalising and merging element-wise importance, per element. The same lines, in the same order,
// as alr_kernels/importance/reference.py; compiled without floating-point contraction.
#pragma once

#include <cfloat>
#include <cmath>

#include "common.h"

namespace alr {

// path_integral += -g (param - before)
ALR_HOST_DEVICE float accumulate(float path_integral, float g, float param, float before) {
  return path_integral - g * (param - before);
}

template <typename F>
ALR_HOST_DEVICE F move_sq(F param, F start) {
  const F move = param - start;
  return move * move;
}

ALR_HOST_DEVICE bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// The importance, before it is set to 0 where it or the path integral is not finite.
template <typename F>
ALR_HOST_DEVICE F finalise(F path_integral, F move_sq, float floor) {
  // The denominator is 0 only where nothing moved and xi is relative: no scale, hence importance 0.
  const F denominator = move_sq + floor;
  const F positive = Number<F>::positive_part(path_integral);
  return denominator > 0.0f ? positive / denominator : F{};
}

// How two importances become one: a first + b second, or the larger; each product rounds by itself.
struct MergeRule {
  float first;
  float second;
  bool largest;
};

template <typename F>
ALR_HOST_DEVICE F merge(F a, F b, const MergeRule& rule) {
  if (rule.largest) {
    const F larger = a > b ? a : b;
    return a != a ? a : larger;  // NaN of either
  }
  return a * rule.first + b * rule.second;
}

// The power of two by which a block with this largest importance is multiplied before it is summed in
// float32: squares of 1e-25 are not representable, sums of 1e38 neither. `unscale` undoes it.
struct BlockUnit {
  float scale;
  double unscale;
};

ALR_HOST_DEVICE BlockUnit block_unit(float peak) {
  const int exponent = int(float_bits(peak) >> 23 & 0xffu);
  const int kept = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  const uint64_t bits = uint64_t(kept + 1023 - 127) << 52;
  double unscale;
  memcpy(&unscale, &bits, sizeof(unscale));
  return {bits_float<float>(uint32_t(254 - kept) << 23), unscale};
}

// Bin of the histogram that the upper byte of a float32 importance says: it is half the exponent.
constexpr int kBins = 64;
constexpr int kLowestByte = 32;

ALR_HOST_DEVICE int bin_of(int upper_byte) {
  const int bin = upper_byte > 127 ? 0 : upper_byte - kLowestByte;  // above 127: negative
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

// Sums over one chunk (later over one tensor) from which the statistics follow; all are float64, so
// that a count is exact and the order of the chunks, which is fixed, is all that rounding depends on.
struct Sums {
  double path_integral;
  double negative_mass;
  double importance;
  double importance_sq;
  double importance_max;
  double nonfinite;
};
constexpr int kSums = 6;

// NaN stays.
ALR_HOST_DEVICE double maximum(double most, double x) { return x > most || x != x ? x : most; }

ALR_HOST_DEVICE void add_sums(Sums& sums, const Sums& other) {
  sums.path_integral += other.path_integral;
  sums.negative_mass += other.negative_mass;
  sums.importance += other.importance;
  sums.importance_sq += other.importance_sq;
  sums.importance_max = maximum(sums.importance_max, other.importance_max);
  sums.nonfinite += other.nonfinite;
}

// Columns in the order of STATISTICS in alr_kernels/importance/statistics.py.
constexpr int kStatistics = 7;

ALR_HOST_DEVICE void write_statistics(double* row, const Sums& sums, int64_t numel) {
  row[0] = sums.path_integral;
  row[1] = sums.negative_mass;
  row[2] = sqrt(sums.importance_sq);
  row[3] = sums.importance_max;
  row[4] = sums.importance / double(numel > 1 ? numel : 1);
  row[5] = double(numel);
  row[6] = sums.nonfinite;
}

// Whether an element enters the sums; one that does not is counted, and its importance is 0.
ALR_HOST_DEVICE bool enters(float path_integral, float importance) {
  return is_finite(path_integral) && is_finite(importance);
}

// What an element adds to the mean move: one that is lost counts as unmoved.
ALR_HOST_DEVICE double kept_move_sq(float param, float start) {
  const float moved = move_sq(param, start);
  return double(moved <= FLT_MAX ? moved : 0.0f);
}

// xi, or in relative mode xi * mean(move_sq); in float64, rounded once.
ALR_HOST_DEVICE float relative_floor(double xi, double move_sq_sum, int64_t numel) {
  return numel == 0 ? 0.0f : float(xi * (move_sq_sum / double(numel)));
}

}  // namespace alr
