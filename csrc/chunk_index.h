// Which elements a CUDA block and a thread of it work on: plain arithmetic, which a test on the host checks
// far beyond what any memory holds.
#pragma once

#include "codec_math.h"

namespace alr {

constexpr int kThreads = 256;
constexpr int kPack = 8;                      // elements a thread loads at once: 16 bytes of bf16, 2 x 16 of fp32
constexpr int kRound = kThreads * kPack;      // elements a CUDA block takes at a time
constexpr int64_t kCudaChunk = 8 * kRound;    // elements it works on

ALR_HOST_DEVICE int64_t cuda_chunks_of(int64_t numel) { return (numel + kCudaChunk - 1) / kCudaChunk; }

struct ChunkPlace {
  int tensor;
  int64_t begin;
  int64_t numel;
};

// Where chunk number `chunk` lies; first_chunks: [tensors + 1], numbered over the whole call.
ALR_HOST_DEVICE ChunkPlace chunk_place(const int64_t* first_chunks, const int64_t* numels, int64_t chunk) {
  int tensor = 0;
  while (chunk >= first_chunks[tensor + 1]) ++tensor;
  const int64_t begin = (chunk - first_chunks[tensor]) * kCudaChunk;
  const int64_t left = numels[tensor] - begin;
  return {tensor, begin, left < kCudaChunk ? left : kCudaChunk};
}

// A thread's elements in a round, within the chunk: where they begin, and how many there are.
ALR_HOST_DEVICE int64_t pack_begin(int round, int thread) { return int64_t(round) * kRound + int64_t(thread) * kPack; }

ALR_HOST_DEVICE int pack_numel(int64_t chunk_numel, int64_t begin) {
  const int64_t left = chunk_numel - begin;
  return left < 0 ? 0 : left < kPack ? int(left) : kPack;
}

// Where a tensor's element has its scale, and its code.
ALR_HOST_DEVICE int64_t scale_index(int64_t element) { return element / kBlock; }
ALR_HOST_DEVICE int64_t code_byte(int64_t element, int bits) { return element / 8 * bits + element % 8 * bits / 8; }

}  // namespace alr
