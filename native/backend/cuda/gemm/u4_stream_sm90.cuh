// 4-bit weights for at most 16 tokens, groups of 128: nothing but streaming weights. A warp has 16 rows
// of W and one segment of K; each lane copies the 16-byte pieces that it alone will dequantise into a
// ring of the warp's own, so between the start and the end of a tile no warp waits for another one's
// weights. One more warp moves x in slabs that all warps read.
//
// K's segments go to warps of one CTA (kSplit) or to the CTAs of a cluster along z; their sums meet in
// shared memory and are added in order. The rings are filled before the kernel waits for the one before
// it, so that the end of that one, which reads nothing from DRAM any more, costs little.
// Bound: HBM; for matrices of few MB the latency from the end of the kernel before to the end of this.
// Same bits as gemm_sm90.cuh. Device code for sm_90a.
#pragma once

#include <algorithm>

#include "backend/cuda/device/hopper.cuh"
#include "backend/cuda/device/u4_mma.cuh"
#include "backend/cuda/gemm/cluster_launch.h"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {

// kTokenTiles: of 8 tokens. A CTA has kSplit segments of kRowGroups x 16 rows.
template <class T_, int kTokenTiles_, int kSplit_, int kRowGroups_, int kStages_>
struct StreamConfig {
  using T = T_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kSplit = kSplit_;
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kStages = kStages_;  // of a warp's ring, a chunk of 128 columns each
  static constexpr int kTileN = 16 * kRowGroups;
  static constexpr int kConsumers = 32 * kSplit * kRowGroups;
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kStageBytes = 1024 + 64;  // 16 rows: packed weights, group words
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kStride = kTileN + 4;  // floats between the tokens of a sum
  static_assert(kPackRows % kTileN == 0);
};

struct StreamParams {
  const char* weights;
  const char* meta;
  const char* x;
  int64_t x_stride;  // bytes between tokens
  int chunks;
  int segments;
  int slab;         // chunks of x that a slab has
  int x_row_bytes;  // of a token in a slab: padded, so that eight rows lie in different banks
  int slabs;        // 1: it has a whole segment; otherwise 2 take turns
  bool all_lanes;   // see GemmArgs
  EpilogueParams epilogue;

  __device__ __forceinline__ int begin(int segment) const { return segment * chunks / segments; }
};

// A warp's weights on their way, `left` chunks of them not yet asked for.
template <class C>
struct WeightStream {
  const char* weights;  // of this lane
  const char* meta;
  uint32_t ring;
  uint32_t slot = 0;
  int left;
  int lane;

  // Starts the next chunk's copies, as one group even when there is none left.
  __device__ __forceinline__ void issue() {
    if (left > 0) {
      const uint32_t stage = ring + slot;
      cp_async_16(stage + lane * 16, weights, true);
      cp_async_16(stage + 512 + lane * 16, weights + 2048, true);
      if (lane < 4) cp_async_16(stage + 1024 + lane * 16, meta, true);
      weights += 4096;
      meta += 256;
      --left;
      slot = slot + C::kStageBytes == C::kRingBytes ? 0 : slot + C::kStageBytes;
    }
    cp_async_commit();
  }
};

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// ---- the end of a tile ---------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void stream_sync() {
  asm volatile("bar.sync 1, %0;\n" ::"n"(C::kConsumers) : "memory");
}

