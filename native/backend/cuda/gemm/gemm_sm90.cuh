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

#include "backend/cuda/gemm/cluster_launch.h"
#include "backend/cuda/gemm/consume_sm90.cuh"
#include "backend/cuda/gemm/epilogue.cuh"
#include "backend/cuda/gemm/tensor_map.h"

namespace turbomind::cuda {

// Output tiles in bands of row tiles, so that CTAs that run together share weights and tokens in L2.
__device__ __forceinline__ int2 tile_of(int index, int row_tiles, int token_tiles) {
  constexpr int kBand = 16;
  const int band = index / (kBand * token_tiles);
  const int first = band * kBand;
  const int height = min(kBand, row_tiles - first);
  const int rest = index - first * token_tiles;
  return {first + rest % height, rest / height};
}

// ---- producer ------------------------------------------------------------------------------------

// Iteration i of a tile brings chunk begin + i of each split group's columns.
template <class C>
struct Loads {
  int row_tile;
  int token_tile;
  const int* bounds;  // of the segments that split groups have, or of all of K

  // Calls f(split group, chunk) for those that have an i-th chunk.
  template <class F>
  __device__ __forceinline__ void for_chunks(int iteration, F&& f) const {
#pragma unroll 1
    for (int q = 0; q < C::kSplitGroups; ++q) {
      const int chunk = bounds[q] + iteration;
      if (chunk < bounds[q + 1]) f(q, chunk);
    }
  }
};

template <class C>
__device__ __forceinline__ void load_weights(const Sm90Params& p, const CUtensorMap* w_map,
                                             const Loads<C>& loads, uint32_t stage, uint32_t full,
                                             int iteration) {
  uint32_t bytes = 0;
  loads.for_chunks(iteration, [&](int, int) { bytes += C::kSplitLoadBytes - C::kXBytes; });
  mbarrier_expect_bytes(full, bytes);
  loads.for_chunks(iteration, [&](int q, int chunk) {
    const uint32_t weights = stage + C::kWeightOffset + q * C::kRowGroups * C::kBlockBytes;
    if constexpr (C::kU4) {
#pragma unroll
      for (int r = 0; r < C::kRowGroups; ++r) {
        // A block past the last one is loaded from the last: its results are never stored.
        const int block = min(loads.row_tile * C::kRowGroups + r, p.row_blocks - 1);
        const int64_t piece = static_cast<int64_t>(block) * p.chunks + chunk;
        bulk_load(weights + r * C::kBlockBytes, p.weights + piece * C::kBlockBytes, C::kBlockBytes,
                  full);
        bulk_load(stage + C::kMetaOffset + (q * C::kRowGroups + r) * C::kMetaBlockBytes,
                  p.meta + piece * C::kMetaBlockBytes, C::kMetaBlockBytes, full);
      }
    } else {
      tensor_load_2d(weights, w_map, chunk * 64, loads.row_tile * C::kTileN, full);
    }
  });
}

template <class C>
__device__ __forceinline__ void load_x(const Sm90Params& p, const CUtensorMap* x_map,
                                       const Loads<C>& loads, uint32_t stage, uint32_t full,
                                       int iteration) {
  uint32_t bytes = 0;
  loads.for_chunks(iteration, [&](int, int) { bytes += C::kXBytes; });
  mbarrier_expect_bytes(full, bytes);
  loads.for_chunks(iteration, [&](int q, int chunk) {
    constexpr int kSubs = C::kTileK / 64;
    const uint32_t destination = stage + q * C::kXBytes;
    const int row = loads.token_tile * C::kTileT;
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
                                        uint32_t full, uint32_t empty, const int* bounds) {
  const int count = iterations<C>(bounds);
  int stage = 0;
  uint32_t parity = 1;  // of the release before the first: waits for it return at once
  if constexpr (!kWeights) grid_dependency_wait();
  for (int i = blockIdx.x; i < p.row_tiles * p.token_tiles; i += gridDim.x) {
    const int2 tile = tile_of(i, p.row_tiles, p.token_tiles);
    const Loads<C> loads{tile.x, tile.y, bounds};
#pragma unroll 1
    for (int iteration = 0; iteration < count; ++iteration) {
      mbarrier_wait(empty + stage * 8, parity);
      const uint32_t slot = ring + stage * C::kStageBytes;
      if constexpr (kWeights) {
        load_weights<C>(p, map, loads, slot, full + stage * 8, iteration);
      } else {
        load_x<C>(p, map, loads, slot, full + stage * 8, iteration);
      }
      if (++stage == p.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

// ---- the end of a tile -----------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;\n" ::"n"(C::kConsumers) : "memory");
}

// Accumulators of tokens [first, first + count) → tile [t - first][n]; row_group: of this warpgroup
// inside the tile.
template <class C>
__device__ __forceinline__ void put_acc(const float (&acc)[C::kAcc], float* tile, int row_group,
                                        int thread, int first = 0, int count = C::kTileT) {
  const int n = row_group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < C::kAcc; ++i) {
    if (i / 4 * 8 < first || i / 4 * 8 >= first + count) continue;
    const int t = i / 4 * 8 + (thread % 4) * 2 + i % 2 - first;
    tile[t * C::kStride + n + (i % 4 / 2) * 8] = acc[i];
  }
}

__device__ __forceinline__ void add_to(float4& sum, const float4& part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

// Tokens [first, first + tokens) of the tile, whose segments lie in `slots` slots, added in order.
template <class C>
__device__ __forceinline__ void store_slots(const Sm90Params& p, const float* tile, int slots,
                                            const float* scales, int t0, int tokens, int n0) {
  consumers_sync<C>();
  store_rows<typename C::T, C::kTileN>(
      p.epilogue, t0, tokens, n0, scales, threadIdx.x, C::kConsumers, [&](int t, int n) {
        const float* cell = tile + t * C::kStride + n;
        float4 sum = *reinterpret_cast<const float4*>(cell);
#pragma unroll 1
        for (int q = 1; q < slots; ++q) {
          add_to(sum, *reinterpret_cast<const float4*>(cell + q * C::kSlotFloats));
        }
        return sum;
      });
  consumers_sync<C>();
}

// The same with the slots of all CTAs of a cluster, each of which stores a part of the tile.
template <class C>
__device__ __forceinline__ void store_cluster(const Sm90Params& p, const float* tile,
                                              const float* scales, int t0, int n0) {
  cluster_sync();
  const uint32_t base = smem_address(tile);
  const int ctas = gridDim.z;
  store_rows<typename C::T, C::kTileN>(
      p.epilogue, t0, C::kTileT, n0, scales, blockIdx.z * C::kConsumers + threadIdx.x,
      ctas * C::kConsumers, [&](int t, int n) {
        const uint32_t cell = base + (t * C::kStride + n) * 4;
        float4 sum = cluster_load_float4(cluster_address(cell, 0));
#pragma unroll 2
        for (int s = 1; s < ctas * C::kSplitGroups; ++s) {
          add_to(sum, cluster_load_float4(cluster_address(
                          cell + s % C::kSplitGroups * C::kSlotFloats * 4, s / C::kSplitGroups)));
        }
        return sum;
      });
  __syncwarp();
  cluster_sync();  // nobody leaves while its slots are read
}

// No meeting: through shared memory in slices of tokens.
template <class C>
__device__ __forceinline__ void store_slices(const Sm90Params& p, const float (&acc)[C::kAcc],
                                             float* tile, const float* scales, int row_group,
                                             int thread, int t0, int n0) {
#pragma unroll 1
  for (int first = 0; first < C::kTileT; first += C::kSlice) {
#pragma unroll
    for (int slice = 0; slice < C::kTileT; slice += C::kSlice) {
      if (slice == first) put_acc<C>(acc, tile, row_group, thread, slice, C::kSlice);
    }
    store_slots<C>(p, tile, 1, scales + first, t0 + first, C::kSlice, n0);
  }
}

// All segments, one after the other, and their sum in order.
template <class C>
__device__ __forceinline__ void consume_in_turn(const Sm90Params& p, Ring<C>& ring,
                                                float (&sum)[C::kAcc], int row_group, int thread) {
  for (int segment = 0; segment < p.segments; ++segment) {
    float acc[C::kAcc] = {};
    const int count = segment_begin(p, segment + 1) - segment_begin(p, segment);
    consume<C>(ring, acc, count, count, row_group, 0, thread);
#pragma unroll
    for (int i = 0; i < C::kAcc; ++i) sum[i] = segment == 0 ? acc[i] : sum[i] + acc[i];
  }
}

template <class C>
__device__ __forceinline__ void consume_tiles(const Sm90Params& p, Ring<C>& ring, float* tile,
                                              float* scales, const int* bounds) {
  const int thread = threadIdx.x % 128;
  const int group = threadIdx.x / 128;
  const int row_group = group % C::kRowGroups;
  const int split_group = group / C::kRowGroups;
  const InputNorm& norm = p.epilogue.input_norm;
  // Big tiles have the register, and no time to wait for factors that were folded before.
  constexpr bool kLate = C::kTileT >= 128;
  float scale = 1.0F;
  for (int i = blockIdx.x; i < p.row_tiles * p.token_tiles; i += gridDim.x) {
    const int2 at = tile_of(i, p.row_tiles, p.token_tiles);
    const int t0 = at.y * C::kTileT;
    const int n0 = at.x * C::kTileN;
    if (i == static_cast<int>(blockIdx.x) || p.token_tiles > 1) {  // otherwise it is there
      scale = begin_scales(norm, t0, min(C::kTileT, p.epilogue.m - t0), threadIdx.x, C::kConsumers,
                           scales);
      if (!kLate) put_scale(norm, scale, C::kTileT, threadIdx.x, scales);
    }
    float acc[C::kAcc] = {};
    if constexpr (C::kInTurn) {
      if (p.in_turn) {
        consume_in_turn<C>(p, ring, acc, row_group, thread);
        put_scale(norm, scale, C::kTileT, threadIdx.x, scales);
        store_slices<C>(p, acc, tile, scales, row_group, thread, t0, n0);
        continue;
      }
    }
    consume<C>(ring, acc, bounds[split_group + 1] - bounds[split_group], iterations<C>(bounds),
               row_group, split_group, thread);
    if (kLate) put_scale(norm, scale, C::kTileT, threadIdx.x, scales);
    if (p.segments > 1) {
      put_acc<C>(acc, tile + split_group * C::kSlotFloats, row_group, thread);
      if (gridDim.z > 1) {
        store_cluster<C>(p, tile, scales, t0, n0);
      } else {
        store_slots<C>(p, tile, C::kSplitGroups, scales, t0, C::kTileT, n0);
      }
      continue;
    }
    store_slices<C>(p, acc, tile, scales, row_group, thread, t0, n0);
  }
}

// ---- kernel --------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    gemm_sm90_kernel(const Sm90Params p, const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap w_map) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[2 * kMaxStages];
  __shared__ int bounds[C::kSplitGroups + 1];  // chunks of the split groups' segments
  __shared__ float scales[C::kTileT];
  grid_dependency_launch();
  const uint32_t full = smem_address(barriers);
  const uint32_t empty = full + kMaxStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(full + i * 8, 2);  // the producers of weights and of x
      mbarrier_init(empty + i * 8, C::kConsumers / 32 * (p.all_lanes ? 32 : 1));
    }
    mbarrier_init_fence();
    for (int q = 0; q <= C::kSplitGroups; ++q) {
      bounds[q] = p.in_turn ? q * p.chunks : segment_begin(p, blockIdx.z * C::kSplitGroups + q);
    }
  }
  __syncthreads();
  if (threadIdx.x >= C::kConsumers) {
    if constexpr (C::kMoveRegisters) give_registers<24>();
    const int warp = (threadIdx.x - C::kConsumers) / 32;
    if (warp < 2 && elect_one()) {
      const uint32_t stages = smem_address(shared);
      if (warp == 0) {
        produce<C, true>(p, &w_map, stages, full, empty, bounds);
      } else {
        produce<C, false>(p, &x_map, stages, full, empty, bounds);
      }
    }
  } else {
    if constexpr (C::kMoveRegisters) take_registers<C::kConsumerRegisters>();
    prefetch_next_norm(p.epilogue.next_norm, p.epilogue.n,
                       tile_of(blockIdx.x, p.row_tiles, p.token_tiles).x * C::kTileN, C::kTileN,
                       threadIdx.x);
    grid_dependency_wait();
    Ring<C> ring{.stages = shared,
                 .base = smem_address(shared),
                 .full = full,
                 .empty = empty,
                 .count = p.stages,
                 .all_lanes = p.all_lanes};
    float* tile = reinterpret_cast<float*>(shared + p.stages * C::kStageBytes);
    consume_tiles<C>(p, ring, tile, scales, bounds);
  }
}

// ---- launch --------------------------------------------------------------------------------------

// How a launch uses the device; 0: as many as fit.
struct Sm90Launch {
  int stages = 0;
  int ctas = 0;  // along x, in all; 0: one for each tile
};

// Whether K's segments go to warpgroups or CTAs of their own.
enum class Segments { in_turn, together };

template <class C>
void run_sm90(const GemmArgs& args, const LaunchContext& context, Segments where,
              Sm90Launch wanted) {
  const PackedMatrix& w = *args.w;
  const int row_tiles = static_cast<int>(ceil_div<int64_t>(w.n, C::kTileN));
  const int token_tiles = ceil_div(args.m, C::kTileT);
  const bool in_turn = w.segments > 1 && where == Segments::in_turn;
  const int depth = in_turn ? 1 : w.segments / C::kSplitGroups;
  TM_CHECK(in_turn ? C::kInTurn : depth * C::kSplitGroups == w.segments && depth <= 8,
           "%d segments of K with %d warpgroups each", w.segments, C::kSplitGroups);
  const int tile_bytes = w.segments == 1 || in_turn ? C::kSlice * C::kStride * 4
                                                    : C::kSplitGroups * C::kSlotFloats * 4;
  // Of each CTA's share the driver takes 1 KiB, barriers and tokens' factors some more.
  constexpr int kReserved = std::max(2048, 1024 + 512 + C::kTileT * 4);
  const int ctas_of_sm = wanted.stages > 0 ? 1 : C::kCtas;
  const int available = (context.max_shared_bytes + 1024) / ctas_of_sm - kReserved - tile_bytes;
  const int most = std::min(kMaxStages, available / C::kStageBytes);
  const int stages = wanted.stages > 0 ? std::min(wanted.stages, most) : most;
  TM_CHECK(stages >= 2, "%d bytes of shared memory are too few for the GEMM",
           context.max_shared_bytes);
  const int64_t tiles = static_cast<int64_t>(row_tiles) * token_tiles;
  const int64_t ctas =
      wanted.ctas > 0 && depth == 1 ? std::min<int64_t>(tiles, wanted.ctas) : tiles;
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
  const Sm90Params params{.weights = static_cast<const char*>(w.weights),
                          .meta = reinterpret_cast<const char*>(w.meta),
                          .row_tiles = row_tiles,
                          .token_tiles = token_tiles,
                          .row_blocks = static_cast<int>(w.n_padded / kPackRows),
                          .chunks = static_cast<int>(w.k_padded / C::kTileK),
                          .segments = w.segments,
                          .stages = stages,
                          .in_turn = in_turn,
                          .blocked_x = blocked_x,
                          .all_lanes = args.all_lanes_arrive,
                          .epilogue = epilogue_params(args)};
  launch_cluster(gemm_sm90_kernel<C>,
                 {.grid = dim3(static_cast<unsigned>(ctas), 1, static_cast<unsigned>(depth)),
                  .threads = C::kThreads,
                  .shared_bytes = stages * C::kStageBytes + tile_bytes},
                 static_cast<unsigned>(depth), context.stream, context.programmatic, params, x_map,
                 w_map);
}

}  // namespace turbomind::cuda
