// One AdamW step with penalty and recording, per element. The same lines, in the same order, as
// alr_kernels/step/reference.py and alr_kernels/penalty.py; compiled without floating-point
// contraction so that all backends agree bit for bit. F is float or a vector of floats.
#pragma once

#include "common.h"

namespace alr {

enum Mode : int { kCoupled = 0, kProximal = 1, kPlain = 2 };  // kPlain: no penalty

// Scalars of one step; alr_kernels/step/plan.py computes the first eight in float64.
template <typename F>
struct StepScalars {
  F lr;
  F decay;  // 1 - lr * weight_decay
  F one_minus_beta1;
  F beta2;
  F one_minus_beta2;
  F eps;
  F step_size;        // lr / (1 - beta1^step)
  F rsqrt_bias2;      // 1 / sqrt(1 - beta2^step)
  F grad_scale;       // 1 / loss scale, negative to maximise
  F clip;             // of the gradient that Adam sees
  F curvature_scale;  // of the tensor: curvature / importance
};

// k = curvature_scale * importance, the second derivative of the penalty.
template <typename F>
ALR_HOST_DEVICE F curvature(F importance, F curvature_scale) {
  return importance * curvature_scale;
}

// dpenalty/dparam = k (param - anchor).
template <typename F>
ALR_HOST_DEVICE F penalty_gradient(F param, F anchor, F k) {
  return k * (param - anchor);
}

// argmin |x - h|^2_denom / (2 lr) + k (x - anchor)^2 / 2 with h = decayed - move / denom, from the nearer end.
template <typename F>
ALR_HOST_DEVICE F proximal(F decayed, F move, F anchor, F k, F lr, F denom) {
  const F t = k * lr;
  const F gap = decayed - anchor;
  const auto near_adam = t <= denom;
  F numerator = near_adam ? -(move + t * gap) : denom * gap - move;
  numerator = k == 0.0f ? -move : numerator;  // no bit of AdamW's step changes
  return (near_adam ? decayed : anchor) + numerator / (denom + t);
}

// What a step makes of one element, before anything is rounded to storage.
template <typename F>
struct Stepped {
  F exp_avg;
  F exp_avg_sq;
  F root;   // sqrt(exp_avg_sq)
  F denom;
  F param;
};

// `adam_grad` is the task gradient, unscaled, with maximize's sign, and clipped.
template <int kMode, typename F>
ALR_HOST_DEVICE Stepped<F> step_element(F before, F adam_grad, F exp_avg, F exp_avg_sq, F k, F anchor,
                                        const StepScalars<F>& s) {
  if (kMode == kCoupled) adam_grad = k == 0.0f ? adam_grad : adam_grad + penalty_gradient(before, anchor, k);
  Stepped<F> to;
  to.exp_avg = exp_avg + (adam_grad - exp_avg) * s.one_minus_beta1;
  to.exp_avg_sq = exp_avg_sq * s.beta2 + adam_grad * adam_grad * s.one_minus_beta2;
  to.root = Number<F>::square_root(to.exp_avg_sq);
  to.denom = to.root * s.rsqrt_bias2 + s.eps;
  const F decayed = before * s.decay, move = to.exp_avg * s.step_size;
  if (kMode == kProximal) {
    to.param = proximal(decayed, move, anchor, k, s.lr, to.denom);
  } else {
    to.param = decayed - move / to.denom;
  }
  return to;
}

// path_integral += -g (stored_after - before)
template <typename F>
ALR_HOST_DEVICE F record_element(F path_integral, F g, F stored_after, F before) {
  return path_integral - g * (stored_after - before);
}

// Columns in the order of STATISTICS in alr_kernels/step/plan.py: sums over elements, stiffness a maximum, and the
// penalty twice what it is until step_cpu() halves it.
constexpr int kStepStatistics = 6;
constexpr int kStiffness = 4;

template <typename F>
struct StepStatistics {
  F at[kStepStatistics];
};

template <int kMode, typename F>
ALR_HOST_DEVICE StepStatistics<F> statistics_element(F before, F g, F anchor, F k, F lr, F denom) {
  if (kMode == kPlain) return {{F{}, g * g}};
  const F drift = before - anchor, pull = k * drift;
  return {{pull * drift, g * g, pull * pull, g * pull, k * lr / denom, drift * drift}};
}

// The larger of two stiffnesses, which are positive or NaN: as bits, where NaN is the largest.
template <typename F>
ALR_HOST_DEVICE F stiffer(F known, F x) {
  const Int<F> a = Int<F>(float_bits(known)), b = Int<F>(float_bits(x) & 0x7fffffffu);
  return bits_float<F>(Bits<F>(a > b ? a : b));
}

// Adds sums of a part to those of the whole; a stiffness that is NaN stays.
ALR_HOST_DEVICE void add_statistics(double* known, const double* part) {
  const double most = part[kStiffness] <= known[kStiffness] ? known[kStiffness] : part[kStiffness];
  const double stiffness = known[kStiffness] != known[kStiffness] ? known[kStiffness] : most;
  for (int j = 0; j < kStepStatistics; ++j) known[j] += part[j];
  known[kStiffness] = stiffness;
}

}  // namespace alr
