// Loops of finalise and merge, a block of importance at a time: it stays in the first cache until it
// is written in the form in which it is kept. Compiled once per instruction set, with
// ALR_CPU_NAMESPACE naming the copy. No standard library code here: the linker could pick a copy of it
// that needs AVX for everyone.
#include "block_cpu.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

template <typename P>
double move_sq_sum_loop(const FinaliseTensor& t, int64_t begin, int64_t end) {
  constexpr int kDoubles = 8;
  const P* __restrict param = static_cast<const P*>(t.param);
  const P* __restrict start = static_cast<const P*>(t.start);
  double lanes[kDoubles] = {};
  int64_t i = begin;
  for (; i + kDoubles <= end; i += kDoubles) {
#pragma omp simd
    for (int j = 0; j < kDoubles; ++j) lanes[j] += kept_move_sq(load(param[i + j]), load(start[i + j]));
  }
  for (int64_t j = 0; i < end; ++i, ++j) lanes[j] += kept_move_sq(load(param[i]), load(start[i]));
  double sum = 0.0;
  for (int j = 0; j < kDoubles; ++j) sum += lanes[j];
  return sum;
}

// Where a sum left float32, or an element is not finite.
template <typename P>
void finalise_block_slowly(const float* omega, const P* param, const P* start, float floor, float* to, Gathered& g) {
  for (int i = 0; i < kBlock; ++i) {
    const float importance = finalise(omega[i], move_sq(load(param[i]), load(start[i])), floor);
    const bool finite = enters(omega[i], importance);
    to[i] = finite ? importance : 0.0f;
    g.nonfinite += finite ? 0.0 : 1.0;
    const double kept = finite ? double(omega[i]) : 0.0;
    (kept < 0.0 ? g.negative : g.positive).lane[i % kHalf] += kept;
  }
}

// Writes the importance of one block to `to` and returns the largest.
template <typename P>
ALR_HOST_DEVICE float finalise_block(const float* omega, const P* param, const P* start, float floor, float* to,
                                    Gathered& g) {
  BlockSum positive{}, negative{};
  V peak{};
  for (int i = 0; i < kBlock; i += kSumLanes) {
    for (int part = 0; part < kParts; ++part) {
      const int at = i + part * kLanes;
      const V path_integral = load_float(omega + at);
      const V importance = finalise(path_integral, move_sq(load_as<P>(param + at), load_as<P>(start + at)), floor);
      store_float(to + at, importance);
      peak = larger(importance, peak);
      positive.part[part] += Number<V>::positive_part(path_integral);
      negative.part[part] += Number<V>::negative_part(path_integral);
    }
  }
  const HalfSum gained(positive), lost(negative);
  const float most = largest(peak);
  if (!is_finite(most) || !both_finite(gained, lost)) {
    finalise_block_slowly(omega, param, start, floor, to, g);
    return block_peak(to);
  }
  g.positive.add(gained, 1.0);
  g.negative.add(lost, 1.0);
  return most;
}

template <typename P>
void padded(const P* from, int numel, P* to) {
  for (int i = 0; i < kBlock; ++i) to[i] = i < numel ? from[i] : store<P>(0.0f);
}

template <typename P>
void finalise_loop(const FinaliseTensor& t, float floor, int64_t begin, int64_t end, Gathered& gathered) {
  const float* omega = t.path_integral;
  const P* param = static_cast<const P*>(t.param);
  const P* start = static_cast<const P*>(t.start);
  // A block is emitted after the next one is computed: the divisions of the one overlap with the rest of the other.
  alignas(64) float block[2][kBlock];
  float peaks[2];
  int now = 0;
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock, now ^= 1) {
    peaks[now] = finalise_block(omega + i, param + i, start + i, floor, block[now], gathered);
    if (i > begin) emit_block(block[now ^ 1], peaks[now ^ 1], t.importance, i - kBlock, int(kBlock), gathered);
  }
  if (i > begin) emit_block(block[now ^ 1], peaks[now ^ 1], t.importance, i - kBlock, int(kBlock), gathered);
  if (i == end) return;
  const int numel = int(end - i);
  float last_omega[kBlock];
  P last_param[kBlock], last_start[kBlock];
  padded(omega + i, numel, last_omega);
  padded(param + i, numel, last_param);
  padded(start + i, numel, last_start);
  peaks[0] = finalise_block(last_omega, last_param, last_start, floor, block[0], gathered);
  emit_block(block[0], peaks[0], t.importance, i, numel, gathered);
}

Sums finished(const Gathered& gathered, int64_t* counts) {
  for (int byte = 0; byte < 256; ++byte) counts[bin_of(byte)] += int64_t(int32_t(gathered.counts[byte]));
  return gathered.sums();
}

}  // namespace

double move_sq_sum_range(const FinaliseTensor& t, int64_t begin, int64_t end) {
  switch (t.param_dtype) {
    case kFloat32: return move_sq_sum_loop<float>(t, begin, end);
    case kBFloat16: return move_sq_sum_loop<BFloat16>(t, begin, end);
    default: return move_sq_sum_loop<Float16>(t, begin, end);
  }
}

Sums finalise_range(const FinaliseTensor& t, float floor, int64_t begin, int64_t end, int64_t* counts) {
  Gathered gathered{};
  switch (t.param_dtype) {
    case kFloat32: finalise_loop<float>(t, floor, begin, end, gathered); break;
    case kBFloat16: finalise_loop<BFloat16>(t, floor, begin, end, gathered); break;
    default: finalise_loop<Float16>(t, floor, begin, end, gathered); break;
  }
  return finished(gathered, counts);
}

Sums merge_range(const MergeTensor& t, const MergeRule& rule, int64_t begin, int64_t end, int64_t* counts) {
  Gathered gathered{};
  alignas(64) float first[kBlock], second[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int numel = int(end - i < kBlock ? end - i : kBlock);
    load_block(t.first, i, numel, first);
    load_block(t.second, i, numel, second);
    for (int j = 0; j < kBlock; j += kLanes) {
      store_float(first + j, merge(load_float(first + j), load_float(second + j), rule));
    }
    emit_block(first, block_peak(first), t.importance, i, numel, gathered);
  }
  return finished(gathered, counts);
}

}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
