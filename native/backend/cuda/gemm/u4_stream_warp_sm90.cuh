// What one warp of u4_stream_sm90.cuh does between the start and the end of a tile: its ring of weights,
// x of one token in it, and the products. Device code for sm_90a.
#pragma once

#include "backend/cuda/device/shared_memory.cuh"
#include "backend/cuda/device/u4_mma.cuh"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {

// kTokenTiles: of 8 tokens. A CTA has kSplit segments of kRowWarps x kGroups x 16 rows. kOwnX: one token,
// in each warp's ring.
template <class T_, int kTokenTiles_, int kSplit_, int kRowWarps_, int kStages_, int kGroups_ = 1,
          bool kOwnX_ = false>
struct StreamConfig {
  using T = T_;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kSplit = kSplit_;
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kStages = kStages_;  // of a warp's ring, a chunk of 128 columns each
  static constexpr int kGroups = kGroups_;  // of 16 rows
  static constexpr bool kOwnX = kOwnX_;
  static constexpr int kTileN = 16 * kRowWarps * kGroups;
  static constexpr int kConsumers = 32 * kSplit * kRowWarps;
  // One more warp has the tokens' factors, one x.
  static constexpr int kThreads = kConsumers + (kOwnX ? 32 : 64);
  // Of a stage: packed weights, group words, x.
  static constexpr int kMetaAt = 1024 * kGroups;
  static constexpr int kXAt = 1088 * kGroups;
  static constexpr int kStageBytes = kXAt + (kOwnX ? 256 : 0);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kStride = kTileN + 4;  // floats between the tokens of a sum
  // Of an SM, for the register limit. Warps of many sums belong to CTAs that have much of an SM each.
  static constexpr int kCtas = kGroups > 1 ? kConsumers <= 160  ? 3
                                             : kConsumers < 256 ? 2
                                                                : 1
                                           : (kTokenTiles > 1 ? 384 : 512) / kConsumers;
  static_assert(kPackRows % (16 * kGroups) == 0);
  static_assert(!kOwnX || kTokenTiles == 1);
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
  EpilogueParams epilogue;

  __device__ __forceinline__ int begin(int segment) const { return segment * chunks / segments; }
};

// A warp's weights on their way, `left` chunks of them not yet asked for. The first lanes bring the group
// words beside them; kOwnX: lanes below 16 x and those after them the group words, in one instruction.
template <class C>
struct WeightStream {
  const char* weights;  // of this lane
  const char* side;     // likewise
  uint32_t ring;
  uint32_t side_at;  // where in a stage
  uint32_t slot = 0;
  int left;
  int lane;

  __device__ __forceinline__ WeightStream(const char* weights, const char* meta, const char* x,
                                          uint32_t ring, int count, int lane)
      : weights(weights + lane * 16),
        side((C::kOwnX && lane < 16 ? x : meta) + lane % 16 * 16),
        ring(ring),
        side_at((C::kOwnX && lane < 16 ? C::kXAt : C::kMetaAt) + lane % 16 * 16),
        left(count),
        lane(lane) {}

  // Starts the next chunk's copies, as one group even when there is none left. kWithX: those of x too.
  template <bool kWithX>
  __device__ __forceinline__ void issue() {
    if (left > 0) {
      const uint32_t stage = ring + slot;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int g = 0; g < C::kGroups; ++g) {
          cp_async_16(stage + lane * 16 + (half * C::kGroups + g) * 512,
                      weights + half * 2048 + g * 512, true);
        }
      }
      constexpr int kFirst = C::kOwnX ? 16 : 0;
      const bool has_side = lane < kFirst ? kWithX : lane < kFirst + 4 * C::kGroups;
      if (has_side) cp_async_16(stage + side_at, side, true);
      weights += 4096;
      side += 256;
      --left;
      slot = next(slot);
    }
    cp_async_commit();
  }
  __device__ __forceinline__ static uint32_t next(uint32_t slot) {
    return slot + C::kStageBytes == C::kRingBytes ? 0 : slot + C::kStageBytes;
  }
};

