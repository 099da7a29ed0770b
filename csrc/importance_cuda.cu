// accumulate on NVIDIA GPUs.
#include "table_cuda.cuh"

namespace alr {
namespace {

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
accumulate_kernel(const __grid_constant__ Table table,  // path_integral fp32 mutated; grad G; param P; previous P mutated
                  float grad_sign) {                    // -1 to maximise
  const BlockChunk chunk = find_chunk(table);
  float* path_integral = operand<float>(table, 0, chunk);
  const G* grad = operand<G>(table, 1, chunk);
  const P* param = operand<P>(table, 2, chunk);
  P* previous = operand<P>(table, 3, chunk);

  const bool vector = aligned(path_integral) && aligned(grad) && aligned(param) && aligned(previous);
  const int64_t packed = vector ? chunk.numel / kPack * kPack : 0;
  for (int64_t i = int64_t(threadIdx.x) * kPack; i < packed; i += kThreads * kPack) {
    Pack<float> omega = Pack<float>::read(path_integral + i);
    const Pack<G> g = Pack<G>::read(grad + i);
    const Pack<P> now = Pack<P>::read(param + i);
    const Pack<P> before = Pack<P>::read(previous + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      omega.at[j] = accumulate(omega.at[j], load(g.at[j]) * grad_sign, load(now.at[j]), load(before.at[j]));
    }
    omega.write(path_integral + i);
    now.write(previous + i);
  }
  for (int64_t i = packed + threadIdx.x; i < chunk.numel; i += kThreads) {
    const P now = param[i];
    path_integral[i] = accumulate(path_integral[i], load(grad[i]) * grad_sign, load(now), load(previous[i]));
    previous[i] = now;
  }
}

template <>
void set_operands(Table& table, int at, const AccumulateTensor& t) {
  table.pointers[0][at] = t.path_integral;
  table.pointers[1][at] = const_cast<void*>(t.grad);
  table.pointers[2][at] = const_cast<void*>(t.param);
  table.pointers[3][at] = t.previous;
}

template <>
int launch_key(const AccumulateTensor& t) { return t.param_dtype * kKeys + t.grad_dtype; }

template <typename P>
void launch_accumulate(const Launch& launch, float grad_sign, cudaStream_t stream) {
  switch (launch.key % kKeys) {
    case kFloat32: accumulate_kernel<P, float><<<launch.blocks, kThreads, 0, stream>>>(launch.table, grad_sign); break;
    case kBFloat16: accumulate_kernel<P, BFloat16><<<launch.blocks, kThreads, 0, stream>>>(launch.table, grad_sign); break;
    default: accumulate_kernel<P, Float16><<<launch.blocks, kThreads, 0, stream>>>(launch.table, grad_sign); break;
  }
}

}  // namespace

void accumulate_cuda(const std::vector<AccumulateTensor>& tensors, float grad_sign, int device, void* stream) {
  const CurrentDevice current(device);
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  for (const Launch& launch : plan(tensors)) {
    if (launch.blocks == 0) continue;
    switch (launch.key / kKeys) {
      case kFloat32: launch_accumulate<float>(launch, grad_sign, on); break;
      case kBFloat16: launch_accumulate<BFloat16>(launch, grad_sign, on); break;
      default: launch_accumulate<Float16>(launch, grad_sign, on); break;
    }
    check_cuda(cudaGetLastError(), "accumulate_cuda", device);
  }
}

}  // namespace alr
