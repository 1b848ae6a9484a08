// 4-bit weights for at most 16 tokens, groups of 128: nothing but streaming weights. A warp has 16 or 32
// rows of W and one segment of K; each lane copies the 16-byte pieces that it alone will dequantise into
// a ring of the warp's own, so between the start and the end of a tile no warp waits for another one's
// weights. x of one token travels in the same ring; of more tokens one more warp moves it in slabs that
// all warps read. Another folds the factors of a split norm, which nobody needs before the tile's end.
//
// K's segments go to warps of one CTA (kSplit) or to the CTAs of a cluster along z; their sums meet in
// shared memory and are added in order. The rings are filled before the kernel waits for the one before
// it, so that the end of that one, which reads nothing from DRAM any more, costs little.
// Bound: HBM; for matrices of few MB the latency from the end of the kernel before to the end of this.
// Same bits as gemm_sm90.cuh. Device code for sm_90a.
#pragma once

#include <algorithm>

#include "backend/cuda/device/hopper.cuh"
#include "backend/cuda/gemm/cluster_launch.h"
#include "backend/cuda/gemm/epilogue.cuh"
#include "backend/cuda/gemm/u4_stream_warp_sm90.cuh"

namespace turbomind::cuda {

// ---- the end of a tile ---------------------------------------------------------------------------

// The meeting of a CTA's consumers, to which the factors come too.
template <class C>
__device__ __forceinline__ void stream_sync() {
  asm volatile("bar.sync 1, %0;\n" ::"n"(C::kConsumers + 32) : "memory");
}
// The warp of the factors.
template <class C>
__device__ __forceinline__ void stream_factors(const StreamParams& p, int lane, float* scales) {
  grid_dependency_wait();
  const InputNorm& norm = p.epilogue.input_norm;
  const int m = p.epilogue.m;
  if (folds_strips(norm)) {
    fold_scales<Strips::narrow, 10>(norm, 0, m, lane, 32, scales);
  } else {
    put_scale(norm, begin_scale(norm, 0, m, lane), 8 * C::kTokenTiles, lane, scales);
  }
  __syncwarp();
  if (gridDim.z == 1) {
    asm volatile("bar.arrive 1, %0;\n" ::"n"(C::kConsumers + 32) : "memory");
  } else {
    cluster_arrive();
  }
}

// Sums of a warp → slot [token][row] of its segment.
template <class C>
__device__ __forceinline__ void put_sums(const float (&acc)[C::kGroups][C::kTokenTiles][4],
                                         float* slot, int row_warp, int m, int lane) {
#pragma unroll
  for (int g = 0; g < C::kGroups; ++g) {
#pragma unroll
    for (int tile = 0; tile < C::kTokenTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = tile * 8 + lane % 4 * 2 + i % 2;
        const int row = (row_warp * C::kGroups + g) * 16 + lane / 4 + i / 2 * 8;
        if (token < m) slot[token * C::kStride + row] = acc[g][tile][i];
      }
    }
  }
}

// Output `index` of a tile: a token and a row of W, the gate's row of a gated pair.
struct StreamOutput {
  int token;
  int row;
};
template <class C>
__device__ __forceinline__ StreamOutput stream_output(int index, bool gated) {
  if (!gated) return {index / C::kTileN, index % C::kTileN};
  const int o = index % (C::kTileN / 2);
  return {index / (C::kTileN / 2), o / 8 * 16 + o % 8};
}

template <class C>
__device__ __forceinline__ float sum_segments(const float* slots, int slot_floats, int cell,
                                              int segments) {
  if (gridDim.z == 1) {
    float sum = slots[cell];
#pragma unroll 4
    for (int s = 1; s < segments; ++s) sum += slots[s * slot_floats + cell];
    return sum;
  }
  const uint32_t address = smem_address(slots + cell);
  float sum = cluster_load_float(cluster_address(address, 0));
#pragma unroll 4
  for (int s = 1; s < segments; ++s) {
    sum += cluster_load_float(cluster_address(address, s));
  }
  return sum;
}

// ---- kernel --------------------------------------------------------------------------------------

