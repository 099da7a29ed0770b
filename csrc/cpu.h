// CPU kernels: what one tensor needs, the loops per instruction set, and the drivers over lists.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "codec_math.h"
#include "importance_math.h"
#include "step_math.h"

namespace alr {

constexpr int kMaxThreads = 1024;

// Elements a thread takes at a time: large enough to hide the cost of handing chunks out, small
// enough to balance a few threads over one tensor. Also the grain of finalise()'s partial sums.
constexpr int64_t kCpuChunk = 32768;

// How an operand is kept: DType, and
enum Format : int { kSplit = 3, kStochastic = 4, kCodes8 = 5, kCodes4 = 6 };

constexpr bool has_scales(int format) { return format == kCodes8 || format == kCodes4; }

// One format a role, for all tensors of a call.
struct StepFormats {
  int param;       // DType, kSplit (bf16 and int16 remainder) or kStochastic (bf16, rounded at random)
  int grad;        // DType
  int moments;     // kFloat32, kBFloat16 or kCodes8
  int importance;  // DType, kCodes8 or kCodes4
  int anchor;      // DType
};

struct StepTensor {
  void* param;                        // [numel], mutated
  int16_t* remainder;                 // [numel], mutated, or null unless params are split
  const void* grad;                   // [numel]
  void* exp_avg;                      // [numel], mutated
  void* exp_avg_sq;                   // [numel], mutated
  float* exp_avg_scales;              // [numel / kBlock], mutated, or null unless moments are codes
  float* exp_avg_sq_scales;           // [numel / kBlock], mutated, or null unless moments are codes
  const void* importance;             // [numel], 4-bit codes [numel / 2], or null without penalty
  const uint16_t* importance_scales;  // [numel / kBlock] bf16, or null unless importance is codes
  const void* anchor;                 // [numel], or null without penalty
  float* path_integral;               // [numel], mutated, or null without recording
  int64_t numel;                      // a multiple of kBlock where anything is codes
  int64_t offset;                     // global index of element 0, for the generator; a multiple of kBlock where moments are codes
  float curvature_scale;
  uint32_t key;  // of the random generator, in this step
  int scalars;   // index into the table of StepScalars
};

struct StepOptions {
  StepFormats formats;
  int mode;  // Mode
  bool precise;
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

// Importance as it is kept, in a DType or as codes.
struct Kept {
  void* values;      // [numel], 4-bit codes [numel / 2]; null where merge() has no such side
  uint16_t* scales;  // [numel / kBlock] bf16, or null unless values are codes
  int format;
};

struct FinaliseTensor {
  const float* path_integral;  // [numel]
  const void* param;           // [numel] param dtype
  const void* start;           // [numel] param dtype
  Kept importance;             // written
  int64_t numel;               // a multiple of kBlock where importance is codes
  int param_dtype;
};

struct MergeTensor {
  Kept first;
  Kept second;
  Kept importance;  // written
  int64_t numel;    // a multiple of kBlock where anything is codes
};

// The same loops, compiled once per instruction set; each works on elements [begin, end).
struct CpuKernels {
  // [0] fast, [1] precise; sums: [kStepStatistics], added to, or null.
  void (*step[2])(const StepTensor&, const StepScalars<float>&, const StepOptions&, int64_t begin, int64_t end,
                  double* sums);
  void (*accumulate)(const AccumulateTensor&, float grad_sign, int64_t begin, int64_t end);
  double (*move_sq_sum)(const FinaliseTensor&, int64_t begin, int64_t end);
  // counts: [kBins], added to.
  Sums (*finalise)(const FinaliseTensor&, float floor, int64_t begin, int64_t end, int64_t* counts);
  Sums (*merge)(const MergeTensor&, const MergeRule&, int64_t begin, int64_t end, int64_t* counts);
  void (*to_float)(const void* from, int dtype, float* to, int64_t numel);
  void (*from_float)(const float* from, void* to, int dtype, int64_t numel);
};

#define ALR_DECLARE_CPU_KERNELS(NAMESPACE)                                                          \
  namespace NAMESPACE {                                                                             \
  void step_range_fast(const StepTensor&, const StepScalars<float>&, const StepOptions&, int64_t,   \
                       int64_t, double*);                                                           \
  void step_range_precise(const StepTensor&, const StepScalars<float>&, const StepOptions&,         \
                          int64_t, int64_t, double*);                                               \
  void accumulate_range(const AccumulateTensor&, float, int64_t, int64_t);                          \
  double move_sq_sum_range(const FinaliseTensor&, int64_t, int64_t);                                \
  Sums finalise_range(const FinaliseTensor&, float, int64_t, int64_t, int64_t*);                    \
  Sums merge_range(const MergeTensor&, const MergeRule&, int64_t, int64_t, int64_t*);               \
  void to_float_range(const void*, int, float*, int64_t);                                           \
  void from_float_range(const float*, void*, int, int64_t);                                         \
  constexpr CpuKernels kKernels{{step_range_fast, step_range_precise},                              \
                                accumulate_range,                                                   \
                                move_sq_sum_range,                                                  \
                                finalise_range,                                                     \
                                merge_range,                                                        \
                                to_float_range,                                                     \
                                from_float_range};                                                  \
  }

ALR_DECLARE_CPU_KERNELS(cpu_default)
#if defined(ALR_CPU_X86)
ALR_DECLARE_CPU_KERNELS(cpu_avx2)
ALR_DECLARE_CPU_KERNELS(cpu_avx512)
#endif

// Drivers: one parallel region over the chunks of the whole list. Results depend neither on
// num_threads nor on the capability.
// `statistics`: [tensors, kStepStatistics], overwritten, or null.
void step_cpu(const std::vector<StepTensor>& tensors, const std::vector<StepScalars<float>>& scalars,
              const StepOptions& options, double* statistics, int num_threads);
void accumulate_cpu(const std::vector<AccumulateTensor>& tensors, float grad_sign, int num_threads);
// statistics: [tensors, kStatistics], histograms: [tensors, kBins]; both overwritten.
void finalise_cpu(const std::vector<FinaliseTensor>& tensors, double xi, bool relative, double* statistics,
                  int64_t* histograms, int num_threads);
void merge_cpu(const std::vector<MergeTensor>& tensors, const MergeRule& rule, double* statistics,
               int64_t* histograms, int num_threads);

const CpuKernels& cpu_kernels();
std::string cpu_capability();
void set_cpu_capability(const std::string& name);  // throws std::invalid_argument
std::vector<std::string> compiled_cpu_capabilities();
std::vector<std::string> detected_cpu_capabilities();

}  // namespace alr
