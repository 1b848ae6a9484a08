// Which tiles a CTA of gemm_sm90.cuh works on, in which order, and its two producers: one thread each moves weights
// and x of those tiles into the ring. What consumers do with the stages is consume_sm90.cuh's. Device only.
#pragma once

#include "backend/cuda/device/shared_memory.cuh"
#include "backend/cuda/gemm/consume_sm90.cuh"
#include "backend/cuda/gemm/tensor_map.h"

namespace turbomind::cuda {

// ---- tiles ---------------------------------------------------------------------------------------

// Output tiles in bands of row tiles, so that CTAs that run together share weights and tokens in L2.
template <class C>
__device__ __forceinline__ Tile tile_of(const Sm90Params& p, int index, bool whole) {
  constexpr int kBand = 16;
  const int band = index / (kBand * p.token_tiles);
  const int first = band * kBand;
  const int height = min(kBand, p.row_tiles - first);
  const int rest = index - first * p.token_tiles;
  const int tile = first + rest % height;
  if constexpr (!C::kU4) return {tile * C::kRowGroups, C::kRowGroups, rest / height, whole};
  const int block = tile * C::kRowGroups - max(0, tile - p.tall_tiles);
  const int rows = C::kRowGroups - (tile < p.tall_tiles ? 0 : 1);
  return {block, min(rows, p.row_blocks - block), rest / height, whole};
}

// The tiles of this CTA, in the same order for producers and consumers.
template <class C>
struct Walk {
  int index;
  int end;  // `even`: of the row blocks
  bool sharing = false;

  __device__ __forceinline__ explicit Walk(const Sm90Params& p)
      : index(blockIdx.x * gridDim.z + blockIdx.z), end(p.row_tiles * p.token_tiles) {
    if (p.even) {
      const int ctas = gridDim.x;
      index = blockIdx.x * p.row_blocks / ctas;
      end = (blockIdx.x + 1) * p.row_blocks / ctas;
    }
  }
  __device__ __forceinline__ bool next(const Sm90Params& p, Tile& tile) {
    if (p.even) {
      if (index >= end) return false;
      const int left = end - index;  // the last two tiles share what is left
      const int height = left >= 2 * C::kRowGroups ? C::kRowGroups
                         : left > C::kRowGroups    ? (left + 1) / 2
                                                   : left;
      tile = {index, height, 0, true};
      index += tile.height;
      return true;
    }
    if (!sharing && index >= p.whole) {
      sharing = true;
      index = p.whole + blockIdx.x;
    }
    if (index >= end) return false;
    tile = tile_of<C>(p, index, !sharing);
    index += sharing ? gridDim.x : gridDim.x * gridDim.z;
    return true;
  }
};

// ---- producer ------------------------------------------------------------------------------------

// Calls f(split group, chunk) for the chunks that iteration `i` of a tile brings.
template <class C, class F>
__device__ __forceinline__ void for_chunks(const Sm90Params& p, const Tile& tile, int i, F&& f) {
  if constexpr (C::kSplitGroups == 1) {
    f(0, (tile.whole ? 0 : p.bounds[blockIdx.z]) + i);
  } else {
#pragma unroll 1
    for (int q = 0; q < C::kSplitGroups; ++q) {
      const int chunk = p.bounds[first_segment<C>() + q] + i;
      if (chunk < p.bounds[first_segment<C>() + q + 1]) f(q, chunk);
    }
  }
}

template <class C>
__device__ __forceinline__ void load_weights(const Sm90Params& p, const CUtensorMap* w_map,
                                             const Tile& tile, uint32_t stage, uint32_t full,
                                             int iteration) {
  const int height = C::kU4 ? tile.height : C::kRowGroups;
  uint32_t bytes = 0;
  for_chunks<C>(p, tile, iteration,
                [&](int, int) { bytes += height * (C::kBlockBytes + C::kMetaBlockBytes); });
  mbarrier_expect_bytes(full, bytes);
  for_chunks<C>(p, tile, iteration, [&](int q, int chunk) {
    const uint32_t weights = stage + C::kWeightOffset + q * C::kRowGroups * C::kBlockBytes;
    if constexpr (C::kU4) {
#pragma unroll
      for (int r = 0; r < C::kRowGroups; ++r) {
        if (r >= height) break;
        const int64_t piece = static_cast<int64_t>(tile.block + r) * p.chunks + chunk;
        bulk_load(weights + r * C::kBlockBytes, p.weights + piece * C::kBlockBytes, C::kBlockBytes,
                  full);
        bulk_load(stage + C::kMetaOffset + (q * C::kRowGroups + r) * C::kMetaBlockBytes,
                  p.meta + piece * C::kMetaBlockBytes, C::kMetaBlockBytes, full);
      }
    } else {
      tensor_load_2d(weights, w_map, chunk * 64, tile.block * 64, full);
    }
  });
}

template <class C>
__device__ __forceinline__ void load_x(const Sm90Params& p, const CUtensorMap* x_map,
                                       const Tile& tile, uint32_t stage, uint32_t full,
                                       int iteration) {
  uint32_t bytes = 0;
  for_chunks<C>(p, tile, iteration, [&](int, int) { bytes += C::kXBytes; });
  mbarrier_expect_bytes(full, bytes);
  for_chunks<C>(p, tile, iteration, [&](int q, int chunk) {
    constexpr int kSubs = C::kTileK / 64;
    const uint32_t destination = stage + q * C::kXBytes;
    const int row = tile.token_tile * C::kTileT;
    if constexpr (kSubs > 1) {
      if (p.blocked_x) {
        tensor_load_3d(destination, x_map, 0, row, chunk * kSubs, full);
        return;
      }
    }
#pragma unroll
    for (int sub = 0; sub < kSubs; ++sub) {
      tensor_load_2d(destination + sub * C::kTileT * 128, x_map, chunk * C::kTileK + sub * 64, row,
                     full);
    }
  });
}

// One elected thread of each of two warps: weights, which do not depend on the kernel before this one,
// and x, which does.
template <class C, bool kWeights>
__device__ __forceinline__ void produce(const Sm90Params& p, const CUtensorMap* map, uint32_t ring,
                                        uint32_t full, uint32_t empty, uint32_t over) {
  int stage = 0;
  uint32_t over_parity = 0;
  bool shared = false;
  uint32_t parity = 1;  // of the release before the first: waits for it return at once
  if constexpr (!kWeights) grid_dependency_wait();
  Walk<C> walk(p);
  for (Tile tile; walk.next(p, tile);) {
    const int count = iterations<C>(p, tile.whole);
    if (shared) {  // the meeting about the tile before this one
      mbarrier_wait(over, over_parity);
      over_parity ^= 1;
    }
    shared = !tile.whole;
#pragma unroll 1
    for (int iteration = 0; iteration < count; ++iteration) {
      mbarrier_wait(empty + stage * 8, parity);
      const uint32_t slot = ring + stage * C::kStageBytes;
      if constexpr (kWeights) {
        load_weights<C>(p, map, tile, slot, full + stage * 8, iteration);
      } else {
        load_x<C>(p, map, tile, slot, full + stage * 8, iteration);
      }
      if (++stage == p.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

}  // namespace turbomind::cuda