// Sums of a warp → slot [token][row] of its segment.
template <class C>
__device__ __forceinline__ void put_sums(const float (&acc)[C::kTokenTiles][4], float* slot,
                                         int row_group, int m, int lane) {
#pragma unroll
  for (int tile = 0; tile < C::kTokenTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile * 8 + lane % 4 * 2 + i % 2;
      const int row = row_group * 16 + lane / 4 + i / 2 * 8;
      if (token < m) slot[token * C::kStride + row] = acc[tile][i];
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

// The segment's sums. x: this lane's ldmatrix row in the first slab; slab_bytes: to the next slab.
template <class C>
__device__ __forceinline__ void stream_segment(const StreamParams& p, WeightStream<C>& stream,
                                               float (&acc)[C::kTokenTiles][4], int count,
                                               uint32_t x, uint32_t slab_bytes, uint32_t full,
                                               uint32_t empty) {
  const int lane = stream.lane;
  uint32_t slot = 0;
  int buffer = 0;
  uint32_t parity = 0;
  while (count > 0) {
    mbarrier_wait(full + buffer * 8, parity);
    uint32_t row = x + buffer * slab_bytes;
    const int now = min(count, p.slab);
    count -= now;
#pragma unroll 1
    for (int i = 0; i < now; ++i) {
      cp_async_wait<C::kStages - 2>();
      __syncwarp();
      // All reads first: in the order of the instructions, each product would wait for its own.
      const uint32_t stage = stream.ring + slot;
      const uint4 words[2] = {load_shared16(stage + lane * 16),
                              load_shared16(stage + 512 + lane * 16)};
      const GroupPairs pairs = group_pairs<typename C::T>(
          load_shared4(stage + 1024 + lane / 4 * 4), load_shared4(stage + 1056 + lane / 4 * 4));
      TokenPieces<C::kTokenTiles> b[2];
      b[0].load([&](int step) { return row + step * 32; });
      b[1].load([&](int step) { return row + 128 + step * 32; });
      stream.issue();
      multiply_words<typename C::T, C::kTokenTiles>(acc, words[0], pairs, b[0]);
      multiply_words<typename C::T, C::kTokenTiles>(acc, words[1], pairs, b[1]);
      row += 256;
      slot = slot + C::kStageBytes == C::kRingBytes ? 0 : slot + C::kStageBytes;
    }
    __syncwarp();
    if (lane == 0 || p.all_lanes) mbarrier_arrive(empty + buffer * 8);
    buffer ^= 1;
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
                                               uint32_t full, uint32_t empty, float* scales) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int split = warp / C::kRowGroups;
  const int row_group = warp % C::kRowGroups;
  const int segment = blockIdx.z * C::kSplit + split;
  const int count = p.begin(segment + 1) - p.begin(segment);
  const int group = blockIdx.x * C::kRowGroups + row_group;  // of 16 rows
  const int64_t piece = static_cast<int64_t>(group / 4) * p.chunks + p.begin(segment);
  WeightStream<C> stream{.weights = p.weights + piece * 4096 + group % 4 * 512 + lane * 16,
                         .meta = p.meta + piece * 256 + group % 4 * 64 + lane * 16,
                         .ring = smem_address(shared) + slab_total + warp * C::kRingBytes,
                         .left = count,
                         .lane = lane};
#pragma unroll 1
  for (int i = 0; i < C::kStages - 1; ++i) stream.issue();
  prefetch_next_norm(p.epilogue.next_norm, p.epilogue.n, blockIdx.x * C::kTileN, C::kTileN,
                     threadIdx.x);
  __syncthreads();
  grid_dependency_wait();

  // What the first output needs beside its sum travels while the sum is made.
  const EpilogueParams& e = p.epilogue;
  const int m = e.m;
  const int first_output = blockIdx.z * C::kConsumers + threadIdx.x;
  const bool gated = e.kind == Epilogue::silu_mul;
  const StreamOutput out = stream_output<C>(first_output, gated);
  const int row = blockIdx.x * C::kTileN + out.row;
  OutputTerms terms;
  if (out.token < m && row < e.n) terms = load_terms<typename C::T>(e, out.token, row);
  put_scale(e.input_norm, begin_scales(e.input_norm, 0, m, threadIdx.x, C::kConsumers, scales),
            8 * C::kTokenTiles, threadIdx.x, scales);

  // Tokens that do not exist are read as the last one; their sums are never stored.
  const int token = min(C::kTokenTiles == 1 ? lane & 7 : (lane >> 4) * 8 + (lane & 7), m - 1);
  const int column = C::kTokenTiles == 1 ? lane >> 3 : (lane >> 3) & 1;
  const uint32_t x = smem_address(shared) + (split * m + token) * p.x_row_bytes + column * 16;
  float acc[C::kTokenTiles][4] = {};
  stream_segment<C>(p, stream, acc, count, x, C::kSplit * m * p.x_row_bytes, full, empty);

  float* slots = reinterpret_cast<float*>(shared + slab_total + C::kConsumers / 32 * C::kRingBytes);
  put_sums<C>(acc, slots + split * m * C::kStride, row_group, m, lane);
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
__global__ void __launch_bounds__(C::kThreads, 512 / C::kConsumers)
    u4_stream_kernel(const StreamParams p) {
  extern __shared__ __align__(1024) char shared[];  // slabs of x | rings | slots
  __shared__ uint64_t barriers[4];
  __shared__ float scales[8 * C::kTokenTiles];
  grid_dependency_launch();
  const int slab_total = p.slabs * C::kSplit * p.epilogue.m * p.x_row_bytes;
  const uint32_t full = smem_address(barriers);
  const uint32_t empty = full + 16;
  if (threadIdx.x < C::kConsumers) {
    consume_stream<C>(p, shared, slab_total, full, empty, scales);
    return;
  }
  const bool elected = elect_one();
  if (elected) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(full + i * 8, 1);
      mbarrier_init(empty + i * 8, C::kConsumers / 32 * (p.all_lanes ? 32 : 1));
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (elected) stream_x<C>(p, smem_address(shared), full, empty);
}

// ---- launch --------------------------------------------------------------------------------------

// least_bytes: shared memory that a CTA takes, more than it needs if it is to have an SM for itself and
// few others.
template <class C>
void run_stream(const GemmArgs& args, const LaunchContext& context, int least_bytes) {
  constexpr int kXBytes = 24 * 1024;  // for x, about
  const PackedMatrix& w = *args.w;
  const int chunks = static_cast<int>(w.k_padded / kChunkColumns);
  const int depth = w.segments / C::kSplit;
  TM_CHECK(depth * C::kSplit == w.segments && depth <= 8 && args.m <= 8 * C::kTokenTiles,
           "%d segments of K, %d a CTA; %d tokens", w.segments, C::kSplit, args.m);
  const int longest = ceil_div(chunks, w.segments);
  const int of_chunk = C::kSplit * args.m * 256;
  const bool whole = longest * of_chunk <= kXBytes;
  const int slab = whole ? longest : std::max(1, kXBytes / (2 * of_chunk));
  const StreamParams params{.weights = static_cast<const char*>(w.weights),
                            .meta = reinterpret_cast<const char*>(w.meta),
                            .x = static_cast<const char*>(args.x),
                            .x_stride = args.ldx * 2,
                            .chunks = chunks,
                            .segments = w.segments,
                            .slab = slab,
                            .x_row_bytes = slab * 256 + 16,
                            .slabs = whole ? 1 : 2,
                            .all_lanes = args.all_lanes_arrive,
                            .epilogue = epilogue_params(args)};
  const int shared = params.slabs * C::kSplit * args.m * params.x_row_bytes +
                     C::kConsumers / 32 * C::kRingBytes + C::kSplit * args.m * C::kStride * 4;
  launch_cluster(u4_stream_kernel<C>,
                 {.grid = dim3(static_cast<unsigned>(ceil_div<int64_t>(w.n, C::kTileN)), 1,
                               static_cast<unsigned>(depth)),
                  .threads = C::kThreads,
                  .shared_bytes = std::max(shared, least_bytes)},
                 static_cast<unsigned>(depth), context.stream, context.programmatic, params);
}

}  // namespace turbomind::cuda
