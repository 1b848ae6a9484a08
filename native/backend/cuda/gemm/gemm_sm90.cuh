// The wgmma GEMM behind u4_gemm_sm90 and dense_gemm_sm90. Weights are the m64 operand (4-bit ones
// dequantised into registers, 16-bit ones from shared memory), tokens the n operand, so one family
// serves M = 1 and M = 8192 with the same sums (see gemm_table.h).
//
// CTA: consumer warpgroups of 64 rows of W each, and two producer warps, of which one thread each moves
// weights and x with bulk copies: packed weights and group words as plain runs, dense weights and x through tensor
// maps with the 128-byte swizzle, into a ring of stages with a full and an empty barrier each. Weights
// of the first stages are fetched before the kernel waits for the one before it, and the kernel after
// it may start at once, so that in a graph of dependent launches weights never stop streaming.
//
// The segments of K go, by configuration and launch, to warpgroups of one CTA (kSplitGroups), to the
// CTAs of a cluster along z, or one after the other to the same warpgroup; they are always added in
// order.
// Bound: HBM for M up to about 64 (4-bit), then the tensor cores.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "backend/cuda/device/shared_memory.cuh"
#include "backend/cuda/gemm/cluster_launch.h"
#include "backend/cuda/gemm/consume_sm90.cuh"
#include "backend/cuda/gemm/epilogue.cuh"
#include "backend/cuda/gemm/packed_store_sm90.cuh"
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
  const int block = (first + rest % height) * C::kRowGroups;
  // Blocks of 16-bit weights that do not exist are zeros.
  return {block, C::kU4 ? min(C::kRowGroups, p.row_blocks - block) : C::kRowGroups, rest / height,
          whole};
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

