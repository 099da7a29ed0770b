// Loops of accumulate and finalise, and the bare conversions that tests look at. Compiled once per
// instruction set, with ALR_CPU_NAMESPACE naming the copy. No standard library code here: the
// linker could pick a copy of it that needs AVX for everyone.
#include "cpu.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

// Sums run in this many lanes whatever the vector width, so that every copy rounds alike.
constexpr int64_t kLanes = 8;

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

template <typename P>
double move_sq_sum_loop(const FinaliseTensor& t, int64_t begin, int64_t end) {
  const P* __restrict param = static_cast<const P*>(t.param);
  const P* __restrict start = static_cast<const P*>(t.start);
  double lanes[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] += double(move_sq(load(param[i + j]), load(start[i + j])));
  }
  for (int64_t j = 0; i < end; ++i, ++j) lanes[j] += double(move_sq(load(param[i]), load(start[i])));
  double sum = 0.0;
  for (int64_t j = 0; j < kLanes; ++j) sum += lanes[j];
  return sum;
}

// Sums per lane, one array a field, so that the lanes vectorise.
struct LaneSums {
  double path_integral[kLanes], negative_mass[kLanes], importance[kLanes], importance_sq[kLanes];
  double importance_max[kLanes], nonfinite[kLanes];
};

ALR_HOST_DEVICE Sums get_lane(const LaneSums& lanes, int64_t j) {
  return Sums{lanes.path_integral[j], lanes.negative_mass[j],  lanes.importance[j],
              lanes.importance_sq[j], lanes.importance_max[j], lanes.nonfinite[j]};
}

ALR_HOST_DEVICE void set_lane(LaneSums& lanes, int64_t j, const Sums& sums) {
  lanes.path_integral[j] = sums.path_integral;
  lanes.negative_mass[j] = sums.negative_mass;
  lanes.importance[j] = sums.importance;
  lanes.importance_sq[j] = sums.importance_sq;
  lanes.importance_max[j] = sums.importance_max;
  lanes.nonfinite[j] = sums.nonfinite;
}

template <typename P>
ALR_HOST_DEVICE void finalise_lane(const FinaliseTensor& t, float floor, int64_t i, LaneSums& lanes, int64_t j) {
  bool finite;
  const float move = move_sq(load(static_cast<const P*>(t.param)[i]), load(static_cast<const P*>(t.start)[i]));
  const float omega = t.path_integral[i];
  const float importance = finalise(omega, move, floor, finite);
  t.importance[i] = importance;
  Sums sums = get_lane(lanes, j);
  add_element(sums, omega, importance, finite);
  set_lane(lanes, j, sums);
}

template <typename P>
Sums finalise_loop(const FinaliseTensor& tensor, float floor, int64_t begin, int64_t end) {
  const FinaliseTensor t = tensor;
  LaneSums lanes = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) finalise_lane<P>(t, floor, i + j, lanes, j);
  }
  for (int64_t j = 0; i < end; ++i, ++j) finalise_lane<P>(t, floor, i, lanes, j);
  Sums sums = get_lane(lanes, 0);
  for (int64_t j = 1; j < kLanes; ++j) add_sums(sums, get_lane(lanes, j));
  return sums;
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

double move_sq_sum_range(const FinaliseTensor& t, int64_t begin, int64_t end) {
  switch (t.param_dtype) {
    case kFloat32: return move_sq_sum_loop<float>(t, begin, end);
    case kBFloat16: return move_sq_sum_loop<BFloat16>(t, begin, end);
    default: return move_sq_sum_loop<Float16>(t, begin, end);
  }
}

Sums finalise_range(const FinaliseTensor& t, float floor, int64_t begin, int64_t end) {
  switch (t.param_dtype) {
    case kFloat32: return finalise_loop<float>(t, floor, begin, end);
    case kBFloat16: return finalise_loop<BFloat16>(t, floor, begin, end);
    default: return finalise_loop<Float16>(t, floor, begin, end);
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
