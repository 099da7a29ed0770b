// Loops of accumulate, and the bare conversions that tests look at. Compiled once per
// instruction set, with ALR_CPU_NAMESPACE naming the copy. No standard library code here: the
// linker could pick a copy of it that needs AVX for everyone.
#include "cpu.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

template <typename P, typename G>
void accumulate_loop(const AccumulateTensor& t, float grad_sign, int64_t begin, int64_t end) {
  float* __restrict path_integral = t.path_integral;
  const G* __restrict grad = static_cast<const G*>(t.grad);
  const P* __restrict param = static_cast<const P*>(t.param);
  P* __restrict previous = static_cast<P*>(t.previous);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const P now = param[i];
    const float g = load(grad[i]) * grad_sign;
    path_integral[i] = accumulate(path_integral[i], g, load(now), load(previous[i]));
    previous[i] = now;
  }
}

template <typename P>
void accumulate_grad(const AccumulateTensor& t, float grad_sign, int64_t begin, int64_t end) {
  switch (t.grad_dtype) {
    case kFloat32: return accumulate_loop<P, float>(t, grad_sign, begin, end);
    case kBFloat16: return accumulate_loop<P, BFloat16>(t, grad_sign, begin, end);
    default: return accumulate_loop<P, Float16>(t, grad_sign, begin, end);
  }
}

template <typename T>
void to_float_loop(const void* from, float* __restrict to, int64_t numel) {
  const T* __restrict values = static_cast<const T*>(from);
#pragma omp simd
  for (int64_t i = 0; i < numel; ++i) to[i] = load(values[i]);
}

template <typename T>
void from_float_loop(const float* __restrict from, void* to, int64_t numel) {
  T* __restrict values = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = 0; i < numel; ++i) values[i] = store<T>(from[i]);
}

}  // namespace

void accumulate_range(const AccumulateTensor& t, float grad_sign, int64_t begin, int64_t end) {
  switch (t.param_dtype) {
    case kFloat32: return accumulate_grad<float>(t, grad_sign, begin, end);
    case kBFloat16: return accumulate_grad<BFloat16>(t, grad_sign, begin, end);
    default: return accumulate_grad<Float16>(t, grad_sign, begin, end);
  }
}

void to_float_range(const void* from, int dtype, float* to, int64_t numel) {
  switch (dtype) {
    case kFloat32: return to_float_loop<float>(from, to, numel);
    case kBFloat16: return to_float_loop<BFloat16>(from, to, numel);
    default: return to_float_loop<Float16>(from, to, numel);
  }
}

void from_float_range(const float* from, void* to, int dtype, int64_t numel) {
  switch (dtype) {
    case kFloat32: return from_float_loop<float>(from, to, numel);
    case kBFloat16: return from_float_loop<BFloat16>(from, to, numel);
    default: return from_float_loop<Float16>(from, to, numel);
  }
}

}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
