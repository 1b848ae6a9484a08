// The wgmma GEMM behind u4_gemm_sm90 and dense_gemm_sm90. Weights are the m64 operand (4-bit ones
// dequantised into registers, 16-bit ones from shared memory), tokens the n operand, so one family
// serves M = 1 and M = 8192 with the same sums (see gemm_table.h).
//
// CTA: consumer warpgroups of 64 rows of W each, and two producer warps, of which one thread each moves
// weights and x with bulk copies: packed weights and group words as plain runs, dense weights and x through tensor
// maps with the 128-byte swizzle, into a ring of stages with a full and an empty barrier each. Weights
// of the first stages are fetched before the kernel waits for the one before it, and the kernel after
// it may start at once, so that in a graph of dependent launches weights never stop streaming. Where the
// producers are a whole warpgroup its other two warps fold a split norm's factors, with few tokens one more
// warp (Factors).
//
// The segments of K go, by configuration and launch, to warpgroups of one CTA (kSplitGroups), to the
// CTAs of a cluster along z, or one after the other to the same warpgroup; they are always added in
// order.
// Bound: HBM for M up to about 64 (4-bit), then the tensor cores.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>

#include "backend/cuda/gemm/cluster_launch.h"
#include "backend/cuda/gemm/produce_sm90.cuh"
#include "backend/cuda/gemm/store_sm90.cuh"
#include "backend/cuda/gemm/tensor_map.h"

namespace turbomind::cuda {

// ---- consumers -------------------------------------------------------------------------------------

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
    } else if (C::kRowGroups > 2 && row_group >= tile.height) {
      skip<C>(ring, iterations<C>(p, false), thread);  // and then to the meeting
    } else {
      const int segment = first_segment<C>() + split_group;
      const int count = tile.whole ? p.chunks : p.bounds[segment + 1] - p.bounds[segment];
      consume<C>(ring, acc, count, iterations<C>(p, tile.whole), row_group, split_group, thread);
    }
    const float* scales = factors.put(p.epilogue.input_norm, tile.token_tile, group, thread);
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
  __shared__ uint64_t barriers[2 * kMaxStages + 5];
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
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(ready + i * 8, Factors<C>::kFolders / 32 * kWarpArrivals);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (gridDim.z > 1) cluster_arrive();
  const int warp = __shfl_sync(0xffffffffU, threadIdx.x / 32, 0);
  if (warp >= C::kConsumers / 32) {
    if constexpr (C::kMoveRegisters) give_registers<C::kProducerRegisters>();
    const int producer = warp - C::kConsumers / 32;
    if (producer < 2) {
      if (elect_one()) {
        const uint32_t stages = smem_address(shared);
        if (producer == 0) {
          produce<C, true>(p, &w_map, stages, full, empty, over);
        } else {
          produce<C, false>(p, &x_map, stages, full, empty, over);
        }
      }
    } else if constexpr (Factors<C>::kBeside) {
      if (folds_strips(p.epilogue.input_norm)) {
        grid_dependency_wait();
        Factors<C>::fold_beside(p, scales, ready, threadIdx.x - C::kConsumers - 64);
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
    if constexpr (!Factors<C>::kBeside) {
      if (folds_strips(p.epilogue.input_norm)) factors.fold(p, 0, scales, ready, threadIdx.x);
    }
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
  // So many row tiles, the first with kRowGroups blocks of 64 rows, the others with one less; 0: as many as
  // there are with kRowGroups.
  int row_tiles = 0;
  bool even = false;  // CTAs have equal shares of the row blocks, alone: for one token tile
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
  const int row_blocks = static_cast<int>(w.n_padded / kPackRows);
  const int row_tiles =
      wanted.row_tiles > 0 ? wanted.row_tiles : static_cast<int>(ceil_div<int64_t>(w.n, C::kTileN));
  const int tall_tiles =
      wanted.row_tiles > 0 ? row_blocks - (C::kRowGroups - 1) * row_tiles : row_tiles;
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
  const bool even = wanted.even && alone && token_tiles == 1;
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
                    .tall_tiles = tall_tiles,
                    .token_tiles = token_tiles,
                    .row_blocks = row_blocks,
                    .chunks = static_cast<int>(w.k_padded / C::kTileK),
                    .segments = w.segments,
                    .stages = stages,
                    .whole = static_cast<int>(whole),
                    .even = even,
                    .blocked_x = blocked_x,
                    .bounds = {},
                    .epilogue = epilogue_params(args)};
  InputNorm& norm = params.epilogue.input_norm;
  const auto has_strips = [](int columns) {
    return C::kStrips == Strips::either || (columns == kWideStrip) == (C::kStrips == Strips::wide);
  };
  TM_CHECK(args.next_norm.weight == nullptr || has_strips(args.next_norm.strip_columns),
           "%d tokens that leave strips of %d columns", args.m, args.next_norm.strip_columns);
  const bool wide = norm.strip_columns == kWideStrip;
  const bool folds =
      token_tiles <= Factors<C>::kTokenTiles &&
      (Factors<C>::kBeside ? wide == Factors<C>::kWide
                           : has_strips(norm.strip_columns) &&
                                 (wide || few_strips(norm.columns, norm.strip_columns, args.m)));
  if (folds_strips(norm) && !folds) {
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
