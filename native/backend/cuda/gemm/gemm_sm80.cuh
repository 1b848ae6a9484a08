// The mma.sync GEMM behind u4_gemm_sm80 and dense_gemm_sm80. Weights are the m16 operand, tokens the
// n8 operand, so one family serves M = 1 and M = 8192 with the same sums (see gemm_table.h).
//
// CTA: kWarpsN x kWarpsT warps; tile kTileN rows of W x kTileT tokens; cp.async ring of kStages
// stages of kTileK columns. Warp: kMT m16 tiles (64 rows apart) x kNT n8 tiles.
// Shared stage: weights, then group words (4-bit), then x [kTileK / 64][kTileT][64] with 16-byte
// pieces exchanged by row (piece ^ row % 8) so that ldmatrix has no bank conflicts.
// Bound: HBM for M up to about 32 (4-bit), then the tensor cores at mma.sync's rate.
#pragma once

#include "backend/cuda/device/dequant.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/mma.cuh"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {

// kGroup128: one group a chunk, known at compile time (4-bit only).
template <class T_, WeightKind kKind_, bool kGroup128_, int kWarpsT_, int kMT_, int kNT_,
          int kStages_>
struct Sm80Config {
  using T = T_;
  static constexpr bool kGroup128 = kGroup128_;
  static constexpr WeightKind kKind = kKind_;
  static constexpr bool kU4 = kKind == WeightKind::awq;
  static constexpr int kWarpsN = 4;
  static constexpr int kWarpsT = kWarpsT_;
  static constexpr int kMT = kMT_;
  static constexpr int kNT = kNT_;
  static constexpr int kStages = kStages_;
  static constexpr int kTileN = kWarpsN * 16 * kMT;
  static constexpr int kTileT = kWarpsT * 8 * kNT;
  static constexpr int kTileK = kU4 ? 128 : 64;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsT;
  static constexpr int kWeightBytes = kU4 ? kMT * 4096 : kTileN * 128;
  static constexpr int kMetaBytes = kU4 ? kMT * 1024 : 0;  // up to four groups of 64 rows
  static constexpr int kXBytes = kTileK / 64 * kTileT * 128;
  static constexpr int kStageBytes = kWeightBytes + kMetaBytes + kXBytes;
  static constexpr int kTileBytes = kTileT * kTileStride<kTileN> * 4;
};

struct Sm80Params {
  const void* weights;
  const uint32_t* meta;
  const void* x;
  int64_t ldx;
  int k;  // columns of x that exist
  int n_padded;
  int k_padded;
  int chunk_groups;  // groups in 128 columns: 1, 2 or 4
  int group_shift;   // log2 of the k16 steps of a group: 3, 2 or 1
  int segments;
  EpilogueParams epilogue;
  SplitParams split;
};

// ---- loads -------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void load_weights(const Sm80Params& p, uint32_t stage, int n0,
                                             int chunk) {
  if constexpr (C::kU4) {
    const int chunks = p.k_padded / C::kTileK;
    const int groups = C::kGroup128 ? 1 : p.chunk_groups;
#pragma unroll
    for (int mt = 0; mt < C::kMT; ++mt) {
      const int row_block = n0 / kPackRows + mt;
      const bool valid = row_block * kPackRows < p.n_padded;
      const int64_t piece = valid ? static_cast<int64_t>(row_block) * chunks + chunk : 0;
      const char* source = static_cast<const char*>(p.weights) + piece * 4096;
#pragma unroll
      for (int turn = 0; turn < 256 / C::kThreads; ++turn) {
        const int i = turn * C::kThreads + threadIdx.x;
        cp_async_16(stage + mt * 4096 + i * 16, source + i * 16, valid);
      }
      const char* meta = reinterpret_cast<const char*>(p.meta) + piece * groups * 256;
      if (threadIdx.x < groups * 16) {  // at most 64
        cp_async_16(stage + C::kWeightBytes + mt * 1024 + threadIdx.x * 16, meta + threadIdx.x * 16,
                    valid);
      }
    }
  } else {
    const auto* weights = static_cast<const typename C::T*>(p.weights);
#pragma unroll
    for (int turn = 0; turn < C::kTileN * 8 / C::kThreads; ++turn) {
      const int i = turn * C::kThreads + threadIdx.x;
      const int row = i / 8;
      const int piece = i % 8;
      const bool valid = n0 + row < p.n_padded;
      const auto* source = weights + static_cast<int64_t>(valid ? n0 + row : 0) * p.k_padded +
                           chunk * 64 + piece * 8;
      cp_async_16(stage + row * 128 + ((piece ^ (row & 7)) << 4), source, valid);
    }
  }
}

