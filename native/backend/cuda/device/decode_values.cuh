// Decode attention's product of a part's probabilities and values: all tiles, 16 dims in turn a warp. Device
// only.
#pragma once

#include "backend/cuda/device/decode_softmax.cuh"

namespace turbomind::cuda::decode {

// Rows of V past the last key hold anything, and 0 times it may be no number.
template <class C>
__device__ __forceinline__ void clear_values(uint32_t tile, int valid, int lane) {
  using Tile = HalfTile<C::kDim>;
  constexpr int kPieces = C::kDim / 8;
  for (int i = lane; i < (kBlockTokens - valid) * kPieces; i += 32) {
    store_shared_zero16(tile + Tile::offset(valid + i / kPieces, i % kPieces * 8));
  }
  fence_async_shared();  // the slot is written by a bulk copy next
}

// Product of a part's probabilities and values: out = factor * out + V * probabilities, tile by tile, as many
// chains side by side as a warp has rows of dims.
template <class C>
__device__ __forceinline__ void part_product(Out<C>& out, const Exchange<C>& exchange,
                                             const Maxima<C>& maxima, const Params& p,
                                             Barriers& barriers, uint32_t ring, RingCursor at,
                                             int tiles, int warp, int lane) {
  using Fragments = ValueFragments<C::kDim, C::kBits>;
  const uint32_t full = smem_address(barriers.full);
  const uint32_t empty = smem_address(barriers.empty);
#pragma unroll
  for (int t = 0; t < kPartTiles; ++t) {
    if (t >= tiles) break;
    mbarrier_wait(full + at.slot * 8, at.parity);
    typename Fragments::Words words[C::kOwn];
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
      if (!C::owns(warp, o)) continue;
      Fragments::load_words(words[o], ring + at.slot * C::kSlotBytes, warp + kWarps * o, lane);
    }
    if (t > 0) {
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
#pragma unroll
        for (int n = 0; n < C::kN; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            out[o][n][i] *= i % 2 == 0 ? maxima.factor[t][n].x : maxima.factor[t][n].y;
          }
        }
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[C::kOwn][4];
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        if (C::owns(warp, o)) Fragments::unpack(a[o], words[o], step);
      }
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        const uint2 b = exchange.probabilities[n][t * 4 + step][lane];
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
          if (C::owns(warp, o)) mma_16816<typename C::Product>(out[o][n], a[o], b.x, b.y);
        }
      }
    }
    __syncwarp();
    if (lane < kWarpArrivals) mbarrier_arrive(empty + at.slot * 8);
    at.advance(1, p.slots);
  }
}

}  // namespace turbomind::cuda::decode
