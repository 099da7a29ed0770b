// The part of alr_kernels._C for importance from per-sample gradients; checks only what memory safety needs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_config.h"
#include "fisher.h"

namespace py = pybind11;

namespace alr {
namespace {

void expect(bool good, const char* name, const char* expected, long long got) {
  if (good) return;
  throw std::invalid_argument(std::string("fisher_linear_: expected ") + name + " " + expected + ", got " +
                              std::to_string(got));
}

FisherTensor fisher_tensor(uintptr_t importance, uintptr_t deltas, uintptr_t inputs, int64_t samples, int64_t tokens,
                           int64_t rows, int64_t columns, double scale, int dtype, int power) {
  expect(samples >= 0, "samples", "of 0 or more", samples);
  expect(tokens >= 0, "tokens", "of 0 or more", tokens);
  expect(rows >= 0, "rows", "of 0 or more", rows);
  expect(columns >= 0, "columns", "of 0 or more", columns);
  expect(dtype >= 0 && dtype < kDTypes, "dtype", "in [0, 3)", dtype);
  expect(power == 1 || power == 2, "power", "of 1 or 2", power);
  const bool some = samples && tokens && rows && columns;
  expect(!some || importance, "importance", "to be an address", 0);
  expect(!some || deltas, "deltas", "to be an address", 0);
  expect(!some || inputs, "inputs", "to be an address", 0);
  return {reinterpret_cast<float*>(importance), reinterpret_cast<const void*>(deltas),
          reinterpret_cast<const void*>(inputs), samples, tokens, rows, columns, float(scale), dtype, power};
}

void fisher_linear(uintptr_t importance, uintptr_t deltas, uintptr_t inputs, int64_t samples, int64_t tokens,
                   int64_t rows, int64_t columns, double scale, int dtype, int power, int num_threads) {
  const FisherTensor t =
      fisher_tensor(importance, deltas, inputs, samples, tokens, rows, columns, scale, dtype, power);
  expect(num_threads >= 1, "num_threads", "of 1 or more", num_threads);
  const py::gil_scoped_release release;
  fisher_linear_cpu(t, num_threads);
}

#if ALR_CUDA_BUILD
void fisher_linear_on_cuda(uintptr_t importance, uintptr_t deltas, uintptr_t inputs, int64_t samples, int64_t tokens,
                           int64_t rows, int64_t columns, double scale, int dtype, int power, int device,
                           uintptr_t stream) {
  const FisherTensor t =
      fisher_tensor(importance, deltas, inputs, samples, tokens, rows, columns, scale, dtype, power);
  const py::gil_scoped_release release;
  fisher_linear_cuda(t, device, reinterpret_cast<void*>(stream));
}
#endif

}  // namespace

void bind_fisher(py::module_& m) {
  using namespace py::literals;
  m.def("fisher_linear_", &fisher_linear, "importance"_a, "deltas"_a, "inputs"_a, "samples"_a, "tokens"_a, "rows"_a,
        "columns"_a, "scale"_a, "dtype"_a, "power"_a, "num_threads"_a);
#if ALR_CUDA_BUILD
  m.def("fisher_linear_cuda", &fisher_linear_on_cuda, "importance"_a, "deltas"_a, "inputs"_a, "samples"_a, "tokens"_a,
        "rows"_a, "columns"_a, "scale"_a, "dtype"_a, "power"_a, "device"_a, "stream"_a);
#endif
}

}  // namespace alr