template <class C>
__device__ __forceinline__ void load_x(const Sm80Params& p, uint32_t stage, int t0, int chunk) {
  const auto* x = static_cast<const typename C::T*>(p.x);
  constexpr int kPieces = C::kTileK / 8;
  constexpr int kTurns = (C::kTileT * kPieces + C::kThreads - 1) / C::kThreads;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = turn * C::kThreads + threadIdx.x;
    if (C::kTileT * kPieces % C::kThreads != 0 && i >= C::kTileT * kPieces) break;
    const int t = i / kPieces;
    const int piece = i % kPieces;
    const int column = chunk * C::kTileK + piece * 8;
    const bool valid = t0 + t < p.epilogue.m && column < p.k;
    const auto* source = x + (valid ? (t0 + t) * p.ldx + column : 0);
    cp_async_16(stage + C::kWeightBytes + C::kMetaBytes + (piece / 8) * C::kTileT * 128 + t * 128 +
                    (((piece % 8) ^ (t & 7)) << 4),
                source, valid);
  }
}

// ---- compute -----------------------------------------------------------------------------------

// One k16 step: tokens' fragments against kMT weight fragments.
template <class C>
__device__ __forceinline__ void multiply_step(float (&acc)[C::kMT][C::kNT][4],
                                              const uint32_t (&a)[C::kMT][4], uint32_t x_stage,
                                              int warp_t, int step, int lane) {
  const uint32_t x_base = x_stage + (step / 4) * C::kTileT * 128;
  const int k_piece = (step % 4) * 2 + ((lane >> 3) & 1);
  if constexpr (C::kNT == 1) {
    const int t = warp_t * 8 + (lane & 7);
    uint32_t b[2];
    ldmatrix_x2(b, x_base + t * 128 + ((k_piece ^ (t & 7)) << 4));
#pragma unroll
    for (int mt = 0; mt < C::kMT; ++mt) mma_16816<typename C::T>(acc[mt][0], a[mt], b[0], b[1]);
  } else {
#pragma unroll
    for (int j = 0; j < C::kNT; j += 2) {
      const int t = (warp_t * C::kNT + j + (lane >> 4)) * 8 + (lane & 7);
      uint32_t b[4];
      ldmatrix_x4(b, x_base + t * 128 + ((k_piece ^ (t & 7)) << 4));
#pragma unroll
      for (int mt = 0; mt < C::kMT; ++mt) {
        mma_16816<typename C::T>(acc[mt][j], a[mt], b[0], b[1]);
        mma_16816<typename C::T>(acc[mt][j + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void compute_dense(float (&acc)[C::kMT][C::kNT][4], uint32_t stage,
                                              int warp_n, int warp_t, int lane) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t a[C::kMT][4];
#pragma unroll
    for (int mt = 0; mt < C::kMT; ++mt) {
      const int row = mt * 64 + warp_n * 16 + (lane & 15);
      const int piece = step * 2 + (lane >> 4);
      ldmatrix_x4(a[mt], stage + row * 128 + ((piece ^ (row & 7)) << 4));
    }
    multiply_step<C>(acc, a, stage + C::kWeightBytes, warp_t, step, lane);
  }
}

// A chunk of 128 columns.
template <class C>
__device__ __forceinline__ void compute_u4(float (&acc)[C::kMT][C::kNT][4], uint32_t stage,
                                           const char* stage_pointer, int group_shift, int warp_n,
                                           int warp_t, int lane) {
  uint4 words[C::kMT][2];
  const char* meta = stage_pointer + C::kWeightBytes + (warp_n * 16 + lane / 4) * 4;
#pragma unroll
  for (int mt = 0; mt < C::kMT; ++mt) {
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      words[mt][sub] = *reinterpret_cast<const uint4*>(stage_pointer + mt * 4096 + sub * 2048 +
                                                       (warp_n * 32 + lane) * 16);
    }
  }
  if constexpr (C::kGroup128) group_shift = 3;
  const int group_mask = (1 << group_shift) - 1;
  GroupPairs pairs[C::kMT];
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    if (step % 2 == 0 && (step & group_mask) == 0) {
#pragma unroll
      for (int mt = 0; mt < C::kMT; ++mt) {
        const char* word = meta + mt * 1024 + (step >> group_shift) * 256;
        pairs[mt] = group_pairs<typename C::T>(*reinterpret_cast<const uint32_t*>(word),
                                               *reinterpret_cast<const uint32_t*>(word + 32));
      }
    }
    uint32_t a[C::kMT][4];
#pragma unroll
    for (int mt = 0; mt < C::kMT; ++mt) {
      const uint4& four = words[mt][step / 4];
      const uint32_t word = step % 4 == 0   ? four.x
                            : step % 4 == 1 ? four.y
                            : step % 4 == 2 ? four.z
                                            : four.w;
      dequant_word<typename C::T>(word, pairs[mt], a[mt]);
    }
    multiply_step<C>(acc, a, stage + C::kWeightBytes + C::kMetaBytes, warp_t, step, lane);
  }
}

// ---- kernel ------------------------------------------------------------------------------------

// acc → tile [t][n]; the first segment writes, later ones add.
template <class C>
__device__ __forceinline__ void flush(float (&acc)[C::kMT][C::kNT][4], float* tile, bool add,
                                      int warp_n, int warp_t, int lane) {
#pragma unroll
  for (int mt = 0; mt < C::kMT; ++mt) {
#pragma unroll
    for (int j = 0; j < C::kNT; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = mt * 64 + warp_n * 16 + lane / 4 + (i / 2) * 8;
        const int t = (warp_t * C::kNT + j) * 8 + (lane % 4) * 2 + i % 2;
        float* cell = tile + t * kTileStride<C::kTileN> + n;
        *cell = add ? *cell + acc[mt][j][i] : acc[mt][j][i];
        acc[mt][j][i] = 0.0F;
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads) gemm_sm80_kernel(const Sm80Params p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ bool last;
  __shared__ float scales[C::kTileT];
  grid_dependency_launch();
  const int lane = threadIdx.x % 32;
  const int warp_n = threadIdx.x / 32 % C::kWarpsN;
  const int warp_t = threadIdx.x / 32 / C::kWarpsN;
  const int n0 = blockIdx.x * C::kTileN;
  const int t0 = blockIdx.y * C::kTileT;
  const int chunks = p.k_padded / C::kTileK;
  const int first_segment = p.split.split ? blockIdx.z : 0;
  const int end_segment = p.split.split ? first_segment + 1 : p.segments;
  const int begin = first_segment * chunks / p.segments;
  const int end = end_segment * chunks / p.segments;
  // Segments run in turn add up in a tile of their own; otherwise the tile reuses the ring.
  const bool in_turn = end_segment - first_segment > 1;
  float* tile = reinterpret_cast<float*>(shared + (in_turn ? C::kStages * C::kStageBytes : 0));
  const uint32_t ring = smem_address(shared);

  // load: weights do not depend on the kernel before this one, x does
  for (int i = 0; i < C::kStages - 1 && begin + i < end; ++i) {
    load_weights<C>(p, ring + i * C::kStageBytes, n0, begin + i);
  }
  prefetch_next_norm(p.epilogue.next_norm, p.epilogue.n, n0, C::kTileN, threadIdx.x);
  grid_dependency_wait();
  for (int i = 0; i < C::kStages - 1; ++i) {
    if (begin + i < end) load_x<C>(p, ring + i * C::kStageBytes, t0, begin + i);
    cp_async_commit();
  }

  const int tokens = min(C::kTileT, p.epilogue.m - t0);
  const float scale = begin_scale(p.epilogue.input_norm, t0, tokens, threadIdx.x);
  if (folds_strips(p.epilogue.input_norm)) {
    fold_scales<Strips::either>(p.epilogue.input_norm, t0, tokens, threadIdx.x, C::kThreads,
                                scales);
  }

  // compute
  float acc[C::kMT][C::kNT][4] = {};
  int segment = first_segment;
  int segment_end = (segment + 1) * chunks / p.segments;
  int stage = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    cp_async_wait<C::kStages - 2>();
    __syncthreads();
    const int next = chunk + C::kStages - 1;
    if (next < end) {
      const uint32_t slot = ring + (stage == 0 ? C::kStages - 1 : stage - 1) * C::kStageBytes;
      load_weights<C>(p, slot, n0, next);
      load_x<C>(p, slot, t0, next);
    }
    cp_async_commit();
    const uint32_t current = ring + stage * C::kStageBytes;
    if constexpr (C::kU4) {
      compute_u4<C>(acc, current, shared + stage * C::kStageBytes, p.group_shift, warp_n, warp_t,
                    lane);
    } else {
      compute_dense<C>(acc, current, warp_n, warp_t, lane);
    }
    stage = stage + 1 == C::kStages ? 0 : stage + 1;
    if (in_turn && chunk + 1 == segment_end) {
      flush<C>(acc, tile, segment > 0, warp_n, warp_t, lane);
      ++segment;
      segment_end = (segment + 1) * chunks / p.segments;
    }
  }

  // epilogue
  cp_async_wait<0>();
  __syncthreads();
  if (!in_turn) flush<C>(acc, tile, false, warp_n, warp_t, lane);
  put_scale(p.epilogue.input_norm, scale, C::kTileT, threadIdx.x, scales);
  __syncthreads();
  if (p.split.split) {
    const int64_t output_tile = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    if (!meet_segments<C::kTileT, C::kTileN, C::kThreads>(
            tile, p.split, first_segment, p.segments, output_tile,
            min(C::kTileT, p.epilogue.m - t0), threadIdx.x, &last, [] { __syncthreads(); })) {
      return;
    }
  }
  store_rows<typename C::T, C::kTileN>(
      p.epilogue, t0, C::kTileT, n0, C::kTileN, scales, threadIdx.x, C::kThreads,
      [&](int t, int n) {
        return *reinterpret_cast<const float4*>(tile + t * kTileStride<C::kTileN> + n);
      });
}

// ---- launch ------------------------------------------------------------------------------------

template <class C>
bool run_sm80(const GemmArgs& args, const LaunchContext& context) {
  const PackedMatrix& w = *args.w;
  const int row_tiles = static_cast<int>(ceil_div<int64_t>(w.n, C::kTileN));
  const int token_tiles = ceil_div(args.m, C::kTileT);
  const int64_t output_tiles = static_cast<int64_t>(row_tiles) * token_tiles;
  const bool split =
      sharing_pays(w.segments, w.k_padded, output_tiles, C::kTileT, context.num_sms) &&
      output_tiles <= static_cast<int64_t>(args.num_tickets) &&
      static_cast<size_t>(output_tiles) * w.segments * C::kTileT * C::kTileN <= args.partial_floats;
  const int ring = C::kStages * C::kStageBytes;
  const int shared =
      w.segments > 1 && !split ? ring + C::kTileBytes : std::max(ring, C::kTileBytes);
  if (shared + 1024 > context.max_shared_bytes) return false;
  const Sm80Params params{.weights = w.weights,
                          .meta = w.meta,
                          .x = args.x,
                          .ldx = args.ldx,
                          .k = static_cast<int>(w.k % 8 == 0 ? w.k : w.k_padded),
                          .n_padded = static_cast<int>(w.n_padded),
                          .k_padded = static_cast<int>(w.k_padded),
                          .chunk_groups = w.group_size > 0 ? kChunkColumns / w.group_size : 0,
                          .group_shift = w.group_size == 32   ? 1
                                         : w.group_size == 64 ? 2
                                                              : 3,
                          .segments = w.segments,
                          .epilogue = epilogue_params(args),
                          .split = {args.partials, args.tickets, split}};
  launch(gemm_sm80_kernel<C>,
         {.grid = dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(token_tiles),
                       static_cast<unsigned>(split ? w.segments : 1)),
          .threads = C::kThreads,
          .shared_bytes = shared},
         context.stream, context.programmatic, params);
  return true;
}

// Token tiles by M; a configuration that does not fit this device's shared memory passes on to the
// next smaller one. The sums are the same in all of them.
template <class T, WeightKind kKind, bool kGroup128>
void run_sm80_for(const GemmArgs& args, const LaunchContext& context) {
  const int m = args.m;
  constexpr bool kU4 = kKind == WeightKind::awq;
  if (m <= 8 && run_sm80<Sm80Config<T, kKind, kGroup128, 1, 1, 1, kU4 ? 6 : 6>>(args, context))
    return;
  if (m <= 16 && run_sm80<Sm80Config<T, kKind, kGroup128, 1, 1, 2, kU4 ? 5 : 6>>(args, context))
    return;
  if (m <= 32 && run_sm80<Sm80Config<T, kKind, kGroup128, 1, 1, 4, 4>>(args, context)) return;
  if (m > 64 && run_sm80<Sm80Config<T, kKind, kGroup128, 2, 2, 8, kU4 ? 3 : 4>>(args, context))
    return;
  TM_CHECK((run_sm80<Sm80Config<T, kKind, kGroup128, 1, 1, 8, 3>>(args, context)),
           "%d bytes of shared memory are too few for the GEMM", context.max_shared_bytes);
}

}  // namespace turbomind::cuda
