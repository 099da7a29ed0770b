// The step's loop. Compiled once per instruction set, with ALR_CPU_NAMESPACE naming the copy.
// No standard library code here: the linker could pick a copy of it that needs AVX for everyone.
#include "cpu.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

template <typename P, typename G, bool kHasPenalty, int kMode, bool kRecord>
void step_loop(const StepTensor& t, const StepScalars& scalars, float grad_sign, int64_t begin, int64_t end) {
  P* __restrict param = static_cast<P*>(t.param);
  const G* __restrict grad = static_cast<const G*>(t.grad);
  float* __restrict exp_avg = t.exp_avg;
  float* __restrict exp_avg_sq = t.exp_avg_sq;
  const float* __restrict importance = t.importance;
  const P* __restrict anchor = static_cast<const P*>(t.anchor);
  float* __restrict path_integral = t.path_integral;
  const float curvature_scale = t.curvature_scale;
  const StepScalars s = scalars;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float before = load(param[i]);
    const float g = load(grad[i]) * grad_sign;
    float m = exp_avg[i], v = exp_avg_sq[i];
    const float omega = kHasPenalty ? importance[i] : 0.0f;
    const float target = kHasPenalty ? load(anchor[i]) : 0.0f;
    const P after = store<P>(step_element<kHasPenalty, kMode>(before, g, m, v, omega, target, curvature_scale, s));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = after;
    if (kRecord) path_integral[i] = record_element(path_integral[i], g, load(after), before);
  }
}

template <typename P, typename G, bool kHasPenalty, int kMode>
void step_record(const StepTensor& t, const StepScalars& s, const StepOptions& o, int64_t begin, int64_t end) {
  if (o.record) {
    step_loop<P, G, kHasPenalty, kMode, true>(t, s, o.grad_sign, begin, end);
  } else {
    step_loop<P, G, kHasPenalty, kMode, false>(t, s, o.grad_sign, begin, end);
  }
}

template <typename P, typename G>
void step_mode(const StepTensor& t, const StepScalars& s, const StepOptions& o, int64_t begin, int64_t end) {
  if (!o.has_penalty) {
    step_record<P, G, false, kCoupled>(t, s, o, begin, end);
  } else if (o.mode == kCoupled) {
    step_record<P, G, true, kCoupled>(t, s, o, begin, end);
  } else {
    step_record<P, G, true, kProximal>(t, s, o, begin, end);
  }
}

template <typename P>
void step_grad(const StepTensor& t, const StepScalars& s, const StepOptions& o, int64_t begin, int64_t end) {
  switch (t.grad_dtype) {
    case kFloat32: return step_mode<P, float>(t, s, o, begin, end);
    case kBFloat16: return step_mode<P, BFloat16>(t, s, o, begin, end);
    default: return step_mode<P, Float16>(t, s, o, begin, end);
  }
}

}  // namespace

void step_range(const StepTensor& t, const StepScalars& s, const StepOptions& o, int64_t begin, int64_t end) {
  switch (t.param_dtype) {
    case kFloat32: return step_grad<float>(t, s, o, begin, end);
    case kBFloat16: return step_grad<BFloat16>(t, s, o, begin, end);
    default: return step_grad<Float16>(t, s, o, begin, end);
  }
}

}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
