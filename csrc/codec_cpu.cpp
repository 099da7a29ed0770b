// Loops of the importance codec. Compiled once per instruction set, with ALR_CPU_NAMESPACE naming the
// copy. No standard library code here: the linker could pick a copy of it that needs AVX for everyone.
#include "cpu.h"
#include "simd.h"

namespace alr {
namespace ALR_CPU_NAMESPACE {
namespace {

ALR_HOST_DEVICE V load_importance(const CodecTensor& t, int64_t i) {
  if (t.dtype == kFloat32) return load_float(static_cast<const float*>(t.importance) + i);
  return from_bfloat16<V>(load_u16(static_cast<const uint16_t*>(t.importance) + i));
}

// The block's scale: its largest element as bf16, NaN where one is.
ALR_HOST_DEVICE uint16_t importance_scale(const CodecTensor& t, int64_t begin) {
  V peak = splat(-INFINITY);
  I nan{};
  for (int64_t i = begin; i < begin + kBlock; i += kLanes) {
    const V x = load_importance(t, i);
    nan |= x != x;
    peak = larger(x, peak);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if (nan[lane]) return 0x7fc0;
  }
  const float most = largest(peak);
  return uint16_t(to_bfloat16(most < kBFloat16Max ? most : kBFloat16Max));
}

}  // namespace

void encode_importance_range(const CodecTensor& t, int64_t begin, int64_t end) {
  const float top = t.bits == 4 ? 15.0f : 255.0f;
  for (int64_t block = begin; block < end; block += kBlock) {
    const uint16_t scale = importance_scale(t, block);
    t.scales[block / kBlock] = scale;
    const V inverse = splat(alr::inverse(from_bfloat16<float>(scale)));
    uint8_t codes[kBlock];
    uint8_t* to = t.bits == 4 ? codes : t.codes + block;
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      store_8(to + i, encode_importance(load_importance(t, block + i), inverse, top));
    }
    if (t.bits == 4) {
      for (int64_t i = 0; i < kBlock / 2; ++i) t.codes[block / 2 + i] = uint8_t(codes[2 * i] | codes[2 * i + 1] << 4);
    }
  }
}

void decode_importance_range(const CodecTensor& t, int64_t begin, int64_t end) {
  float* to = static_cast<float*>(t.importance);
  for (int64_t block = begin; block < end; block += kBlock) {
    const V scale = splat(from_bfloat16<float>(t.scales[block / kBlock]) * importance_unit(t.bits));
    for (int64_t i = block; i < block + kBlock; i += kLanes) {
      const U codes = t.bits == 4 ? load_u4(t.codes + i / 2) & 15u : load_u8(t.codes + i);
      store_float(to + i, fourth_power(Number<V>::of(I(codes)), scale));
    }
  }
}

}  // namespace ALR_CPU_NAMESPACE
}  // namespace alr
