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

void bind_fisher(py::module_& m);  // fisher_module.cpp

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

  size_t size() const { return values_.size(); }

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

template <typename T>
T* address(const char* op, const char* name, uintptr_t value, bool needed) {
  if (value == 0 && needed) throw std::invalid_argument(std::string(op) + ": expected " + name + " to be an address, got 0");
  return reinterpret_cast<T*>(value);
}

void check_blocks(const char* op, const std::vector<int64_t>& numels) {
  for (int64_t numel : numels) {
    if (numel % kBlock) {
      throw std::invalid_argument(std::string(op) + ": expected multiples of " + std::to_string(kBlock) +
                                  " elements for codes, got " + std::to_string(numel));
    }
  }
}

// plan.StepScalars, then the gradient's scale and its clip.
using ScalarRow = std::array<double, 10>;

StepScalars<float> to_scalars(const ScalarRow& row) {
  return {float(row[0]), float(row[1]), float(row[2]), float(row[3]), float(row[4]), float(row[5]),
          float(row[6]), float(row[7]), float(row[8]), float(row[9]), 0.0f};
}

StepOptions step_options(const std::array<int, 5>& formats, int mode, bool precise) {
  const char* op = "step_";
  const StepFormats f{formats[0], formats[1], formats[2], formats[3], formats[4]};
  check_codes(op, "the format of params", {f.param}, kStochastic + 1);
  check_codes(op, "the format of grads", {f.grad}, kDTypes);
  check_codes(op, "the format of moments", {f.moments == kCodes8 ? 0 : f.moments}, kBFloat16 + 1);
  check_codes(op, "the format of importances", {has_scales(f.importance) ? 0 : f.importance}, kDTypes);
  check_codes(op, "the format of anchors", {f.anchor}, kDTypes);
  check_codes(op, "mode", {mode}, kPlain + 1);
  return StepOptions{f, mode, precise};
}

// In the order of plan.Operands.
enum Role { kParam, kGrad, kExpAvg, kExpAvgSq, kImportance, kAnchor, kPathIntegral, kRemainder, kExpAvgScale,
            kExpAvgSqScale, kImportanceScale, kRoles };
constexpr const char* kRoleNames[kRoles] = {
    "params",     "grads",          "exp_avgs",          "exp_avg_sqs",      "importances", "anchors", "path_integrals",
    "remainders", "exp_avg_scales", "exp_avg_sq_scales", "importance_scales"};

// One list a role, with an entry per tensor, or empty where the options do not use the role.
std::vector<Pointers> step_roles(const py::list& operands, const StepOptions& o, size_t n) {
  check_size("step_", "operands", kRoles, operands.size());
  const bool penalty = o.mode != kPlain, codes = o.formats.moments == kCodes8;
  const bool record = py::cast<py::list>(operands[kPathIntegral]).size() > 0;
  const bool used[kRoles] = {true,    true,   true,   true,  penalty,
                             penalty, record, o.formats.param == kSplit, codes, codes,
                             penalty && has_scales(o.formats.importance)};
  std::vector<Pointers> roles;
  for (int r = 0; r < kRoles; ++r) {
    roles.emplace_back("step_", kRoleNames[r], py::cast<py::list>(operands[size_t(r)]), used[r] ? n : 0);
  }
  return roles;
}

StepTensor step_tensor(const std::vector<Pointers>& roles, size_t i, int64_t numel) {
  const auto at = [&](Role role) { return roles[role].size() ? roles[role].at<void>(i, numel) : nullptr; };
  StepTensor t{};
  t.param = at(kParam);
  t.remainder = static_cast<int16_t*>(at(kRemainder));
  t.grad = at(kGrad);
  t.exp_avg = at(kExpAvg);
  t.exp_avg_sq = at(kExpAvgSq);
  t.exp_avg_scales = static_cast<float*>(at(kExpAvgScale));
  t.exp_avg_sq_scales = static_cast<float*>(at(kExpAvgSqScale));
  t.importance = at(kImportance);
  t.importance_scales = static_cast<const uint16_t*>(at(kImportanceScale));
  t.anchor = at(kAnchor);
  t.path_integral = static_cast<float*>(at(kPathIntegral));
  t.numel = numel;
  return t;
}

