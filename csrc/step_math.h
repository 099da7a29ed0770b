// One AdamW step with penalty and recording, per element. The same lines, in the same order, as
// alr_kernels/step/reference.py and alr_kernels/penalty.py; compiled without floating-point
// contraction so that all backends agree bit for bit.
#pragma once

#include <cmath>

#include "common.h"
#include "importance_math.h"

namespace alr {

enum Mode : int { kCoupled = 0, kProximal = 1 };

// Scalars of one step; alr_kernels/step/plan.py computes them in float64.
struct StepScalars {
  float lr;
  float decay;             // 1 - lr * weight_decay
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  float step_size;         // lr / (1 - beta1^step)
  float rsqrt_bias2;       // 1 / sqrt(1 - beta2^step)
};

// k = curvature_scale * importance, the second derivative of the penalty.
ALR_HOST_DEVICE float curvature(float importance, float curvature_scale) {
  return importance * curvature_scale;
}

// dpenalty/dparam = k (param - anchor).
ALR_HOST_DEVICE float penalty_gradient(float param, float anchor, float k) {
  return k * (param - anchor);
}

// argmin |x - adam_point|^2_denom / (2 lr) + k (x - anchor)^2 / 2, evaluated from the nearer end.
ALR_HOST_DEVICE float proximal(float adam_point, float anchor, float k, float lr, float denom) {
  const float t = k * lr;
  const bool near_adam = t <= denom;
  const float weight = (near_adam ? t : denom) / (denom + t);
  const float near = near_adam ? adam_point : anchor;
  const float far = near_adam ? anchor : adam_point;
  return k == 0.0f ? adam_point : near + weight * (far - near);
}

// Updates exp_avg and exp_avg_sq and returns the new parameter before it is rounded to storage.
// `g` is the task gradient with maximize's sign.
template <bool kHasPenalty, int kMode>
ALR_HOST_DEVICE float step_element(float before, float g, float& exp_avg, float& exp_avg_sq,
                                   float importance, float anchor, float curvature_scale,
                                   const StepScalars& s) {
  float adam_grad = g;
  float k = 0.0f;
  if (kHasPenalty) {
    k = curvature(importance, curvature_scale);
    if (kMode == kCoupled) adam_grad = k == 0.0f ? g : g + penalty_gradient(before, anchor, k);
  }
  exp_avg = exp_avg + (adam_grad - exp_avg) * s.one_minus_beta1;
  exp_avg_sq = exp_avg_sq * s.beta2 + adam_grad * adam_grad * s.one_minus_beta2;
  const float denom = sqrtf(exp_avg_sq) * s.rsqrt_bias2 + s.eps;
  float after = before * s.decay - exp_avg * s.step_size / denom;
  if (kHasPenalty && kMode == kProximal) after = proximal(after, anchor, k, s.lr, denom);
  return after;
}

// path_integral += -g (stored_after - before)
ALR_HOST_DEVICE float record_element(float path_integral, float g, float stored_after, float before) {
  return accumulate(path_integral, g, stored_after, before);
}

}  // namespace alr
