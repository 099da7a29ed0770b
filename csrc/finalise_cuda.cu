// finalise and merge on NVIDIA GPUs, into any format.
//
// Sixteen threads hold one block of 128. Sums are float64: per thread, then a tree per CUDA block, then a
// tree over the chunks of a tensor; their order depends on the sizes alone, so results repeat exactly.
#include "reduce_cuda.cuh"

namespace alr {
namespace {

constexpr int kGroup = int(kBlock) / kPack;  // threads that share a block of importance
static_assert(32 % kGroup == 0 && kCudaChunk % kBlock == 0, "a block of importance lies within one warp");

template <typename P>
__global__ void __launch_bounds__(kThreads)
move_sq_kernel(const __grid_constant__ Table table,  // param P, start P
               double* partials) {                   // [chunks of the call], written
  const BlockChunk chunk = find_chunk(table);
  const P* param = operand<P>(table, 1, chunk);
  const P* start = operand<P>(table, 2, chunk);

  double mine = 0.0;
  const int64_t packed = aligned(param) && aligned(start) ? chunk.numel / kPack * kPack : 0;
  for (int64_t i = int64_t(threadIdx.x) * kPack; i < packed; i += kThreads * kPack) {
    const Pack<P> end = Pack<P>::read(param + i);
    const Pack<P> begin = Pack<P>::read(start + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) mine += kept_move_sq(load(end.at[j]), load(begin.at[j]));
  }
  for (int64_t i = packed + threadIdx.x; i < chunk.numel; i += kThreads) {
    mine += kept_move_sq(load(param[i]), load(start[i]));
  }
  const double sum = block_sum(mine);
  if (threadIdx.x == 0) partials[table.first_chunks[0] + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
floor_kernel(const __grid_constant__ Table table,
             const double* partials,  // [chunks of the call], from move_sq_kernel
             double* floors,          // [tensors of the call], written
             double xi) {
  const double sum = tensor_sum(table, partials);
  if (threadIdx.x == 0) floors[table.rows[blockIdx.x]] = relative_floor(xi, sum, table.numels[blockIdx.x]);
}

struct Gathered {
  Sums sums;
  unsigned lowest;
};

template <typename T>
__device__ __forceinline__ Pack<T> read_pack(const T* from, int numel, bool vector) {
  if (vector && numel == kPack) return Pack<T>::read(from);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kPack; ++j) pack.at[j] = j < numel ? from[j] : T(0);
  return pack;
}

template <typename T>
__device__ __forceinline__ void write_pack(const float* x, T* to, int numel) {
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kPack; ++j) pack.at[j] = store<T>(x[j]);
  if (aligned(to) && numel == kPack) return pack.write(to);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    if (j < numel) to[j] = pack.at[j];
  }
}

// The largest of the group's floats, to each of its threads; NaN where one is.
__device__ __forceinline__ float group_peak(const float* x) {
  float peak = x[0];
#pragma unroll
  for (int j = 1; j < kPack; ++j) peak = x[j] > peak || x[j] != x[j] ? x[j] : peak;
#pragma unroll
  for (int width = kGroup / 2; width > 0; width /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, peak, width);
    peak = other > peak || other != other ? other : peak;
  }
  return peak;
}

template <int kBits>
struct Thresholds {
  __device__ __forceinline__ float operator()(int32_t code) const { return next_threshold<kBits, float>(code); }
};

template <int kBits>
__device__ __forceinline__ void write_codes(const float* x, float peak, uint8_t* to) {
  const float factor = inverse(from_bfloat16<float>(importance_scale(peak)));
  uint32_t words[kBits * kPack / 32] = {};
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const float kept = is_finite(peak) ? x[j] : tamed(x[j], peak);
    const uint32_t code = uint32_t(encode_importance<kBits>(kept * factor, Thresholds<kBits>{})) & ((1u << kBits) - 1u);
    words[j * kBits / 32] |= code << (j * kBits % 32);
  }
  if (reinterpret_cast<uintptr_t>(to) % sizeof(words) == 0) {
    memcpy(__builtin_assume_aligned(to, sizeof(words)), words, sizeof(words));
  } else {
#pragma unroll
    for (int j = 0; j < int(sizeof(words)); ++j) to[j] = uint8_t(words[j / 4] >> (j % 4 * 8));
  }
}