void step_(const py::list& operands, const std::vector<int64_t>& numels, const std::array<int, 5>& formats,
           const std::vector<double>& curvature_scales, const std::vector<uint32_t>& keys,
           const std::vector<ScalarRow>& scalars, const std::vector<int>& scalar_indices, int mode, bool precise,
           uintptr_t statistics, int num_threads) {
  const char* op = "step_";
  const size_t n = numels.size();
  const StepOptions options = step_options(formats, mode, precise);
  check_numels(op, numels);
  const bool penalty = mode != kPlain;
  if (options.formats.moments == kCodes8 || (penalty && has_scales(options.formats.importance))) check_blocks(op, numels);
  check_size(op, "curvature_scales", penalty ? n : 0, curvature_scales.size());
  check_size(op, "keys", n, keys.size());
  check_size(op, "scalar_indices", n, scalar_indices.size());
  check_codes(op, "scalar_indices", scalar_indices, int(scalars.size()));
  check_threads(op, num_threads);
  const std::vector<Pointers> roles = step_roles(operands, options, n);

  std::vector<StepTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    tensors[i] = step_tensor(roles, i, numels[i]);
    tensors[i].curvature_scale = penalty ? float(curvature_scales[i]) : 0.0f;
    tensors[i].key = keys[i];
    tensors[i].scalars = scalar_indices[i];
  }
  std::vector<StepScalars<float>> table;
  for (const ScalarRow& row : scalars) table.push_back(to_scalars(row));
  const py::gil_scoped_release release;
  step_cpu(tensors, table, options, reinterpret_cast<double*>(statistics), num_threads);
}

CodecTensor codec_tensor(const char* op, uintptr_t importance, int dtype, uintptr_t codes, uintptr_t scales,
                         int64_t numel, int bits, int num_threads) {
  check_codes(op, "dtype", {dtype}, kBFloat16 + 1);
  check_numels(op, {numel});
  check_blocks(op, {numel});
  if (bits != 8 && bits != 4) throw std::invalid_argument(std::string(op) + ": expected 8 or 4 bits, got " + std::to_string(bits));
  check_threads(op, num_threads);
  return {address<void>(op, "importance", importance, numel > 0), address<uint8_t>(op, "codes", codes, numel > 0),
          address<uint16_t>(op, "scales", scales, numel > 0), numel, dtype, bits};
}

void encode_importance_(uintptr_t importance, int dtype, uintptr_t codes, uintptr_t scales, int64_t numel, int bits,
                        int num_threads) {
  const CodecTensor t = codec_tensor("encode_importance", importance, dtype, codes, scales, numel, bits, num_threads);
  const py::gil_scoped_release release;
  encode_importance_cpu(t, num_threads);
}

void decode_importance_(uintptr_t codes, uintptr_t scales, uintptr_t importance, int64_t numel, int bits,
                        int num_threads) {
  const CodecTensor t =
      codec_tensor("decode_importance", importance, kFloat32, codes, scales, numel, bits, num_threads);
  const py::gil_scoped_release release;
  decode_importance_cpu(t, num_threads);
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
  m.def("step_", &alr::step_, "operands"_a, "numels"_a, "formats"_a, "curvature_scales"_a, "keys"_a, "scalars"_a,
        "scalar_indices"_a, "mode"_a, "precise"_a, "statistics"_a, "num_threads"_a);
  m.def("encode_importance", &alr::encode_importance_, "importance"_a, "dtype"_a, "codes"_a, "scales"_a, "numel"_a,
        "bits"_a, "num_threads"_a);
  m.def("decode_importance", &alr::decode_importance_, "codes"_a, "scales"_a, "importance"_a, "numel"_a, "bits"_a,
        "num_threads"_a);
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
  alr::bind_fisher(m);
  m.def("build_info", &alr::build_info);
  m.def("cpu_capability", &alr::cpu_capability);
  m.def("set_cpu_capability", &alr::set_cpu_capability, "name"_a);
  m.def("_to_float", &alr::to_float, "from_address"_a, "dtype"_a, "to_address"_a, "numel"_a);
  m.def("_from_float", &alr::from_float, "from_address"_a, "to_address"_a, "dtype"_a, "numel"_a);
}
