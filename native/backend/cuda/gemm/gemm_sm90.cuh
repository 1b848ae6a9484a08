// The wgmma GEMM behind u4_gemm_sm90 and dense_gemm_sm90. Weights are the m64 operand (4-bit ones
// dequantised into registers, 16-bit ones from shared memory), tokens the n operand, so one family
// serves M = 1 and M = 8192 with the same sums (see gemm_table.h).
//
// CTA: kGroups consumer warpgroups of 64 rows of W each, and one producer warp, whose lane 0 moves
// everything with bulk copies: packed weights and group words as plain runs, dense weights and x
// through tensor maps with the 128-byte swizzle. A ring of stages of kTileK columns, a full and an
// empty barrier each. Weights of the first stages are fetched before the kernel waits for the one
// before it.
// Shared stage: x [kTileK / 64][kTileT][64] | weights | group words, each 1024-aligned.
// Bound: HBM for M up to about 64 (4-bit), then the tensor cores.
#pragma once

#include <algorithm>

#include "backend/cuda/device/dequant.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/wgmma.cuh"
#include "backend/cuda/gemm/epilogue.cuh"
#include "backend/cuda/gemm/tensor_map.h"

namespace turbomind::cuda {

inline constexpr int kMaxStages = 8;

// kGroupSize: columns that share a scale, 0 for dense weights.
template <class T_, int kGroupSize_, int kGroups_, int kTileT_>
struct Sm90Config {
  using T = T_;
  static constexpr int kGroupSize = kGroupSize_;
  static constexpr bool kU4 = kGroupSize > 0;
  static constexpr int kGroups = kGroups_;
  static constexpr int kTileN = 64 * kGroups;
  static constexpr int kTileT = kTileT_;
  static constexpr int kTileK = kU4 ? 128 : 64;
  static constexpr int kConsumers = 128 * kGroups;
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kXBytes = kTileK / 64 * kTileT * 128;
  static constexpr int kWeightBytes = kU4 ? kGroups * 4096 : kTileN * 128;
  static constexpr int kMetaBlockBytes = kU4 ? kTileK / kGroupSize * 256 : 0;  // of 64 rows
  static constexpr int kLoadBytes = kXBytes + kWeightBytes + kGroups * kMetaBlockBytes;
  static constexpr int kStageBytes = (kLoadBytes + 1023) / 1024 * 1024;
  static constexpr int kTileBytes = kTileT * kTileStride<kTileN> * 4;
  static constexpr int kAcc = kTileT / 2;  // accumulators of a thread
};

struct Sm90Params {
  const char* weights;  // packed 4-bit only
  const char* meta;
  int row_tiles;
  int token_tiles;
  int row_blocks;  // of 64 rows that exist
  int chunks;      // k_padded / kTileK
  int segments;
  int stages;
  bool scale_is_bf16;
  EpilogueParams epilogue;
  SplitParams split;
};

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

template <class C>
__device__ __forceinline__ void produce_weights(const Sm90Params& p, const CUtensorMap* w_map,
                                                uint32_t stage, uint32_t full, int row_tile,
                                                int chunk) {
  mbarrier_expect_bytes(full, C::kLoadBytes);
  const uint32_t weights = stage + C::kXBytes;
  if constexpr (C::kU4) {
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      // A block past the last one is loaded from the last: its results are never stored.
      const int block = min(row_tile * C::kGroups + g, p.row_blocks - 1);
      const int64_t piece = static_cast<int64_t>(block) * p.chunks + chunk;
      bulk_load(weights + g * 4096, p.weights + piece * 4096, 4096, full);
      bulk_load(weights + C::kWeightBytes + g * C::kMetaBlockBytes,
                p.meta + piece * C::kMetaBlockBytes, C::kMetaBlockBytes, full);
    }
  } else {
    tensor_load_2d(weights, w_map, chunk * 64, row_tile * C::kTileN, full);
  }
}

template <class C>
__device__ __forceinline__ void produce_x(const CUtensorMap* x_map, uint32_t stage, uint32_t full,
                                          int token_tile, int chunk) {
#pragma unroll
  for (int sub = 0; sub < C::kTileK / 64; ++sub) {
    tensor_load_2d(stage + sub * C::kTileT * 128, x_map, chunk * C::kTileK + sub * 64,
                   token_tile * C::kTileT, full);
  }
}

