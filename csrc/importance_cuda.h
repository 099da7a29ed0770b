// Host entry points of importance_cuda.cu. No CUDA type appears, so that module.cpp needs no toolkit.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu.h"

namespace alr {

// Both return after launching on `stream` of `device` and leave the current device as it was.
// They throw std::runtime_error with CUDA's text. Lists may mix dtypes.
void accumulate_cuda(const std::vector<AccumulateTensor>& tensors, float grad_sign, int device, void* stream);

// scratch: float64 on the device, at least finalise_cuda_scratch(numels) of them, overwritten.
// statistics: [n, 7] float64 on the device, written.
void finalise_cuda(const std::vector<FinaliseTensor>& tensors, double xi, bool relative, double* scratch,
                   double* statistics, int device, void* stream);

int64_t finalise_cuda_scratch(const std::vector<int64_t>& numels);

}  // namespace alr
