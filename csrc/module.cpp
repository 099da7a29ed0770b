// pybind11 module alr_kernels._C: raw pointers in, nothing of torch. Checks only what memory safety
// needs; alr_kernels/_validate.py has the messages for users.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_config.h"
#include "cpu.h"
#if ALR_CUDA_BUILD
#include "importance_cuda.h"
#endif

namespace py = pybind11;

namespace alr {
namespace {

std::string sized(const char* op, const char* name, size_t expected, size_t got) {
  return std::string(op) + ": expected " + name + " to hold " + std::to_string(expected) + " values, got " +
         std::to_string(got);
}

// One list of addresses, read straight from the Python ints.
class Pointers {
 public:
  Pointers(const char* op, const char* name, const py::list& list, size_t expected) : op_(op), name_(name) {
    if (list.size() != expected) throw std::invalid_argument(sized(op, name, expected, list.size()));
    values_.reserve(expected);
    for (size_t i = 0; i < expected; ++i) {
      void* value = PyLong_AsVoidPtr(PyList_GET_ITEM(list.ptr(), Py_ssize_t(i)));
      if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
      values_.push_back(value);
    }
  }

  template <typename T>
  T* at(size_t i, int64_t numel) const {
    if (values_[i] == nullptr && numel > 0) {
      throw std::invalid_argument(std::string(op_) + ": expected " + name_ + "[" + std::to_string(i) +
                                  "] to be an address, got 0 for " + std::to_string(numel) + " elements");
    }
    return static_cast<T*>(values_[i]);
  }

 private:
  const char* op_;
  const char* name_;
  std::vector<void*> values_;
};

void check_size(const char* op, const char* name, size_t expected, size_t got) {
  if (got != expected) throw std::invalid_argument(sized(op, name, expected, got));
}

void check_numels(const char* op, const std::vector<int64_t>& numels) {
  for (int64_t numel : numels) {
    if (numel < 0) {
      throw std::invalid_argument(std::string(op) + ": expected numels of 0 or more, got " + std::to_string(numel));
    }
  }
}

void check_codes(const char* op, const char* name, const std::vector<int>& codes, int end) {
  for (int code : codes) {
    if (code < 0 || code >= end) {
      throw std::invalid_argument(std::string(op) + ": expected " + name + " in [0, " + std::to_string(end) +
                                  "), got " + std::to_string(code));
    }
  }
}

void check_threads(const char* op, int num_threads) {
  if (num_threads < 1) {
    throw std::invalid_argument(std::string(op) + ": expected num_threads of 1 or more, got " +
                                std::to_string(num_threads));
  }
}

using ScalarRow = std::array<double, 8>;

StepScalars to_scalars(const ScalarRow& row) {
  return StepScalars{float(row[0]), float(row[1]), float(row[2]), float(row[3]),
                     float(row[4]), float(row[5]), float(row[6]), float(row[7])};
}

void step_(const py::list& params, const py::list& grads, const py::list& exp_avgs, const py::list& exp_avg_sqs,
           const py::list& importances, const py::list& anchors, const py::list& path_integrals,
           const std::vector<int64_t>& numels, const std::vector<int>& param_dtypes,
           const std::vector<int>& grad_dtypes, const std::vector<double>& curvature_scales,
           const std::vector<ScalarRow>& scalars, const std::vector<int>& scalar_indices, int mode, bool maximize,
           int num_threads) {
  const char* op = "step_";
  const size_t n = numels.size();
  const StepOptions options{importances.size() > 0, path_integrals.size() > 0, mode, maximize ? -1.0f : 1.0f};
  const size_t penalised = options.has_penalty ? n : 0;
  const Pointers param(op, "params", params, n), grad(op, "grads", grads, n), exp_avg(op, "exp_avgs", exp_avgs, n),
      exp_avg_sq(op, "exp_avg_sqs", exp_avg_sqs, n), importance(op, "importances", importances, penalised),
      anchor(op, "anchors", anchors, penalised),
      path_integral(op, "path_integrals", path_integrals, options.record ? n : 0);
  check_numels(op, numels);
  check_size(op, "param_dtypes", n, param_dtypes.size());
  check_size(op, "grad_dtypes", n, grad_dtypes.size());
  check_size(op, "curvature_scales", penalised, curvature_scales.size());
  check_size(op, "scalar_indices", n, scalar_indices.size());
  check_codes(op, "param_dtypes", param_dtypes, kDTypes);
  check_codes(op, "grad_dtypes", grad_dtypes, kDTypes);
  check_codes(op, "scalar_indices", scalar_indices, int(scalars.size()));
  check_codes(op, "mode", {mode}, kProximal + 1);
  check_threads(op, num_threads);

  std::vector<StepTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    const int64_t numel = numels[i];
    StepTensor& t = tensors[i];
    t = StepTensor{};
    t.param = param.at<void>(i, numel);
    t.grad = grad.at<void>(i, numel);
    t.exp_avg = exp_avg.at<float>(i, numel);
    t.exp_avg_sq = exp_avg_sq.at<float>(i, numel);
    if (options.has_penalty) {
      t.importance = importance.at<float>(i, numel);
      t.anchor = anchor.at<void>(i, numel);
      t.curvature_scale = float(curvature_scales[i]);
    }
    if (options.record) t.path_integral = path_integral.at<float>(i, numel);
    t.numel = numel;
    t.scalars = scalar_indices[i];
    t.param_dtype = param_dtypes[i];
    t.grad_dtype = grad_dtypes[i];
  }
  std::vector<StepScalars> table;
  for (const ScalarRow& row : scalars) table.push_back(to_scalars(row));
  const py::gil_scoped_release release;
  step_cpu(tensors, table, options, num_threads);
}

std::vector<AccumulateTensor> accumulate_tensors(const char* op, const py::list& path_integrals,
                                                 const py::list& grads, const py::list& params,
                                                 const py::list& previous, const std::vector<int64_t>& numels,
                                                 const std::vector<int>& param_dtypes,
                                                 const std::vector<int>& grad_dtypes) {
  const size_t n = numels.size();
  const Pointers path_integral(op, "path_integrals", path_integrals, n), grad(op, "grads", grads, n),
      param(op, "params", params, n), before(op, "previous", previous, n);
  check_numels(op, numels);
  check_size(op, "param_dtypes", n, param_dtypes.size());
  check_size(op, "grad_dtypes", n, grad_dtypes.size());
  check_codes(op, "param_dtypes", param_dtypes, kDTypes);
  check_codes(op, "grad_dtypes", grad_dtypes, kDTypes);
  std::vector<AccumulateTensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    const int64_t numel = numels[i];
    tensors.push_back({path_integral.at<float>(i, numel), grad.at<void>(i, numel), param.at<void>(i, numel),
                       before.at<void>(i, numel), numel, param_dtypes[i], grad_dtypes[i]});
  }
  return tensors;
}

