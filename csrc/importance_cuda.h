// Host entry points of importance_cuda.cu and finalise_cuda.cu. No CUDA type appears, so that module.cpp
// needs no toolkit.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu.h"

namespace alr {

// All return after launching on a stream of a device and leave the current device as it was.
// They throw std::runtime_error with CUDA's text. Lists may mix dtypes and formats.
void accumulate_cuda(const std::vector<AccumulateTensor>& tensors, float grad_sign, int device, void* stream);

struct CudaOutputs {
  double* scratch;      // importance_cuda_scratch(numels) of them on the device, overwritten
  double* statistics;   // [n, 7] on the device, written
  int64_t* histograms;  // [n, 64] on the device, written
  int device;
  void* stream;
};

void finalise_cuda(const std::vector<FinaliseTensor>& tensors, double xi, bool relative, const CudaOutputs& out);
void merge_cuda(const std::vector<MergeTensor>& tensors, const MergeRule& rule, const CudaOutputs& out);

int64_t importance_cuda_scratch(const std::vector<int64_t>& numels);

}  // namespace alr