// Writes `numel` of eight importances, those from element `at` of their tensor on, and gathers what its statistics need.
// Every thread of a warp calls it together.
template <int kFormat>
__device__ __forceinline__ void emit(const float* x, int numel, void* values, uint16_t* scales, int64_t at, Counts& counts,
                                     Gathered& gathered) {
  const float peak = group_peak(x);
  const BlockUnit unit = block_unit(peak);
  float sum = 0.0f, square = 0.0f;
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const float scaled = x[j] * unit.scale;
    sum += scaled;
    square += scaled * scaled;
    const int bin = bin_of(int(float_bits(x[j]) >> 24));
    if (j >= numel) continue;
    if (bin == 0) {
      ++gathered.lowest;
    } else {
      atomicAdd(&counts.at[threadIdx.x / 32][bin], 1u);
    }
  }
  gathered.sums.importance += double(sum) * unit.unscale;
  gathered.sums.importance_sq += double(square) * (unit.unscale * unit.unscale);
  gathered.sums.importance_max = maximum(gathered.sums.importance_max, double(peak));
  if (numel <= 0) return;
  if constexpr (kFormat == kFloat32) write_pack(x, static_cast<float*>(values) + at, numel);
  if constexpr (kFormat == kBFloat16) write_pack(x, static_cast<BFloat16*>(values) + at, numel);
  if constexpr (kFormat == kFloat16) write_pack(x, static_cast<Float16*>(values) + at, numel);
  if constexpr (kFormat == kCodes8) write_codes<8>(x, peak, static_cast<uint8_t*>(values) + code_byte(at, 8));
  if constexpr (kFormat == kCodes4) write_codes<4>(x, peak, static_cast<uint8_t*>(values) + code_byte(at, 4));
  if constexpr (kFormat == kCodes8 || kFormat == kCodes4) {
    if (at % kBlock == 0) scales[scale_index(at)] = importance_scale(peak);
  }
}

struct Results {
  Sums* partials;                  // [chunks of the call], written
  unsigned long long* histograms;  // [tensors of the call, kBins], added to
};

__device__ __forceinline__ void finish(const Table& table, int tensor, Counts& counts, const Gathered& gathered,
                                       const Results& results) {
  counts.write(gathered.lowest, results.histograms + int64_t(table.rows[tensor]) * kBins);
  const Sums sums = block_sum(gathered.sums);
  if (threadIdx.x == 0) results.partials[table.first_chunks[0] + blockIdx.x] = sums;
}

template <typename P, int kFormat>
__global__ void __launch_bounds__(kThreads)
finalise_kernel(const __grid_constant__ Table table,  // path_integral fp32, param P, start P, values and scales written
                Results results,
                const double* floors,  // [tensors of the call], or null for xi
                float xi) {
  __shared__ Counts counts;
  counts.clear();
  const BlockChunk chunk = find_chunk(table);
  const float* path_integral = operand<const float>(table, 0, chunk);
  const P* param = operand<const P>(table, 1, chunk);
  const P* start = operand<const P>(table, 2, chunk);
  const float floor = floors == nullptr ? xi : float(floors[table.rows[chunk.tensor]]);
  const bool vector = aligned(path_integral) && aligned(param) && aligned(start);

  Gathered gathered{};
  for (int round = 0; round * kRound < chunk.numel; ++round) {  // together: threads beyond the end hold zeros
    const int64_t i = pack_begin(round, int(threadIdx.x));
    const int numel = pack_numel(chunk.numel, i);
    const Pack<float> omega = read_pack(path_integral + i, numel, vector);
    const Pack<P> end = read_pack(param + i, numel, vector);
    const Pack<P> begin = read_pack(start + i, numel, vector);
    float x[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const float importance = finalise(omega.at[j], move_sq(load(end.at[j]), load(begin.at[j])), floor);
      const bool finite = enters(omega.at[j], importance);
      x[j] = finite ? importance : 0.0f;
      const double wide = finite ? double(omega.at[j]) : 0.0;
      gathered.sums.path_integral += wide;
      gathered.sums.negative_mass -= wide < 0.0 ? wide : 0.0;
      gathered.sums.nonfinite += finite ? 0.0 : 1.0;
    }
    emit<kFormat>(x, numel, table.pointers[3][chunk.tensor], static_cast<uint16_t*>(table.pointers[4][chunk.tensor]),
                  chunk.begin + i, counts, gathered);
  }
  finish(table, chunk.tensor, counts, gathered, results);
}