template <class C>
__device__ __forceinline__ void produce(const Sm90Params& p, const CUtensorMap* w_map,
                                        const CUtensorMap* x_map, uint32_t ring, uint32_t full,
                                        uint32_t empty, int2 tile, int begin, int end) {
  const int early = min(p.stages, end - begin);
  for (int i = 0; i < early; ++i) {
    produce_weights<C>(p, w_map, ring + i * C::kStageBytes, full + i * 8, tile.x, begin + i);
  }
  grid_dependency_wait();
  for (int i = 0; i < early; ++i) {
    produce_x<C>(x_map, ring + i * C::kStageBytes, full + i * 8, tile.y, begin + i);
  }
  int stage = early == p.stages ? 0 : early;
  uint32_t parity = 0;  // of the first release of each stage
  for (int chunk = begin + early; chunk < end; ++chunk) {
    mbarrier_wait(empty + stage * 8, parity);
    produce_weights<C>(p, w_map, ring + stage * C::kStageBytes, full + stage * 8, tile.x, chunk);
    produce_x<C>(x_map, ring + stage * C::kStageBytes, full + stage * 8, tile.y, chunk);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// ---- consumers -----------------------------------------------------------------------------------

// One chunk of 4-bit weights. `sums` holds a group's product of integers and tokens.
template <class C>
__device__ __forceinline__ void consume_u4(float (&acc)[C::kAcc], float (&sums)[C::kAcc],
                                           uint32_t x, const char* weights, const char* meta,
                                           bool scale_is_bf16, int thread) {
  constexpr int kSteps = C::kGroupSize / 16;       // k16 steps of a group
  constexpr int kBatch = kSteps < 4 ? kSteps : 4;  // steps whose fragments live together
  const int row = thread / 32 * 16 + thread % 32 / 4;
  const uint4 words[2] = {*reinterpret_cast<const uint4*>(weights + thread * 16),
                          *reinterpret_cast<const uint4*>(weights + 2048 + thread * 16)};
#pragma unroll
  for (int group = 0; group < 8 / kSteps; ++group) {
    const uint32_t low = *reinterpret_cast<const uint32_t*>(meta + group * 256 + row * 4);
    const uint32_t high = *reinterpret_cast<const uint32_t*>(meta + group * 256 + row * 4 + 32);
    const uint32_t zero_low = zero_pair<typename C::T>(low);
    const uint32_t zero_high = zero_pair<typename C::T>(high);
    uint32_t a[kSteps / kBatch][kBatch][4];
#pragma unroll
    for (int batch = 0; batch < kSteps / kBatch; ++batch) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int step = group * kSteps + batch * kBatch + i;
        const uint4& four = words[step / 4];
        const uint32_t word = step % 4 == 0   ? four.x
                              : step % 4 == 1 ? four.y
                              : step % 4 == 2 ? four.z
                                              : four.w;
        dequant_word<typename C::T>(word, zero_low, zero_high, a[batch][i]);
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int step = group * kSteps + batch * kBatch + i;
        const uint64_t b = wgmma_descriptor(x + (step / 4) * C::kTileT * 128 + (step % 4) * 32);
        Wgmma<typename C::T, C::kTileT>::rs(sums, a[batch][i], b, batch == 0 && i == 0);
      }
      wgmma_commit();
    }
    const float scale_low = group_scale(low, scale_is_bf16);
    const float scale_high = group_scale(high, scale_is_bf16);
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < C::kAcc; ++i) {
      acc[i] = fmaf(i % 4 < 2 ? scale_low : scale_high, sums[i], acc[i]);
    }
  }
}

template <class C>
__device__ __forceinline__ void consume_dense(float (&acc)[C::kAcc], uint32_t x, uint32_t weights,
                                              bool first) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    Wgmma<typename C::T, C::kTileT>::ss(acc, wgmma_descriptor(weights + step * 32),
                                        wgmma_descriptor(x + step * 32), first && step == 0);
  }
  wgmma_commit();
}

// acc → tile [t][n]; the first segment writes, later ones add.
template <class C>
__device__ __forceinline__ void flush_sm90(float (&acc)[C::kAcc], float* tile, bool add, int group,
                                           int thread) {
  const int n = group * 64 + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < C::kAcc; ++i) {
    const int t = i / 4 * 8 + (thread % 4) * 2 + i % 2;
    float* cell = tile + t * kTileStride<C::kTileN> + n + (i % 4 / 2) * 8;
    *cell = add ? *cell + acc[i] : acc[i];
    acc[i] = 0.0F;
  }
}

template <class C>
__device__ __forceinline__ void consume(const Sm90Params& p, char* ring, uint32_t full,
                                        uint32_t empty, float* tile, bool in_turn, int segment,
                                        int begin, int end) {
  const int group = threadIdx.x / 128;
  const int thread = threadIdx.x % 128;
  const uint32_t base = smem_address(ring);
  float acc[C::kAcc] = {};
  float sums[C::kU4 ? C::kAcc : 1];
  int segment_end = (segment + 1) * p.chunks / p.segments;
  bool first = true;
  int stage = 0;
  int previous = -1;
  uint32_t parity = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    mbarrier_wait(full + stage * 8, parity);
    const uint32_t x = base + stage * C::kStageBytes;
    if constexpr (C::kU4) {
      const char* weights = ring + stage * C::kStageBytes + C::kXBytes;
      consume_u4<C>(acc, sums, x, weights + group * 4096,
                    weights + C::kWeightBytes + group * C::kMetaBlockBytes, p.scale_is_bf16,
                    thread);
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(empty + stage * 8);
    } else {
      consume_dense<C>(acc, x, x + C::kXBytes + group * 8192, first);
      first = false;
      wgmma_wait<1>();  // the chunk before this one has been read
      if (previous >= 0 && thread % 32 == 0) mbarrier_arrive(empty + previous * 8);
      previous = stage;
    }
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
    if (in_turn && chunk + 1 == segment_end) {
      if constexpr (!C::kU4) wgmma_wait<0>();
      flush_sm90<C>(acc, tile, segment > 0, group, thread);
      ++segment;
      segment_end = (segment + 1) * p.chunks / p.segments;
      first = true;
    }
  }
  if constexpr (!C::kU4) wgmma_wait<0>();
  if (in_turn) return;
  // The tile reuses the ring: every consumer has read its last stage.
  asm volatile("bar.sync 1, %0;\n" ::"n"(C::kConsumers) : "memory");
  flush_sm90<C>(acc, tile, false, group, thread);
}

