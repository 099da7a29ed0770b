// Recording and finalising element-wise importance, per element. The same lines, in the same order,
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

ALR_HOST_DEVICE float move_sq(float param, float start) {
  const float move = param - start;
  return move * move;
}

ALR_HOST_DEVICE bool is_finite(float x) { return fabsf(x) <= FLT_MAX; }

// Returns the importance, 0 where it or the path integral is not finite; `finite` says which.
ALR_HOST_DEVICE float finalise(float path_integral, float move_sq, float floor, bool& finite) {
  // The denominator is 0 only where nothing moved and xi is relative: no scale, hence importance 0.
  const float denominator = move_sq + floor;
  const float importance = path_integral > 0.0f && denominator > 0.0f ? path_integral / denominator : 0.0f;
  finite = is_finite(path_integral) && is_finite(importance);
  return finite ? importance : 0.0f;
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

ALR_HOST_DEVICE void add_element(Sums& sums, float path_integral, float importance, bool finite) {
  const double omega = finite ? double(path_integral) : 0.0;
  const double wide = double(importance);
  sums.path_integral += omega;
  sums.negative_mass -= omega < 0.0 ? omega : 0.0;
  sums.importance += wide;
  sums.importance_sq += wide * wide;
  sums.importance_max = wide > sums.importance_max ? wide : sums.importance_max;
  sums.nonfinite += finite ? 0.0 : 1.0;
}

ALR_HOST_DEVICE void add_sums(Sums& sums, const Sums& other) {
  sums.path_integral += other.path_integral;
  sums.negative_mass += other.negative_mass;
  sums.importance += other.importance;
  sums.importance_sq += other.importance_sq;
  sums.importance_max = other.importance_max > sums.importance_max ? other.importance_max : sums.importance_max;
  sums.nonfinite += other.nonfinite;
}

// Columns in the order of STATISTICS in alr_kernels/importance/reference.py.
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

// xi, or in relative mode xi * mean(move_sq); in float64, rounded once.
ALR_HOST_DEVICE float relative_floor(double xi, double move_sq_sum, int64_t numel) {
  return numel == 0 ? 0.0f : float(xi * (move_sq_sum / double(numel)));
}

}  // namespace alr
