// What every formula header shares: host/device qualifier, storage types and their conversions.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ALR_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ALR_HOST_DEVICE inline __attribute__((always_inline))
#endif