template <typename T>
__device__ __forceinline__ void widen(const void* values, int64_t at, int numel, float* x) {
  const T* from = static_cast<const T*>(values) + at;
  const Pack<T> pack = read_pack(from, numel, aligned(from));
#pragma unroll
  for (int j = 0; j < kPack; ++j) x[j] = load(pack.at[j]);
}

template <int kBits>
__device__ __forceinline__ void decode(const void* values, const uint16_t* scales, int64_t at, float* x) {
  const uint8_t* from = static_cast<const uint8_t*>(values) + code_byte(at, kBits);
  const float scale = from_bfloat16<float>(scales[scale_index(at)]) * importance_unit(kBits);
  uint32_t words[kBits * kPack / 32];
  if (reinterpret_cast<uintptr_t>(from) % sizeof(words) == 0) {
    memcpy(words, __builtin_assume_aligned(from, sizeof(words)), sizeof(words));
  } else {
#pragma unroll
    for (int w = 0; w < int(sizeof(words)) / 4; ++w) {
      words[w] = from[4 * w] | from[4 * w + 1] << 8 | from[4 * w + 2] << 16 | uint32_t(from[4 * w + 3]) << 24;
    }
  }
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    const uint32_t code = words[j * kBits / 32] >> (j * kBits % 32) & ((1u << kBits) - 1u);
    x[j] = fourth_power(float(code), scale);
  }
}

// Eight importances of one side; 0 beyond `numel` and where there is no such side.
__device__ __forceinline__ void read_kept(const Table& table, int side, int tensor, int64_t at, int numel, float* x) {
  const void* values = table.pointers[2 * side][tensor];
  const uint16_t* scales = static_cast<const uint16_t*>(table.pointers[2 * side + 1][tensor]);
#pragma unroll
  for (int j = 0; j < kPack; ++j) x[j] = 0.0f;
  if (values == nullptr || numel <= 0) return;
  switch (table.formats[side][tensor]) {
    case kFloat32: return widen<float>(values, at, numel, x);
    case kBFloat16: return widen<BFloat16>(values, at, numel, x);
    case kFloat16: return widen<Float16>(values, at, numel, x);
    case kCodes8: return decode<8>(values, scales, at, x);
    default: return decode<4>(values, scales, at, x);
  }
}

template <int kFormat>
__global__ void __launch_bounds__(kThreads)
merge_kernel(const __grid_constant__ Table table,  // values and scales of either side; values and scales written
             Results results,
             MergeRule rule) {
  __shared__ Counts counts;
  counts.clear();
  const BlockChunk chunk = find_chunk(table);
  Gathered gathered{};
  for (int round = 0; round * kRound < chunk.numel; ++round) {
    const int64_t i = pack_begin(round, int(threadIdx.x)), at = chunk.begin + i;
    const int numel = pack_numel(chunk.numel, i);
    float x[kPack], other[kPack];
    read_kept(table, 0, chunk.tensor, at, numel, x);
    read_kept(table, 1, chunk.tensor, at, numel, other);
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[j] = j < numel ? merge(x[j], other[j], rule) : 0.0f;
    emit<kFormat>(x, numel, table.pointers[4][chunk.tensor], static_cast<uint16_t*>(table.pointers[5][chunk.tensor]), at,
                  counts, gathered);
  }
  finish(table, chunk.tensor, counts, gathered, results);
}

__global__ void __launch_bounds__(kThreads)
statistics_kernel(const __grid_constant__ Table table,
                  const Sums* partials,  // [chunks of the call], from finalise_kernel or merge_kernel
                  double* statistics) {  // [tensors of the call, 7], written
  const Sums sums = tensor_sum(table, partials);
  if (threadIdx.x == 0) {
    write_statistics(statistics + int64_t(table.rows[blockIdx.x]) * kStatistics, sums, table.numels[blockIdx.x]);
  }
}

template <>
void set_operands(Table& table, int at, const FinaliseTensor& t) {
  table.pointers[0][at] = const_cast<float*>(t.path_integral);
  table.pointers[1][at] = const_cast<void*>(t.param);
  table.pointers[2][at] = const_cast<void*>(t.start);
  table.pointers[3][at] = t.importance.values;
  table.pointers[4][at] = t.importance.scales;
}