// One thread: x, slab by slab, for all segments of the CTA.
template <class C>
__device__ __forceinline__ void stream_x(const StreamParams& p, uint32_t slabs, uint32_t full,
                                         uint32_t empty) {
  grid_dependency_wait();
  const int first = blockIdx.z * C::kSplit;
  const int m = p.epilogue.m;
  int buffer = 0;
  uint32_t parity = 1;  // of the release before the first: waits for it return at once
  for (int done = 0;; done += p.slab) {
    int chunks = 0;
    for (int q = 0; q < C::kSplit; ++q) {
      chunks += max(0, min(p.slab, p.begin(first + q + 1) - p.begin(first + q) - done));
    }
    if (chunks == 0) return;
    mbarrier_wait(empty + buffer * 8, parity);
    mbarrier_expect_bytes(full + buffer * 8, chunks * m * 256);
    for (int q = 0; q < C::kSplit; ++q) {
      const int begin = p.begin(first + q) + done;
      const int count = min(p.slab, p.begin(first + q + 1) - begin);
      if (count <= 0) continue;
      uint32_t to = slabs + (buffer * C::kSplit + q) * m * p.x_row_bytes;
      const char* from = p.x + static_cast<int64_t>(begin) * 256;
#pragma unroll 1
      for (int t = 0; t < m; ++t) {
        bulk_load(to, from, count * 256, full + buffer * 8);
        to += p.x_row_bytes;
        from += p.x_stride;
      }
    }
    if (p.slabs == 2) buffer ^= 1;
    if (buffer == 0) parity ^= 1;
  }
}

template <class C>
__device__ __forceinline__ void store_tile(const StreamParams& p, const float* slots,
                                           const float* scales, int first_output,
                                           OutputTerms terms) {
  using T = typename C::T;
  const EpilogueParams& e = p.epilogue;
  const bool gated = e.kind == Epilogue::silu_mul;
  const int outputs = e.m * (gated ? C::kTileN / 2 : C::kTileN);
  const int slot_floats = e.m * C::kStride;
  for (int index = first_output; index < outputs; index += gridDim.z * C::kConsumers) {
    const StreamOutput o = stream_output<C>(index, gated);
    const int row = blockIdx.x * C::kTileN + o.row;
    if (row >= e.n) continue;
    if (index != first_output) terms = load_terms<T>(e, o.token, row);
    const int cell = o.token * C::kStride + o.row;
    const float scale = scales[o.token];
    const float sum = sum_segments<C>(slots, slot_floats, cell, p.segments) * scale;
    const float up =
        gated ? sum_segments<C>(slots, slot_floats, cell + 8, p.segments) * scale : 0.0F;
    store_output<T>(e, terms, o.token, row, finish_value(e, terms, sum, up));
  }
}