std::vector<FinaliseTensor> finalise_tensors(const char* op, const py::list& path_integrals, const py::list& params,
                                             const py::list& starts, const py::list& importances,
                                             const std::vector<int64_t>& numels,
                                             const std::vector<int>& param_dtypes) {
  const size_t n = numels.size();
  const Pointers path_integral(op, "path_integrals", path_integrals, n), param(op, "params", params, n),
      start(op, "starts", starts, n), importance(op, "importances", importances, n);
  check_numels(op, numels);
  check_size(op, "param_dtypes", n, param_dtypes.size());
  check_codes(op, "param_dtypes", param_dtypes, kDTypes);
  std::vector<FinaliseTensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    const int64_t numel = numels[i];
    tensors.push_back({path_integral.at<float>(i, numel), param.at<void>(i, numel), start.at<void>(i, numel),
                       importance.at<float>(i, numel), numel, param_dtypes[i]});
  }
  return tensors;
}

template <typename T>
T* address(const char* op, const char* name, uintptr_t value, bool needed) {
  if (value == 0 && needed) throw std::invalid_argument(std::string(op) + ": expected " + name + " to be an address, got 0");
  return reinterpret_cast<T*>(value);
}

void accumulate_(const py::list& path_integrals, const py::list& grads, const py::list& params,
                 const py::list& previous, const std::vector<int64_t>& numels, const std::vector<int>& param_dtypes,
                 const std::vector<int>& grad_dtypes, bool maximize, int num_threads) {
  const auto tensors = accumulate_tensors("accumulate_", path_integrals, grads, params, previous, numels,
                                          param_dtypes, grad_dtypes);
  check_threads("accumulate_", num_threads);
  const py::gil_scoped_release release;
  accumulate_cpu(tensors, maximize ? -1.0f : 1.0f, num_threads);
}

void finalise_list(const py::list& path_integrals, const py::list& params, const py::list& starts,
                   const py::list& importances, const std::vector<int64_t>& numels,
                   const std::vector<int>& param_dtypes, double xi, bool relative, uintptr_t statistics,
                   int num_threads) {
  const auto tensors = finalise_tensors("finalise", path_integrals, params, starts, importances, numels, param_dtypes);
  double* rows = address<double>("finalise", "statistics", statistics, !tensors.empty());
  check_threads("finalise", num_threads);
  const py::gil_scoped_release release;
  finalise_cpu(tensors, xi, relative, rows, num_threads);
}

#if ALR_CUDA_BUILD
void accumulate_cuda_list(const py::list& path_integrals, const py::list& grads, const py::list& params,
                          const py::list& previous, const std::vector<int64_t>& numels,
                          const std::vector<int>& param_dtypes, const std::vector<int>& grad_dtypes, bool maximize,
                          int device, uintptr_t stream) {
  const auto tensors = accumulate_tensors("accumulate_cuda", path_integrals, grads, params, previous, numels,
                                          param_dtypes, grad_dtypes);
  const py::gil_scoped_release release;
  accumulate_cuda(tensors, maximize ? -1.0f : 1.0f, device, reinterpret_cast<void*>(stream));
}

