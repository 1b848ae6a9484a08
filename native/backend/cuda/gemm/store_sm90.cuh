// The end of a tile of gemm_sm90.cuh: sums that meet in a CTA or a cluster, or tiles that a warpgroup has for
// itself, through shared memory to store_rows (epilogue.cuh) or in registers (packed_store_sm90.cuh); and the
// factors of split norms that they need. Device only.
#pragma once

#include "backend/cuda/device/shared_memory.cuh"
#include "backend/cuda/gemm/packed_store_sm90.cuh"

namespace turbomind::cuda {

// Where the CTAs of a cluster wait for one another between tiles: a barrier in each, at which one thread of
// each arrives for its CTA. The cluster's own barrier would wait for the producers too; it only tells that
// all CTAs have made theirs, and, at the end, that none leaves while others read its slots.
// Two barriers in turn: who arrives at one again has passed the other, for which all have left the first.
struct Meeting {
  uint32_t barriers;  // [2]
  uint32_t over;      // barrier of the producers, which may fill the ring again
  uint32_t count = 0;

  // Of all consumers of all CTAs; what they wrote to shared memory before it is visible after it.
  template <class C>
  __device__ __forceinline__ void sync() {
    consumers_sync<C>();
    if (gridDim.z == 1) return;
    if (count == 0) cluster_wait();
    const uint32_t barrier = barriers + count % 2 * 8;
    if (threadIdx.x < gridDim.z) mbarrier_arrive_cluster(cluster_address(barrier, threadIdx.x));
    if (threadIdx.x < 32) mbarrier_wait_cluster(barrier, count / 2 % 2);
    ++count;
    consumers_sync<C>();
  }
  // Before the consumers leave. Producers have nothing that others read: leaving counts as arriving.
  __device__ __forceinline__ void end() const {
    if (gridDim.z == 1) return;
    if (count == 0) cluster_wait();
    cluster_arrive();
    cluster_wait();
  }
};

// Accumulators of tokens [kFirst, kFirst + count) → slice [t - kFirst][n], from row n0 of the slice.
template <class C, int kStride, int kFirst>
__device__ __forceinline__ void put_acc(const float (&acc)[C::kAcc], float* slice, int n0,
                                        int thread, int count) {
  const int n = n0 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int i = kFirst / 2; i < C::kAcc; ++i) {
    if (i / 4 * 8 - kFirst >= count) break;
    const int t = i / 4 * 8 + (thread % 4) * 2 + i % 2 - kFirst;
    slice[t * kStride + n + (i % 4 / 2) * 8] = acc[i];
  }
}

// put_acc of the slice of C::kSlice tokens at `first`, one of [kFirst, kEnd).
template <class C, int kFirst, int kEnd>
__device__ __forceinline__ void put_slice(const float (&acc)[C::kAcc], float* slice, int thread,
                                          int first) {
  if constexpr (kEnd - kFirst <= C::kSlice) {
    put_acc<C, kTileStride<64>, kFirst>(acc, slice, 0, thread, C::kSlice);
  } else {
    constexpr int kMiddle = kFirst + (kEnd - kFirst) / 2 / C::kSlice * C::kSlice;
    if (first < kMiddle) {
      put_slice<C, kFirst, kMiddle>(acc, slice, thread, first);
    } else {
      put_slice<C, kMiddle, kEnd>(acc, slice, thread, first);
    }
  }
}