// ---- the end of a tile -----------------------------------------------------------------------------

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
  store_rows<typename C::T, C::kTileN>(
      p.epilogue, t0, C::kTileT, tile.block * 64, scales, blockIdx.z * C::kConsumers + threadIdx.x,
      ctas * C::kConsumers, [&](int t, int n) {
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
    store_rows<typename C::T, 64>(
        p.epilogue, tile.token_tile * C::kTileT + first, C::kSlice, (tile.block + row_group) * 64,
        scales + first, thread, 128,
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

// The factors of a tile's tokens (split_norm.cuh). Those of the only token tile are folded by all
// warpgroups, once; others are there, and each warpgroup has its own copy, so as not to wait for the rest.
template <class C>
struct Factors {
  static constexpr int kOfThread = C::kTileT > 128 ? C::kTileT / 128 : 1;
  float* shared;  // [kGroups][kTileT]
  uint32_t ready;
  float own[kOfThread];

  // Before the first tile.
  __device__ __forceinline__ void fold(const InputNorm& norm, int tokens) {
    if (!folds_strips(norm)) return;
    begin_scales(norm, 0, min(C::kTileT, tokens), threadIdx.x, C::kConsumers, shared);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(ready);
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
  __device__ __forceinline__ const float* put(const InputNorm& norm, int group, int thread) const {
    if (folds_strips(norm)) {
      mbarrier_wait(ready, 0);
      return shared;
    }
    float* mine = shared + group * C::kTileT;
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      if (i * 128 + thread < C::kTileT) mine[i * 128 + thread] = own[i];
    }
    return mine;
  }
};

// All segments, one after the other, and their sum in order.
template <class C>
__device__ __forceinline__ void consume_in_turn(const Sm90Params& p, Ring<C>& ring,
                                                float (&sum)[C::kAcc], int row_group, int thread) {
  for (int segment = 0; segment < p.segments; ++segment) {
    float acc[C::kAcc] = {};
    const int count = p.bounds[segment + 1] - p.bounds[segment];
    consume<C>(ring, acc, count, count, row_group, 0, thread);
#pragma unroll
    for (int i = 0; i < C::kAcc; ++i) sum[i] = segment == 0 ? acc[i] : sum[i] + acc[i];
  }
}

template <class C>
__device__ __forceinline__ void consume_tiles(const Sm90Params& p, Ring<C>& ring, float* slots,
                                              float* slices, Factors<C>& factors,
                                              Meeting& meeting) {
  const int thread = threadIdx.x % 128;
  const int group = __shfl_sync(0xffffffffU, threadIdx.x / 128, 0);  // known to be a warp's
  const int row_group = group % C::kRowGroups;
  const int split_group = group / C::kRowGroups;
  float* slice = slices + group * C::kSliceFloats;
  Walk<C> walk(p);
  for (Tile tile; walk.next(p, tile);) {
    if (tile.whole && row_group >= tile.height) {
      skip<C>(ring, p.chunks, thread);
      continue;
    }
    const int t0 = tile.token_tile * C::kTileT;
    factors.begin(p.epilogue.input_norm, t0, p.epilogue.m - t0, thread);
    float acc[C::kAcc] = {};
    if (C::kInTurn && tile.whole && p.segments > 1) {
      if constexpr (C::kInTurn) consume_in_turn<C>(p, ring, acc, row_group, thread);
    } else {
      const int segment = first_segment<C>() + split_group;
      const int count = tile.whole ? p.chunks : p.bounds[segment + 1] - p.bounds[segment];
      consume<C>(ring, acc, count, iterations<C>(p, tile.whole), row_group, split_group, thread);
    }
    const float* scales = factors.put(p.epilogue.input_norm, group, thread);
    if (tile.whole) {
      store_alone<C>(p, acc, slice, scales, row_group, thread, tile);
    } else {
      Tile next;
      const bool last = !Walk<C>(walk).next(p, next);
      store_meeting<C>(p, acc, slots, scales, meeting, row_group, split_group, thread, tile, last);
    }
  }
  meeting.end();
}

// ---- kernel --------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    gemm_sm90_kernel(const Sm90Params p, const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap w_map) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[2 * kMaxStages + 4];
  __shared__ float scales[C::kGroups * C::kTileT];
  grid_dependency_launch();
  const uint32_t full = kept(smem_address(barriers));
  const uint32_t empty = full + kMaxStages * 8;
  const uint32_t meet = empty + kMaxStages * 8;
  const uint32_t over = meet + 16;
  const uint32_t ready = over + 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(full + i * 8, 2);  // the producers of weights and of x
      mbarrier_init(empty + i * 8, C::kConsumers / 32 * kWarpArrivals);
    }
    mbarrier_init(meet, gridDim.z);
    mbarrier_init(meet + 8, gridDim.z);
    mbarrier_init(over, C::kGroups);
    mbarrier_init(ready, C::kConsumers / 32);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (gridDim.z > 1) cluster_arrive();
  const int warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  if (warp >= C::kConsumers / 32) {
    if constexpr (C::kMoveRegisters) give_registers<C::kProducerRegisters>();
    const int producer = warp - C::kConsumers / 32;
    if (producer < 2 && elect_one()) {
      const uint32_t stages = smem_address(shared);
      if (producer == 0) {
        produce<C, true>(p, &w_map, stages, full, empty, over);
      } else {
        produce<C, false>(p, &x_map, stages, full, empty, over);
      }
    }
  } else {
    if constexpr (C::kMoveRegisters) take_registers<C::kConsumerRegisters>();
    if (p.epilogue.next_norm.weight != nullptr) {
      Walk<C> walk(p);
      Tile first;
      if (walk.next(p, first)) {
        prefetch_next_norm(p.epilogue.next_norm, p.epilogue.n, first.block * 64, C::kTileN,
                           threadIdx.x);
      }
    }
    grid_dependency_wait();
    Ring<C> ring{.stages = shared,
                 .base = smem_address(shared),
                 .full = full,
                 .empty = empty,
                 .count = p.stages,
                 .x_descriptor = wgmma_descriptor_low(smem_address(shared))};
    Meeting meeting{meet, over};
    Factors<C> factors{scales, ready};
    factors.fold(p.epilogue.input_norm, p.epilogue.m);
    consume_tiles<C>(p, ring, reinterpret_cast<float*>(shared),
                     reinterpret_cast<float*>(shared + p.stages * C::kStageBytes), factors,
                     meeting);
  }
}

// ---- launch --------------------------------------------------------------------------------------

// How a launch uses the device; 0: as many as fit.
struct Sm90Launch {
  int stages = 0;
  int bytes = 0;  // of a CTA's shared memory, where `stages` is 0
  int ctas = 0;   // in all; 0: one for each tile, or for each segment of each
  // Tiles that CTAs compute alone, before the others are shared by the CTAs of a cluster.
  int64_t whole = 0;
  bool even =
      false;  // CTAs have equal shares of the row blocks: for one token tile and one segment
};

// Clusters of `depth` CTAs of C, one to an SM, that the device holds at a time.
template <class C>
int resident_clusters(int depth) {
  static std::array<std::atomic<int>, kMaxSegments + 1>
      known{};  // a constant of the kernel and the device
  int clusters = known[depth].load(std::memory_order_relaxed);
  if (clusters > 0) return clusters;
  constexpr int kBytes = 180 * 1024;  // more than half an SM's
  clusters = count_clusters(gemm_sm90_kernel<C>, C::kThreads, kBytes, static_cast<unsigned>(depth));
  known[depth].store(clusters, std::memory_order_relaxed);
  return clusters;
}

template <class C>
void run_sm90(const GemmArgs& args, const LaunchContext& context, Sm90Launch wanted) {
  const PackedMatrix& w = *args.w;
  const int row_tiles = static_cast<int>(ceil_div<int64_t>(w.n, C::kTileN));
  const int token_tiles = ceil_div(args.m, C::kTileT);
  const int64_t tiles = static_cast<int64_t>(row_tiles) * token_tiles;
  const bool alone = w.segments == 1 ? C::kSplitGroups == 1 : wanted.whole >= tiles;
  const int64_t whole = alone ? tiles : wanted.whole;
  const int depth = alone ? 1 : w.segments / C::kSplitGroups;
  TM_CHECK((whole == 0 || C::kInTurn || w.segments == 1) &&
               (alone || depth * C::kSplitGroups == w.segments) && w.segments <= kMaxSegments,
           "%d segments of K with %d warpgroups each", w.segments, C::kSplitGroups);
  const int slice_bytes = whole > 0 ? C::kGroups * C::kSliceFloats * 4 : 0;
  const int slot_bytes = alone ? 0 : C::kSplitGroups * C::kSlotFloats * 4;
  // Of each CTA's share the driver takes 1 KiB, barriers and tokens' factors some more.
  constexpr int kReserved = std::max(2048, 1024 + 512 + C::kGroups * C::kTileT * 4);
  const int ctas_of_sm = wanted.stages + wanted.bytes > 0 ? 1 : C::kCtas;
  const int available = (context.max_shared_bytes + 1024) / ctas_of_sm - kReserved - slice_bytes;
  const int most = std::min(kMaxStages, available / C::kStageBytes);
  const int asked =
      wanted.bytes > 0 ? std::max(2, (wanted.bytes - slice_bytes) / C::kStageBytes) : wanted.stages;
  const int stages = asked > 0 ? std::min(asked, most) : most;
  TM_CHECK(stages >= 2, "%d bytes of shared memory are too few for the GEMM",
           context.max_shared_bytes);
  const bool even = wanted.even && alone && w.segments == 1 && token_tiles == 1;
  const int64_t most_ctas = even ? w.n_padded / kPackRows : tiles;
  const int64_t ctas = wanted.ctas > 0 ? std::min<int64_t>(most_ctas, wanted.ctas / depth) : tiles;
  const int64_t k = w.k % 8 == 0 ? w.k : w.k_padded;
  // x in blocks of 64 columns, where K has only whole ones: a chunk in one copy.
  const bool blocked_x = C::kTileK > 64 && k % C::kTileK == 0;
  const CUtensorMap x_map =
      blocked_x
          ? make_blocked_tensor_map(args.x, w.dtype, args.m, k, args.ldx, C::kTileT, C::kTileK / 64)
          : make_tensor_map(args.x, w.dtype, args.m, k, args.ldx, C::kTileT, 64);
  const CUtensorMap w_map = C::kU4 ? x_map
                                   : make_tensor_map(w.weights, w.dtype, w.n_padded, w.k_padded,
                                                     w.k_padded, C::kTileN, 64);
  Sm90Params params{.weights = static_cast<const char*>(w.weights),
                    .meta = reinterpret_cast<const char*>(w.meta),
                    .row_tiles = row_tiles,
                    .token_tiles = token_tiles,
                    .row_blocks = static_cast<int>(w.n_padded / kPackRows),
                    .chunks = static_cast<int>(w.k_padded / C::kTileK),
                    .segments = w.segments,
                    .stages = stages,
                    .whole = static_cast<int>(whole),
                    .even = even,
                    .blocked_x = blocked_x,
                    .bounds = {},
                    .epilogue = epilogue_params(args)};
  InputNorm& norm = params.epilogue.input_norm;
  if (norm.strips != nullptr && norm.scales == nullptr && token_tiles > 1) {
    TM_CHECK(args.partial_floats >= static_cast<size_t>(args.m),
             "a workspace of %zu floats for the factors of %d tokens", args.partial_floats, args.m);
    fold_strips(context, norm, args.partials, args.m);
    norm.scales = args.partials;
  }
  for (int i = 0; i <= w.segments; ++i) params.bounds[i] = i * params.chunks / w.segments;
  launch_cluster(gemm_sm90_kernel<C>,
                 {.grid = dim3(static_cast<unsigned>(ctas), 1, static_cast<unsigned>(depth)),
                  .threads = C::kThreads,
                  .shared_bytes = std::max(stages * C::kStageBytes + slice_bytes, slot_bytes)},
                 static_cast<unsigned>(depth), context.stream, context.programmatic, params, x_map,
                 w_map);
}

}  // namespace turbomind::cuda
