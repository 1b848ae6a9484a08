// 64 columns of 16 rows of packed 4-bit weights times up to 16 tokens on mma.sync, for kernels that
// have both in shared memory. Device only.
#pragma once

#include "backend/cuda/device/dequant.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/mma.cuh"

namespace turbomind::cuda {

// B fragments of four k16 steps for kTiles tiles of eight tokens. One ldmatrix brings 32 columns of
// one tile, or 16 columns of two.
template <int kTiles>
struct TokenPieces {
  static_assert(kTiles == 1 || kTiles == 2);
  uint32_t r[2 * kTiles][4];

  // address(step): this lane's row of the ldmatrix that begins at column 16 * step.
  template <class Address>
  __device__ __forceinline__ void load(Address&& address) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) ldmatrix_x4(r[i], address(kTiles == 1 ? 2 * i : i));
  }
};

// One k16 step, the `step`-th of b's four: acc += its 16 columns.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_word(float (&acc)[kTiles][4], uint32_t word,
                                              const GroupPairs& pairs, const TokenPieces<kTiles>& b,
                                              int step) {
  uint32_t a[4];
  dequant_word<T>(word, pairs, a);
  if constexpr (kTiles == 1) {
    mma_16816<T>(acc[0], a, b.r[step / 2][step % 2 * 2], b.r[step / 2][step % 2 * 2 + 1]);
  } else {
    mma_16816<T>(acc[0], a, b.r[step][0], b.r[step][1]);
    mma_16816<T>(acc[kTiles - 1], a, b.r[step][2], b.r[step][3]);
  }
}

template <class T, int kTiles>
__device__ __forceinline__ void multiply_words(float (&acc)[kTiles][4], const uint4& four,
                                               const GroupPairs& pairs,
                                               const TokenPieces<kTiles>& b) {
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
  for (int step = 0; step < 4; ++step) multiply_word<T, kTiles>(acc, words[step], pairs, b, step);
}

}  // namespace turbomind::cuda