template <class C>
__device__ __forceinline__ void consume_stream(const StreamParams& p, char* shared, int slab_total,
                                               uint32_t full, float* scales) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int split = warp / C::kRowWarps;
  const int row_warp = warp % C::kRowWarps;
  const int segment = blockIdx.z * C::kSplit + split;
  const int first_chunk = p.begin(segment);
  const int count = p.begin(segment + 1) - first_chunk;
  const EpilogueParams& e = p.epilogue;
  const int m = e.m;
  // Of 16 rows. Past the last ones, those are read again: their sums are never stored.
  const int group = min((static_cast<int>(blockIdx.x) * C::kRowWarps + row_warp) * C::kGroups,
                        (e.n + kPackRows - 1) / kPackRows * 4 - C::kGroups);
  const int64_t piece = static_cast<int64_t>(group / 4) * p.chunks + first_chunk;
  const char* x_begin = p.x + static_cast<int64_t>(first_chunk) * 256;
  WeightStream<C> stream(p.weights + piece * 4096 + group % 4 * 512,
                         p.meta + piece * 256 + group % 4 * 64, x_begin,
                         smem_address(shared) + slab_total + warp * C::kRingBytes, count, lane);
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) stream.template issue<false>();
  prefetch_next_norm(e.next_norm, e.n, blockIdx.x * C::kTileN, C::kTileN, threadIdx.x);
  if constexpr (!C::kOwnX) __syncthreads();
  grid_dependency_wait();
  if constexpr (C::kOwnX) load_first_x<C>(x_begin, stream.ring, count, lane);

  // What the first output needs beside its sum travels while the sum is made.
  const int first_output = blockIdx.z * C::kConsumers + threadIdx.x;
  const bool gated = e.kind == Epilogue::silu_mul;
  const StreamOutput out = stream_output<C>(first_output, gated);
  const int row = blockIdx.x * C::kTileN + out.row;
  OutputTerms terms;
  if (out.token < m && row < e.n) terms = load_terms<typename C::T>(e, out.token, row);

  // Tokens that do not exist are read as the last one; their sums are never stored.
  const int token = min(C::kTokenTiles == 1 ? lane & 7 : (lane >> 4) * 8 + (lane & 7), m - 1);
  const int column = C::kTokenTiles == 1 ? lane >> 3 : (lane >> 3) & 1;
  const uint32_t x =
      column * 16 + (C::kOwnX ? stream.ring + C::kXAt
                              : smem_address(shared) + (split * m + token) * p.x_row_bytes);
  float acc[C::kGroups][C::kTokenTiles][4] = {};
  stream_segment<C>(p, stream, acc, count, x, C::kSplit * m * p.x_row_bytes, full, full + 16);

  float* slots = reinterpret_cast<float*>(shared + slab_total + C::kConsumers / 32 * C::kRingBytes);
  put_sums<C>(acc, slots + split * m * C::kStride, row_warp, m, lane);
  if (gridDim.z == 1) {
    stream_sync<C>();
    store_tile<C>(p, slots, scales, first_output, terms);
  } else {
    cluster_sync();
    store_tile<C>(p, slots, scales, first_output, terms);
    __syncwarp();
    cluster_sync();  // nobody leaves while its slots are read
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas) u4_stream_kernel(const StreamParams p) {
  extern __shared__ __align__(1024) char shared[];  // slabs of x | rings | slots
  __shared__ float scales[8 * C::kTokenTiles];
  grid_dependency_launch();
  // A warp's index known to be uniform: the loop then keeps its copies' descriptor in uniform registers.
  const int warp = __shfl_sync(~0U, threadIdx.x / 32, 0);
  if constexpr (C::kOwnX) {
    if (warp < C::kConsumers / 32) {
      consume_stream<C>(p, shared, 0, 0, scales);
    } else {
      stream_factors<C>(p, threadIdx.x % 32, scales);
    }
  } else {
    __shared__ uint64_t barriers[4];
    const int slab_total = p.slabs * C::kSplit * p.epilogue.m * p.x_row_bytes;
    const uint32_t full = smem_address(barriers);
    const uint32_t empty = full + 16;
    if (warp < C::kConsumers / 32) {
      consume_stream<C>(p, shared, slab_total, full, scales);
      return;
    }
    if (warp == C::kConsumers / 32) {
      __syncthreads();
      stream_factors<C>(p, threadIdx.x % 32, scales);
      return;
    }
    const bool elected = elect_one();
    if (elected) {
      for (int i = 0; i < 2; ++i) {
        mbarrier_init(full + i * 8, 1);
        mbarrier_init(empty + i * 8, C::kConsumers / 32 * kWarpArrivals);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    if (elected) stream_x<C>(p, smem_address(shared), full, empty);
  }
}

// ---- launch --------------------------------------------------------------------------------------

// least_bytes: shared memory that a CTA takes, more than it needs if it is to have an SM for itself and
// few others. x_bytes: for x, about.
template <class C>
void run_stream(const GemmArgs& args, const LaunchContext& context, int least_bytes,
                int x_bytes = 24 * 1024) {
  const PackedMatrix& w = *args.w;
  const int chunks = static_cast<int>(w.k_padded / kChunkColumns);
  const int depth = w.segments / C::kSplit;
  TM_CHECK(depth * C::kSplit == w.segments && depth <= 8 && (depth == 1 || C::kSplit == 1) &&
               args.m <= (C::kOwnX ? 1 : 8 * C::kTokenTiles),
           "%d segments of K, %d a CTA; %d tokens", w.segments, C::kSplit, args.m);
  const int longest = ceil_div(chunks, w.segments);
  const int of_chunk = C::kSplit * args.m * 256;
  const bool whole = longest * of_chunk <= x_bytes;
  const int slab = whole ? longest : std::max(1, x_bytes / (2 * of_chunk));
  const StreamParams params{.weights = static_cast<const char*>(w.weights),
                            .meta = reinterpret_cast<const char*>(w.meta),
                            .x = static_cast<const char*>(args.x),
                            .x_stride = args.ldx * 2,
                            .chunks = chunks,
                            .segments = w.segments,
                            .slab = slab,
                            .x_row_bytes = slab * 256 + 16,
                            .slabs = whole ? 1 : 2,
                            .epilogue = epilogue_params(args)};
  const int slab_total = C::kOwnX ? 0 : params.slabs * C::kSplit * args.m * params.x_row_bytes;
  const int shared =
      slab_total + C::kConsumers / 32 * C::kRingBytes + C::kSplit * args.m * C::kStride * 4;
  launch_cluster(u4_stream_kernel<C>,
                 {.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(w.n, C::kTileN)), 1,
                               static_cast<unsigned>(depth)),
                  .threads = C::kThreads,
                  .shared_bytes = std::max(shared, least_bytes)},
                 static_cast<unsigned>(depth), context.stream, context.programmatic, params);
}

}  // namespace turbomind::cuda
