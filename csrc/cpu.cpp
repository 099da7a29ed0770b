// Which instruction set to use, and the parallel region over the chunks of a list of tensors.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace alr {
namespace {

struct Capability {
  const char* name;
  const CpuKernels* kernels;
};

// Best last.
constexpr Capability kCapabilities[] = {
    {"default", &cpu_default::kKernels},
#if defined(ALR_CPU_X86)
    {"avx2", &cpu_avx2::kKernels},
    {"avx512", &cpu_avx512::kKernels},
#endif
};
constexpr int kCapabilityCount = sizeof(kCapabilities) / sizeof(kCapabilities[0]);

bool detected(int index) {
#if defined(ALR_CPU_X86)
  if (index == 1) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (index == 2) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && detected(1);
  }
#endif
  return index == 0;
}

int best_capability() {
  int best = 0;
  for (int i = 1; i < kCapabilityCount; ++i) {
    if (detected(i)) best = i;
  }
  return best;
}

std::atomic<int>& current_capability() {
  static std::atomic<int> current{best_capability()};
  return current;
}

struct Chunk {
  int64_t begin;
  int64_t end;
  size_t tensor;
};

template <typename Tensor>
std::vector<Chunk> chunks_of(const std::vector<Tensor>& tensors) {
  std::vector<Chunk> chunks;
  size_t count = 0;
  for (const Tensor& t : tensors) count += size_t((t.numel + kCpuChunk - 1) / kCpuChunk);
  chunks.reserve(count);
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t begin = 0; begin < tensors[i].numel; begin += kCpuChunk) {
      chunks.push_back({begin, std::min(begin + kCpuChunk, tensors[i].numel), i});
    }
  }
  return chunks;
}

// Calls body(chunk index) for every chunk; waking a thread pays from about one chunk of work on.
template <typename Body>
void for_chunks(const std::vector<Chunk>& chunks, int num_threads, const Body& body) {
  int64_t total = 0;
  for (const Chunk& c : chunks) total += c.end - c.begin;
  const int64_t count = int64_t(chunks.size());
  const int threads = int(std::min<int64_t>({int64_t(num_threads), count, (total + kCpuChunk - 1) / kCpuChunk}));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(size_t(i));
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(dynamic)
#endif
  for (int64_t i = 0; i < count; ++i) body(size_t(i));
}

// Large outputs are fresh memory: in pages of 4 KiB their faults would take longer than all the rest.
void expect_writes(const Kept& kept, int64_t numel) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const int64_t bytes = kept.format == kFloat32 ? 4 * numel : kept.format == kCodes4 ? numel / 2
                        : kept.format == kCodes8 ? numel : 2 * numel;
  const uintptr_t address = reinterpret_cast<uintptr_t>(kept.values);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#else
  (void)kept, (void)numel;
#endif
}

// Calls body(chunk, counts) -> Sums for every chunk and writes what follows from all of a tensor's.
template <typename Tensor, typename Body>
void reduced(const std::vector<Tensor>& tensors, const std::vector<Chunk>& chunks, double* statistics,
             int64_t* histograms, int num_threads, const Body& body) {
  std::fill(histograms, histograms + tensors.size() * kBins, int64_t(0));
  for (const Tensor& t : tensors) expect_writes(t.importance, t.numel);
  std::vector<Sums> partials(chunks.size()), sums(tensors.size(), Sums{});
  for_chunks(chunks, num_threads, [&](size_t i) {
    int64_t counts[kBins] = {};
    partials[i] = body(chunks[i], counts);
    int64_t* row = histograms + chunks[i].tensor * kBins;
    for (int b = 0; b < kBins; ++b) {
      if (counts[b]) __atomic_fetch_add(row + b, counts[b], __ATOMIC_RELAXED);  // integers: any order will do
    }
  });
  for (size_t i = 0; i < chunks.size(); ++i) add_sums(sums[chunks[i].tensor], partials[i]);
  for (size_t i = 0; i < tensors.size(); ++i) write_statistics(statistics + i * kStatistics, sums[i], tensors[i].numel);
}

}  // namespace

const CpuKernels& cpu_kernels() { return *kCapabilities[current_capability().load(std::memory_order_relaxed)].kernels; }

std::string cpu_capability() { return kCapabilities[current_capability().load()].name; }