// ---- kernel --------------------------------------------------------------------------------------

template <class C>
__global__ void __launch_bounds__(C::kThreads)
    gemm_sm90_kernel(const Sm90Params p, const __grid_constant__ CUtensorMap x_map,
                     const __grid_constant__ CUtensorMap w_map) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[2 * kMaxStages];
  __shared__ bool last;
  const int2 tile_idx = tile_of(blockIdx.x, p.row_tiles, p.token_tiles);
  const int first_segment = p.split.split ? blockIdx.z : 0;
  const int end_segment = p.split.split ? first_segment + 1 : p.segments;
  const int begin = first_segment * p.chunks / p.segments;
  const int end = end_segment * p.chunks / p.segments;
  const bool in_turn = end_segment - first_segment > 1;
  const uint32_t full = smem_address(barriers);
  const uint32_t empty = full + kMaxStages * 8;
  float* tile = reinterpret_cast<float*>(shared + (in_turn ? p.stages * C::kStageBytes : 0));

  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(full + i * 8, 1);
      mbarrier_init(empty + i * 8, C::kConsumers / 32);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x >= C::kConsumers) {
    if (threadIdx.x == C::kConsumers) {
      produce<C>(p, &w_map, &x_map, smem_address(shared), full, empty, tile_idx, begin, end);
    }
    return;
  }
  grid_dependency_wait();
  grid_dependency_launch();
  consume<C>(p, shared, full, empty, tile, in_turn, first_segment, begin, end);

  // epilogue
  const auto sync = [] { asm volatile("bar.sync 1, %0;\n" ::"n"(C::kConsumers) : "memory"); };
  sync();
  const int t0 = tile_idx.y * C::kTileT;
  if (p.split.split) {
    const int64_t output_tile = static_cast<int64_t>(tile_idx.y) * p.row_tiles + tile_idx.x;
    if (!meet_segments<C::kTileT, C::kTileN, C::kConsumers>(
            tile, p.split, first_segment, p.segments, output_tile,
            min(C::kTileT, p.epilogue.m - t0), threadIdx.x, &last, sync)) {
      return;
    }
  }
  store_tile<typename C::T, C::kTileT, C::kTileN, C::kConsumers>(
      tile, p.epilogue, t0, tile_idx.x * C::kTileN, threadIdx.x);
}

// ---- launch --------------------------------------------------------------------------------------

// `wanted_stages`: more only cost shared memory that other CTAs of the SM could use.
template <class C>
void run_sm90(const GemmArgs& args, const LaunchContext& context, int wanted_stages) {
  const PackedMatrix& w = *args.w;
  const int row_tiles = static_cast<int>(ceil_div<int64_t>(w.n, C::kTileN));
  const int token_tiles = ceil_div(args.m, C::kTileT);
  const int64_t output_tiles = static_cast<int64_t>(row_tiles) * token_tiles;
  const bool split =
      sharing_pays(w.segments, w.k_padded, output_tiles, C::kTileT, context.num_sms) &&
      output_tiles <= static_cast<int64_t>(args.num_tickets) &&
      static_cast<size_t>(output_tiles) * w.segments * C::kTileT * C::kTileN <= args.partial_floats;
  const bool in_turn = w.segments > 1 && !split;
  const int available = context.max_shared_bytes - 1024 - (in_turn ? C::kTileBytes : 0);
  const int stages = std::min({wanted_stages, kMaxStages, available / C::kStageBytes});
  TM_CHECK(stages >= 2, "%d bytes of shared memory are too few for the GEMM",
           context.max_shared_bytes);
  const int ring = stages * C::kStageBytes;
  const int64_t k = w.k % 8 == 0 ? w.k : w.k_padded;
  const CUtensorMap x_map = make_tensor_map(args.x, w.dtype, args.m, k, args.ldx, C::kTileT, 64);
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
                          .scale_is_bf16 = w.scale_is_bf16,
                          .epilogue = epilogue_params(args),
                          .split = {args.partials, args.tickets, split}};
  launch(gemm_sm90_kernel<C>,
         {.grid = dim3(static_cast<unsigned>(output_tiles), 1,
                       static_cast<unsigned>(split ? w.segments : 1)),
          .threads = C::kThreads,
          .shared_bytes = in_turn ? ring + C::kTileBytes : std::max(ring, C::kTileBytes)},
         context.stream, context.programmatic, params, x_map, w_map);
}

}  // namespace turbomind::cuda
