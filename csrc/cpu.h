// CPU kernels: what one tensor needs, the loops per instruction set, and the drivers over lists.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "importance_math.h"
#include "step_math.h"

namespace alr {

constexpr int kMaxThreads = 1024;

// Elements a thread takes at a time: large enough to hide the cost of handing chunks out, small
// enough to balance a few threads over one tensor. Also the grain of finalise()'s partial sums.
constexpr int64_t kCpuChunk = 32768;

struct StepTensor {
  void* param;              // [numel] param dtype, mutated
  const void* grad;         // [numel] grad dtype
  float* exp_avg;           // [numel], mutated
  float* exp_avg_sq;        // [numel], mutated
  const float* importance;  // [numel], or null without penalty
  const void* anchor;       // [numel] param dtype, or null without penalty
  float* path_integral;     // [numel], mutated, or null without recording
  int64_t numel;
  float curvature_scale;
  int scalars;              // index into the table of StepScalars
  int param_dtype;
  int grad_dtype;
};

struct StepOptions {
  bool has_penalty;
  bool record;
  int mode;         // Mode
  float grad_sign;  // -1 to maximise: g * grad_sign is exact
};

struct AccumulateTensor {
  float* path_integral;  // [numel], mutated
  const void* grad;      // [numel] grad dtype
  const void* param;     // [numel] param dtype
  void* previous;        // [numel] param dtype, mutated
  int64_t numel;
  int param_dtype;
  int grad_dtype;
};

struct FinaliseTensor {
  const float* path_integral;  // [numel]
  const void* param;           // [numel] param dtype
  const void* start;           // [numel] param dtype
  float* importance;           // [numel], written
  int64_t numel;
  int param_dtype;
};

// The same loops, compiled once per instruction set; each works on elements [begin, end).
struct CpuKernels {
  void (*step)(const StepTensor&, const StepScalars&, const StepOptions&, int64_t begin, int64_t end);
  void (*accumulate)(const AccumulateTensor&, float grad_sign, int64_t begin, int64_t end);
  double (*move_sq_sum)(const FinaliseTensor&, int64_t begin, int64_t end);
  Sums (*finalise)(const FinaliseTensor&, float floor, int64_t begin, int64_t end);
  void (*to_float)(const void* from, int dtype, float* to, int64_t numel);
  void (*from_float)(const float* from, void* to, int dtype, int64_t numel);
};

#define ALR_DECLARE_CPU_KERNELS(NAMESPACE)                                                         \
  namespace NAMESPACE {                                                                            \
  void step_range(const StepTensor&, const StepScalars&, const StepOptions&, int64_t, int64_t);    \
  void accumulate_range(const AccumulateTensor&, float, int64_t, int64_t);                         \
  double move_sq_sum_range(const FinaliseTensor&, int64_t, int64_t);                               \
  Sums finalise_range(const FinaliseTensor&, float, int64_t, int64_t);                             \
  void to_float_range(const void*, int, float*, int64_t);                                          \
  void from_float_range(const float*, void*, int, int64_t);                                        \
  constexpr CpuKernels kKernels{step_range,     accumulate_range, move_sq_sum_range,               \
                                finalise_range, to_float_range,   from_float_range};               \
  }

ALR_DECLARE_CPU_KERNELS(cpu_default)
#if defined(ALR_CPU_X86)
ALR_DECLARE_CPU_KERNELS(cpu_avx2)
ALR_DECLARE_CPU_KERNELS(cpu_avx512)
#endif

// Drivers: one parallel region over the chunks of the whole list. Results depend neither on
// num_threads nor on the capability.
void step_cpu(const std::vector<StepTensor>& tensors, const std::vector<StepScalars>& scalars,
              const StepOptions& options, int num_threads);
void accumulate_cpu(const std::vector<AccumulateTensor>& tensors, float grad_sign, int num_threads);
void finalise_cpu(const std::vector<FinaliseTensor>& tensors, double xi, bool relative, double* statistics,
                  int num_threads);

const CpuKernels& cpu_kernels();
std::string cpu_capability();
void set_cpu_capability(const std::string& name);  // throws std::invalid_argument
std::vector<std::string> compiled_cpu_capabilities();
std::vector<std::string> detected_cpu_capabilities();

}  // namespace alr