std::vector<std::string> compiled_cpu_capabilities() {
  std::vector<std::string> names;
  for (const Capability& c : kCapabilities) names.push_back(c.name);
  return names;
}

std::vector<std::string> detected_cpu_capabilities() {
  std::vector<std::string> names;
  for (int i = 0; i < kCapabilityCount; ++i) {
    if (detected(i)) names.push_back(kCapabilities[i].name);
  }
  return names;
}

void set_cpu_capability(const std::string& name) {
  std::string known;
  for (int i = 0; i < kCapabilityCount; ++i) {
    if (!detected(i)) continue;
    if (name == kCapabilities[i].name) {
      current_capability() = i;
      return;
    }
    known += std::string(known.empty() ? "" : ", ") + kCapabilities[i].name;
  }
  throw std::invalid_argument("cpu capability: expected one of " + known + " (what this CPU runs), got '" + name + "'");
}

void step_cpu(const std::vector<StepTensor>& tensors, const std::vector<StepScalars<float>>& scalars,
              const StepOptions& options, double* statistics, int num_threads) {
  const CpuKernels& kernels = cpu_kernels();
  const std::vector<Chunk> chunks = chunks_of(tensors);
  // Each chunk has its own sums, added up in order: the same whatever the number of threads.
  std::vector<double> partials(statistics ? chunks.size() * kStepStatistics : 0, 0.0);
  for_chunks(chunks, num_threads, [&](size_t i) {
    const StepTensor& t = tensors[chunks[i].tensor];
    double* sums = statistics ? &partials[i * kStepStatistics] : nullptr;
    kernels.step[options.precise](t, scalars[size_t(t.scalars)], options, chunks[i].begin, chunks[i].end, sums);
  });
  if (!statistics) return;
  std::fill(statistics, statistics + tensors.size() * kStepStatistics, 0.0);
  for (size_t i = 0; i < chunks.size(); ++i) {
    add_statistics(statistics + chunks[i].tensor * kStepStatistics, &partials[i * kStepStatistics]);
  }
  for (size_t i = 0; i < tensors.size(); ++i) statistics[i * kStepStatistics] *= 0.5;  // the penalty
}

void accumulate_cpu(const std::vector<AccumulateTensor>& tensors, float grad_sign, int num_threads) {
  const CpuKernels& kernels = cpu_kernels();
  const std::vector<Chunk> chunks = chunks_of(tensors);
  for_chunks(chunks, num_threads, [&](size_t i) {
    kernels.accumulate(tensors[chunks[i].tensor], grad_sign, chunks[i].begin, chunks[i].end);
  });
}

void finalise_cpu(const std::vector<FinaliseTensor>& tensors, double xi, bool relative, double* statistics,
                  int64_t* histograms, int num_threads) {
  const CpuKernels& kernels = cpu_kernels();
  const std::vector<Chunk> chunks = chunks_of(tensors);
  std::vector<float> floors(tensors.size(), float(xi));
  if (relative) {
    std::vector<double> partials(chunks.size()), move_sq_sums(tensors.size(), 0.0);
    for_chunks(chunks, num_threads, [&](size_t i) {
      partials[i] = kernels.move_sq_sum(tensors[chunks[i].tensor], chunks[i].begin, chunks[i].end);
    });
    for (size_t i = 0; i < chunks.size(); ++i) move_sq_sums[chunks[i].tensor] += partials[i];
    for (size_t i = 0; i < tensors.size(); ++i) floors[i] = relative_floor(xi, move_sq_sums[i], tensors[i].numel);
  }
  reduced(tensors, chunks, statistics, histograms, num_threads, [&](const Chunk& c, int64_t* counts) {
    return kernels.finalise(tensors[c.tensor], floors[c.tensor], c.begin, c.end, counts);
  });
}

void merge_cpu(const std::vector<MergeTensor>& tensors, const MergeRule& rule, double* statistics,
               int64_t* histograms, int num_threads) {
  const CpuKernels& kernels = cpu_kernels();
  reduced(tensors, chunks_of(tensors), statistics, histograms, num_threads, [&](const Chunk& c, int64_t* counts) {
    return kernels.merge(tensors[c.tensor], rule, c.begin, c.end, counts);
  });
}

}  // namespace alr