__device__ __forceinline__ void store_shared16(uint32_t address, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- products ------------------------------------------------------------------------------------

// kOwnX: x of the chunks whose weights were asked for before the kernel's wait, through registers: less
// latency than copies behind those of the weights.
template <class C>
__device__ __forceinline__ void load_first_x(const char* x, uint32_t ring, int count, int lane) {
  constexpr int kRounds = (C::kStages - 1) / 2 + (C::kStages - 1) % 2;  // of two chunks
  const int pieces = min(count, C::kStages - 1) * 16;
  uint4 v[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    if (i * 32 + lane < pieces) v[i] = __ldcg(reinterpret_cast<const uint4*>(x) + i * 32 + lane);
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int chunk = i * 2 + lane / 16;
    if (i * 32 + lane < pieces) {
      store_shared16(ring + chunk * C::kStageBytes + C::kXAt + lane % 16 * 16, v[i]);
    }
  }
}

// Half a chunk in registers: packed words, tokens.
template <class C>
struct StreamHalf {
  uint32_t words[C::kGroups][4];
  TokenPieces<C::kTokenTiles> b;

  // stage, x: of this lane.
  __device__ __forceinline__ void load(uint32_t stage, uint32_t x, int half) {
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      load_shared<16>(words[g], stage + (half * C::kGroups + g) * 512);
    }
    b.load([&](int step) { return x + half * 128 + step * 32; });
  }
  // Chains of the groups side by side, so that one hides another's latency.
  __device__ __forceinline__ void multiply(float (&acc)[C::kGroups][C::kTokenTiles][4],
                                           const GroupPairs (&pairs)[C::kGroups]) const {
    using T = typename C::T;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int g = 0; g < C::kGroups; ++g) {
        multiply_word<T, C::kTokenTiles>(acc[g], words[g][step], pairs[g], b, step);
      }
    }
  }
};

template <class C>
__device__ __forceinline__ void load_pairs(GroupPairs (&pairs)[C::kGroups], uint32_t meta) {
#pragma unroll
  for (int g = 0; g < C::kGroups; ++g) {
    uint32_t low[4];
    uint32_t high[4];
    load_shared<4>(low, meta + g * 64);
    load_shared<4>(high, meta + g * 64 + 32);
    pairs[g] = group_pairs<typename C::T>(low[0], high[0]);
  }
}

// One chunk. words, meta, x: of this lane, where the chunk lies.
template <class C>
__device__ __forceinline__ void multiply_chunk(WeightStream<C>& stream,
                                               float (&acc)[C::kGroups][C::kTokenTiles][4],
                                               uint32_t words, uint32_t meta, uint32_t x) {
  // All reads first: in the order of the instructions, each product would wait for its own.
  GroupPairs pairs[C::kGroups];
  load_pairs<C>(pairs, meta);
  StreamHalf<C> even;
  StreamHalf<C> odd;
  even.load(words, x, 0);
  odd.load(words, x, 1);
  stream.template issue<true>();  // into the slot of the chunk before, which all lanes have read
  even.multiply(acc, pairs);
  odd.multiply(acc, pairs);
}

// The segment's sums, slab by slab. x: this lane's ldmatrix row in the first slab, kOwnX: in a stage;
// slab_bytes: to the next slab.
template <class C>
__device__ __forceinline__ void stream_segment(const StreamParams& p, WeightStream<C>& stream,
                                               float (&acc)[C::kGroups][C::kTokenTiles][4],
                                               int count, uint32_t x, uint32_t slab_bytes,
                                               uint32_t full, uint32_t empty) {
  const int lane = stream.lane;
  const uint32_t words = stream.ring + lane * 16;
  const uint32_t meta = stream.ring + C::kMetaAt + lane / 4 * 4;
  uint32_t slot = 0;
  int buffer = 0;
  uint32_t parity = 0;
  while (count > 0) {
    if constexpr (!C::kOwnX) mbarrier_wait(full + buffer * 8, parity);
    uint32_t row = x + buffer * slab_bytes;
    const int now = C::kOwnX ? count : min(count, p.slab);
    count -= now;
#pragma unroll 1
    for (int i = 0; i < now; ++i) {
      cp_async_wait<C::kStages - 2>();
      __syncwarp();
      multiply_chunk<C>(stream, acc, words + slot, meta + slot, C::kOwnX ? x + slot : row);
      row += 256;
      slot = stream.next(slot);
    }
    if constexpr (!C::kOwnX) {
      __syncwarp();
      if (lane < kWarpArrivals) mbarrier_arrive(empty + buffer * 8);
      buffer ^= 1;
      if (buffer == 0) parity ^= 1;
    }
  }
}

}  // namespace turbomind::cuda
