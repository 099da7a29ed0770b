// Jobs over threads, each thread with scratch memory of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu.h"

namespace alr {

constexpr double kWorthAThread = 1 << 18;  // multiply-adds

inline int threads_for(double work, int num_threads) {
  return int(std::min<double>({double(num_threads), double(kMaxThreads), work / kWorthAThread + 1.0}));
}

struct Scratch {
  explicit Scratch(int64_t floats) : memory(std::aligned_alloc(64, size_t((floats * 4 + 63) / 64 * 64))) {
    if (memory == nullptr && floats > 0) throw std::bad_alloc();
  }
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* memory;
};

// Calls body(job, scratch) for jobs [0, count); scratch: [floats] of the thread, aligned to 64 bytes. It may not throw.
template <typename Body>
void for_jobs(int64_t count, int threads, int64_t floats, const Body& body) {
  threads = int(std::min<int64_t>(threads, count));
  const int64_t stride = (floats + 15) / 16 * 16;
  const Scratch scratch(stride * std::max(threads, 1));  // allocated here: nothing may throw in the parallel region
  float* memory = static_cast<float*>(scratch.memory);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i, memory);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    float* own = memory + stride * omp_get_thread_num();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) body(i, own);
  }
#else
  for (int64_t i = 0; i < count; ++i) body(i, memory);
#endif
}

}  // namespace alr