template <>
void set_operands(Table& table, int at, const MergeTensor& t) {
  const Kept* kept[] = {&t.first, &t.second, &t.importance};
  for (int i = 0; i < 3; ++i) {
    table.pointers[2 * i][at] = kept[i]->values;
    table.pointers[2 * i + 1][at] = kept[i]->scales;
  }
  table.formats[0][at] = int8_t(t.first.format);
  table.formats[1][at] = int8_t(t.second.format);
}

template <>
int launch_key(const FinaliseTensor& t) { return t.param_dtype * kKeys + t.importance.format; }
template <>
int launch_key(const MergeTensor& t) { return t.importance.format; }

template <int kFormat>
using Format_ = std::integral_constant<int, kFormat>;

// Calls launch(std::integral_constant of the format).
template <typename Body>
void with_format(int format, const Body& launch) {
  switch (format) {
    case kFloat32: return launch(Format_<kFloat32>{});
    case kBFloat16: return launch(Format_<kBFloat16>{});
    case kFloat16: return launch(Format_<kFloat16>{});
    case kCodes8: return launch(Format_<kCodes8>{});
    default: return launch(Format_<kCodes4>{});
  }
}

template <typename P>
void launch_finalise(const Launch& launch, double xi, double* floors, const Results& results, cudaStream_t stream) {
  if (floors != nullptr) {
    double* sums = reinterpret_cast<double*>(results.partials);
    if (launch.blocks > 0) move_sq_kernel<P><<<launch.blocks, kThreads, 0, stream>>>(launch.table, sums);
    floor_kernel<<<unsigned(launch.table.tensors), kThreads, 0, stream>>>(launch.table, sums, floors, xi);
  }
  if (launch.blocks == 0) return;
  with_format(launch.key % kKeys, [&](auto format) {
    finalise_kernel<P, decltype(format)::value>
        <<<launch.blocks, kThreads, 0, stream>>>(launch.table, results, floors, float(xi));
  });
}

int64_t chunks_in(const std::vector<int64_t>& numels) {
  int64_t chunks = 0;
  for (int64_t numel : numels) chunks += cuda_chunks_of(numel);
  return chunks;
}

template <typename Tensor>
std::vector<int64_t> numels_of(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> numels;
  for (const Tensor& t : tensors) numels.push_back(t.numel);
  return numels;
}

// Clears the histograms, runs body(launch, results, stream) for every launch and writes the statistics.
template <typename Tensor, typename Body>
void run(const char* what, const std::vector<Tensor>& tensors, const CudaOutputs& out, const Body& body) {
  const CurrentDevice current(out.device);
  const cudaStream_t stream = static_cast<cudaStream_t>(out.stream);
  const Results results{reinterpret_cast<Sums*>(out.scratch), reinterpret_cast<unsigned long long*>(out.histograms)};
  check_cuda(cudaMemsetAsync(out.histograms, 0, tensors.size() * kBins * sizeof(int64_t), stream), what, out.device);
  for (const Launch& launch : plan(tensors)) {
    body(launch, results, stream);
    statistics_kernel<<<unsigned(launch.table.tensors), kThreads, 0, stream>>>(launch.table, results.partials,
                                                                               out.statistics);
    check_cuda(cudaGetLastError(), what, out.device);
  }
}

}  // namespace

int64_t importance_cuda_scratch(const std::vector<int64_t>& numels) {
  return chunks_in(numels) * kSums + int64_t(numels.size());
}

void finalise_cuda(const std::vector<FinaliseTensor>& tensors, double xi, bool relative, const CudaOutputs& out) {
  double* floors = relative ? out.scratch + chunks_in(numels_of(tensors)) * kSums : nullptr;
  run("finalise_cuda", tensors, out, [&](const Launch& launch, const Results& results, cudaStream_t stream) {
    switch (launch.key / kKeys) {
      case kFloat32: return launch_finalise<float>(launch, xi, floors, results, stream);
      case kBFloat16: return launch_finalise<BFloat16>(launch, xi, floors, results, stream);
      default: return launch_finalise<Float16>(launch, xi, floors, results, stream);
    }
  });
}

void merge_cuda(const std::vector<MergeTensor>& tensors, const MergeRule& rule, const CudaOutputs& out) {
  run("merge_cuda", tensors, out, [&](const Launch& launch, const Results& results, cudaStream_t stream) {
    if (launch.blocks == 0) return;
    with_format(launch.key, [&](auto format) {
      merge_kernel<decltype(format)::value><<<launch.blocks, kThreads, 0, stream>>>(launch.table, results, rule);
    });
  });
}

}  // namespace alr