__device__ __forceinline__ void add_to(float4& sum, const float4& part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

// The segments of a tile, which lie in the slots of this CTA or of all CTAs of its cluster, are added
// in order; each CTA stores a part of the tile.
template <class C>
__device__ __forceinline__ void store_meeting(const Sm90Params& p, const float (&acc)[C::kAcc],
                                              float* slots, const float* scales, Meeting& meeting,
                                              int row_group, int split_group, int thread,
                                              const Tile& tile, bool last) {
  const int ctas = gridDim.z;
  const int t0 = tile.token_tile * C::kTileT;
  consumers_sync<C>();  // the slots are where all have read the ring
  put_acc<C, C::kStride, 0>(acc, slots + split_group * C::kSlotFloats, row_group * 64, thread,
                            p.epilogue.m - t0);
  meeting.sync<C>();
  const uint32_t base = smem_address(slots);
  store_rows<typename C::T, C::kTileN, C::kStrips>(
      p.epilogue, t0, C::kTileT, tile.block * 64, C::kU4 ? tile.height * 64 : C::kTileN, scales,
      blockIdx.z * C::kConsumers + threadIdx.x, ctas * C::kConsumers, [&](int t, int n) {
        const int at = t * C::kStride + n;
        if (ctas == 1) {
          float4 sum = *reinterpret_cast<const float4*>(slots + at);
#pragma unroll 1
          for (int q = 1; q < C::kSplitGroups; ++q) {
            add_to(sum, *reinterpret_cast<const float4*>(slots + q * C::kSlotFloats + at));
          }
          return sum;
        }
        float4 sum = cluster_load_float4(cluster_address(base + at * 4, 0));
#pragma unroll 2
        for (int s = 1; s < ctas * C::kSplitGroups; ++s) {
          const uint32_t cell = base + (s % C::kSplitGroups * C::kSlotFloats + at) * 4;
          add_to(sum, cluster_load_float4(cluster_address(cell, s / C::kSplitGroups)));
        }
        return sum;
      });
  __syncwarp();  // see store_slices
  if (last) return;
  fence_async_shared();
  meeting.sync<C>();  // nobody fills the ring while its slots are read
  if (thread == 0) mbarrier_arrive(meeting.over);
  __syncwarp();
}

// No meeting: each warpgroup through shared memory of its own, in slices of tokens.
template <class C>
__device__ __forceinline__ void store_slices(const Sm90Params& p, const float (&acc)[C::kAcc],
                                             float* slice, const float* scales, int row_group,
                                             int thread, const Tile& tile) {
  constexpr int kStride = kTileStride<64>;
  const int tokens = min(C::kTileT, p.epilogue.m - tile.token_tile * C::kTileT);
#pragma unroll 1
  for (int first = 0; first < tokens; first += C::kSlice) {
    store_sync<C>(row_group);
    put_slice<C, 0, C::kTileT>(acc, slice, thread, first);
    store_sync<C>(row_group);
    store_rows<typename C::T, 64, C::kStrips>(
        p.epilogue, tile.token_tile * C::kTileT + first, C::kSlice, (tile.block + row_group) * 64,
        64, scales + first, thread, 128,
        [&](int t, int n) { return *reinterpret_cast<const float4*>(slice + t * kStride + n); });
    // The lanes part in store_rows. Unless told here that they are together again the compiler takes the next
    // tile's main loop for one of single lanes, and moves each descriptor to uniform registers anew.
    __syncwarp();
  }
}

// No meeting, the shorter way where there is one.
template <class C>
__device__ __forceinline__ void store_alone(const Sm90Params& p, const float (&acc)[C::kAcc],
                                            float* slice, const float* scales, int row_group,
                                            int thread, const Tile& tile) {
  if constexpr (C::kPacks) {
    const int block = tile.block + row_group;
    // Warpgroups that store together also do it the same way.
    if (packs<C>(p.epilogue, ((C::kU4 ? block : tile.block + C::kRowGroups - 1) + 1) * 64)) {
      store_packed<C>(p.epilogue, acc, slice, scales, row_group, block * 64,
                      tile.token_tile * C::kTileT, thread);
      return;
    }
  }
  store_slices<C>(p, acc, slice, scales, row_group, thread, tile);
}

// The factors of a tile's tokens (split_norm.cuh). Where they have to be folded, warps that do nothing else do it
// while the products run, each token tile once, or, where there are no such, all consumers before the only one.
// Others are there, and each warpgroup has its own copy, so as not to wait for the rest.
template <class C>
struct Factors {
  static constexpr int kOfThread = C::kTileT > 128 ? C::kTileT / 128 : 1;
  static constexpr bool kBeside = C::kFoldWarps > 0 && C::kTileT <= kWideTokens;
  static constexpr int kFolders = kBeside ? 32 * C::kFoldWarps : C::kConsumers;
  // What can be folded: token tiles that `shared` has room for, and strips of the one width.
  static constexpr int kTokenTiles = kBeside && C::kGroups > 1 ? 2 : 1;
  static constexpr bool kWide = C::kTileT > kNarrowTokens;
  float* shared;   // [kGroups][kTileT]
  uint32_t ready;  // a barrier for each token tile
  float own[kOfThread];

  // The token tile, before its first tile or beside it. thread: one of kFolders.
  __device__ __forceinline__ static void fold(const Sm90Params& p, int token_tile, float* scales,
                                              uint32_t ready, int thread) {
    const InputNorm& norm = p.epilogue.input_norm;
    if constexpr (kTokenTiles == 1) token_tile = 0;
    const int t0 = token_tile * C::kTileT;
    const int tokens = min(C::kTileT, p.epilogue.m - t0);
    scales += t0;
    if constexpr (kBeside && kWide) {
      // A CTA of a cluster stores, and so folds, every gridDim.z-th run of tokens (store_meeting).
      const bool whole = p.whole > 0;
      const int run = whole ? C::kTileT : C::kConsumers / pieces_of_row<C::kTileN>(p.epilogue);
      const int step = whole ? C::kTileT : run * static_cast<int>(gridDim.z);
#pragma unroll 1
      for (int begin = whole ? 0 : run * static_cast<int>(blockIdx.z); begin < tokens;
           begin += step) {
        fold_run(norm, t0, begin, min(begin + run, tokens), scales, thread);
      }
    } else if constexpr (kBeside) {
      fold_scales<Strips::narrow, 10>(norm, t0, tokens, thread, kFolders, scales);
    } else {
      fold_scales<C::kStrips>(norm, t0, tokens, thread, kFolders, scales);
    }
    __syncwarp();
    if (thread % 32 < kWarpArrivals) mbarrier_arrive(ready + token_tile * 8);
    __syncwarp();
  }
  // Tokens t0 + begin .. t0 + end - 1 with wide strips, eight lanes each; as many together as a lane's registers
  // hold.
  __device__ __forceinline__ static void fold_run(const InputNorm& norm, int t0, int begin, int end,
                                                  float* scales, int thread) {
    constexpr int kAtOnce = C::kProducerRegisters >= 40 ? 2 : 1;
    constexpr int kWarpsTokens = kFolders / 8;
#pragma unroll 1
    for (int first = begin + thread / 32 * 4; first < end; first += kWarpsTokens * kAtOnce) {
      const int mine = first + thread % 32 / 8;
      int t[kAtOnce];
      float sum[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) t[j] = t0 + min(mine + j * kWarpsTokens, end - 1);
      sum_wide_strips(norm, t, sum);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float factor = join_chains(norm, sum[j]);
        const int token = mine + j * kWarpsTokens;
        if (token < end && thread % 8 == 0) scales[token] = factor;
      }
    }
  }
  // All token tiles of the CTA, in the order in which it gets to them.
  __device__ __forceinline__ static void fold_beside(const Sm90Params& p, float* scales,
                                                     uint32_t ready, int thread) {
    Walk<C> walk(p);
    int folded = 0;  // a bit for each token tile
    for (Tile tile; folded + 1 != 1 << p.token_tiles && walk.next(p, tile);) {
      if ((folded >> tile.token_tile & 1) != 0) continue;
      folded |= 1 << tile.token_tile;
      fold(p, tile.token_tile, scales, ready, thread);
    }
  }
  // Asks for those of the tokens from t0 on.
  __device__ __forceinline__ void begin(const InputNorm& norm, int t0, int tokens, int thread) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int t = i * 128 + thread;
      own[i] = norm.scales != nullptr && t < tokens ? __ldcg(norm.scales + t0 + t) : 1.0F;
    }
  }
  // To be read by this warpgroup after its next barrier.
  __device__ __forceinline__ const float* put(const InputNorm& norm, int token_tile, int group,
                                              int thread) const {
    if (folds_strips(norm)) {
      const int folded = kTokenTiles == 1 ? 0 : token_tile;
      mbarrier_wait(ready + folded * 8, 0);
      return shared + folded * C::kTileT;
    }
    float* mine = shared + group * C::kTileT;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      if (i * 128 + thread < C::kTileT) mine[i * 128 + thread] = own[i];
    }
    return mine;
  }
};

}  // namespace turbomind::cuda