void finalise_cuda_list(const py::list& path_integrals, const py::list& params, const py::list& starts,
                        const py::list& importances, const std::vector<int64_t>& numels,
                        const std::vector<int>& param_dtypes, double xi, bool relative, uintptr_t scratch,
                        int64_t scratch_numel, uintptr_t statistics, int device, uintptr_t stream) {
  const char* op = "finalise_cuda";
  const auto tensors = finalise_tensors(op, path_integrals, params, starts, importances, numels, param_dtypes);
  const int64_t needed = finalise_cuda_scratch(numels);
  if (scratch_numel < needed) throw std::invalid_argument(sized(op, "scratch", size_t(needed), size_t(scratch_numel)));
  double* partials = address<double>(op, "scratch", scratch, needed > 0);
  double* rows = address<double>(op, "statistics", statistics, !tensors.empty());
  const py::gil_scoped_release release;
  finalise_cuda(tensors, xi, relative, partials, rows, device, reinterpret_cast<void*>(stream));
}
#endif

void to_float(uintptr_t from, int dtype, uintptr_t to, int64_t numel) {
  check_codes("_to_float", "dtype", {dtype}, kDTypes);
  check_numels("_to_float", {numel});
  cpu_kernels().to_float(address<void>("_to_float", "from", from, numel > 0), dtype,
                         address<float>("_to_float", "to", to, numel > 0), numel);
}

void from_float(uintptr_t from, uintptr_t to, int dtype, int64_t numel) {
  check_codes("_from_float", "dtype", {dtype}, kDTypes);
  check_numels("_from_float", {numel});
  cpu_kernels().from_float(address<float>("_from_float", "from", from, numel > 0),
                           address<void>("_from_float", "to", to, numel > 0), dtype, numel);
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
  info["cplusplus"] = long(__cplusplus);
  info["cpu_capabilities_compiled"] = compiled_cpu_capabilities();
  info["cpu_capabilities_detected"] = detected_cpu_capabilities();
  info["cpu_capability"] = cpu_capability();
#if defined(_OPENMP)
  info["openmp"] = int(_OPENMP);
#else
  info["openmp"] = py::none();
#endif
  info["cuda"] = bool(ALR_CUDA_BUILD);
  info["cuda_toolkit"] = ALR_CUDA_BUILD ? py::object(py::str(ALR_CUDA_TOOLKIT)) : py::object(py::none());
  info["cuda_architectures"] = py::str(ALR_CUDA_ARCHITECTURES).attr("split")();
  info["cuda_missing_reason"] = ALR_CUDA_BUILD ? py::object(py::none()) : py::object(py::str(ALR_CUDA_MISSING));
  return info;
}

}  // namespace
}  // namespace alr

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.doc() = "Torch-free native kernels: raw addresses, element counts and dtype codes (0 fp32, 1 bf16, 2 fp16).";
  m.def("step_", &alr::step_, "params"_a, "grads"_a, "exp_avgs"_a, "exp_avg_sqs"_a, "importances"_a, "anchors"_a,
        "path_integrals"_a, "numels"_a, "param_dtypes"_a, "grad_dtypes"_a, "curvature_scales"_a, "scalars"_a,
        "scalar_indices"_a, "mode"_a, "maximize"_a, "num_threads"_a);
  m.def("accumulate_", &alr::accumulate_, "path_integrals"_a, "grads"_a, "params"_a, "previous"_a, "numels"_a,
        "param_dtypes"_a, "grad_dtypes"_a, "maximize"_a, "num_threads"_a);
  m.def("finalise", &alr::finalise_list, "path_integrals"_a, "params"_a, "starts"_a, "importances"_a, "numels"_a,
        "param_dtypes"_a, "xi"_a, "relative"_a, "statistics"_a, "num_threads"_a);
#if ALR_CUDA_BUILD
  m.def("accumulate_cuda", &alr::accumulate_cuda_list, "path_integrals"_a, "grads"_a, "params"_a, "previous"_a,
        "numels"_a, "param_dtypes"_a, "grad_dtypes"_a, "maximize"_a, "device"_a, "stream"_a);
  m.def("finalise_cuda", &alr::finalise_cuda_list, "path_integrals"_a, "params"_a, "starts"_a, "importances"_a,
        "numels"_a, "param_dtypes"_a, "xi"_a, "relative"_a, "scratch"_a, "scratch_numel"_a, "statistics"_a,
        "device"_a, "stream"_a);
  m.def("finalise_cuda_scratch", &alr::finalise_cuda_scratch, "numels"_a);
#endif
  m.def("build_info", &alr::build_info);
  m.def("cpu_capability", &alr::cpu_capability);
  m.def("set_cpu_capability", &alr::set_cpu_capability, "name"_a);
  m.def("_to_float", &alr::to_float, "from_address"_a, "dtype"_a, "to_address"_a, "numel"_a);
  m.def("_from_float", &alr::from_float, "from_address"_a, "to_address"_a, "dtype"_a, "numel"_a);
}
