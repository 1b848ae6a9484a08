// What the consumer warpgroups of gemm_sm90.cuh do between their barriers: stages of the ring to f32
// accumulators of 64 rows of W x kTileT tokens, one chain of k16 steps. 4-bit weights are dequantised
// into one of two sets of registers while the tensor cores multiply the other; for few tokens mma.sync
// has less latency than a wgmma of 8 or 16 columns.
#pragma once

#include <algorithm>

#include "backend/cuda/device/hopper.cuh"
#include "backend/cuda/device/shared_memory.cuh"
#include "backend/cuda/device/u4_mma.cuh"
#include "backend/cuda/device/wgmma.cuh"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {

inline constexpr int kMaxStages = 16;

// kGroupSize: columns that share a scale, 0 for dense weights. kCtas: of an SM, for the register limit.
// Shared stage: x [kSplitGroups][kTileK / 64][kTileT][64] | weights [kSplitGroups][kRowGroups] |
// group words likewise; 1024-aligned.
template <class T_, int kGroupSize_, int kRowGroups_, int kSplitGroups_, int kTileT_,
          int kCtas_ = 1, bool kMmaSync_ = false>
struct Sm90Config {
  using T = T_;
  static constexpr int kGroupSize = kGroupSize_;
  static constexpr bool kU4 = kGroupSize > 0;
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kSplitGroups = kSplitGroups_;
  static constexpr int kGroups = kRowGroups * kSplitGroups;
  static constexpr int kTileN = 64 * kRowGroups;
  static constexpr int kTileT = kTileT_;
  static constexpr int kTileK = kU4 ? 128 : 64;
  static constexpr bool kMmaSync = kMmaSync_;
  static constexpr int kCtas = kCtas_;
  static constexpr int kConsumers = 128 * kGroups;
  // Registers move from the producers to the consumers where tiles are big; that takes warpgroups.
  static constexpr bool kMoveRegisters = kTileT >= 64 && kGroups >= 2;
  // Warps beside the two producers that fold a split norm's factors: the rest of the producers' warpgroup, or one
  // where registers are left for it.
  static constexpr bool kHasFoldWarp = kU4 && (kTileT <= kNarrowTokens ? kCtas == 1 : kTileT >= 64);
  static constexpr int kFoldWarps = kMoveRegisters ? 2 : kHasFoldWarp ? 1 : 0;
  static constexpr int kThreads = kConsumers + 64 + 32 * kFoldWarps;
  // What the launch takes for all threads is all there is to move.
  static constexpr int kLaunchRegisters = 65536 / kCtas / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kRowGroups > 3 || kCtas > 1 ? 32 : 40;
  static constexpr int kRegisterShare =
      (kLaunchRegisters * kThreads - 128 * kProducerRegisters) / kConsumers / 8 * 8;
  static constexpr int kConsumerRegisters = kRegisterShare < 240 ? kRegisterShare : 240;
  static constexpr int kXBytes = kTileK / 64 * kTileT * 128;                   // of a split group
  static constexpr int kBlockBytes = kU4 ? 32 * kTileK : 8192;                 // of 64 rows
  static constexpr int kMetaBlockBytes = kU4 ? kTileK / kGroupSize * 256 : 0;  // of 64 rows
  static constexpr int kSplitLoadBytes = kXBytes + kRowGroups * (kBlockBytes + kMetaBlockBytes);
  static constexpr int kWeightOffset = kSplitGroups * kXBytes;
  static constexpr int kMetaOffset = kWeightOffset + kGroups * kBlockBytes;
  static constexpr int kStageBytes = (kSplitGroups * kSplitLoadBytes + 1023) / 1024 * 1024;
  static constexpr int kAcc = kTileT / 2;  // accumulators of a thread
  // What norms split at its tokens leave (strip_columns), where they are always few, many or in between.
  static constexpr Strips kStrips = kTileT <= kNarrowTokens || kTileT > kWideTokens ? Strips::narrow
                                    : kTileT == 64 || (kTileT == 32 && kU4)         ? Strips::wide
                                                                            : Strips::either;
  // The end of a tile that a CTA has for itself: each warpgroup alone, in slices of so many tokens.
  static constexpr int kSlice = kU4 && kTileT > 128 ? 8
                                                    : std::min(kTileT, kRowGroups > 2 ? 16 : 32);
  // The same rounded already, twice the tokens in as much memory (packed_store_sm90.cuh).
  static constexpr bool kPacks = kTileT >= 32;
  // Residuals too where registers are left; tiles of fewer tokens rarely have one for themselves.
  static constexpr bool kPacksResidual = kTileT >= 128 && kRowGroups <= 2;
  static constexpr int kPackedSlice = std::min(kTileT, 2 * kSlice);
  static constexpr int kSliceFloats =
      std::max(kSlice * kTileStride<64>, kPacks ? kPackedSlice * (64 + 8) / 2 : 0);
  // The end of a tile whose segments meet: slots of whole tiles, over the ring.
  static constexpr int kStride = kTileStride<kTileN>;
  static constexpr int kSlotFloats = kTileT * kStride;
  // Segments one after the other take their sum in registers too.
  static constexpr bool kInTurn = kSplitGroups == 1 && kTileT == 128 && kRowGroups <= 2;
};

inline constexpr int kMaxSegments = 8;

struct Sm90Params {
  const char* weights;  // packed 4-bit only
  const char* meta;
  int row_tiles;
  int tall_tiles;  // of them, the first, kRowGroups blocks of rows high; the others have one less
  int token_tiles;
  int row_blocks;  // of 64 rows that exist
  int chunks;      // k_padded / kTileK
  int segments;
  int stages;
  int whole;  // tiles that a CTA computes alone; those after them are shared by the CTAs of a cluster
  bool even;  // CTAs have equal shares of the row blocks instead of every n-th tile
  bool blocked_x;
  int bounds[kMaxSegments + 1];  // chunks at which segments begin
  EpilogueParams epilogue;
};

// What a CTA works on at a time: `height` blocks of 64 rows times kTileT tokens.
struct Tile {
  int block;
  int height;
  int token_tile;
  bool whole;  // all segments, for this CTA alone
};

// First segment of this CTA in a tile that the cluster shares.
template <class C>
__device__ __forceinline__ int first_segment() {
  return blockIdx.z * C::kSplitGroups;
}
// Stages that a tile passes through: the longest of the segments that this CTA runs together.
template <class C>
__device__ __forceinline__ int iterations(const Sm90Params& p, bool whole) {
  if (whole) return p.chunks;
  int longest = 0;
#pragma unroll
  for (int q = first_segment<C>(); q < first_segment<C>() + C::kSplitGroups; ++q) {
    longest = max(longest, p.bounds[q + 1] - p.bounds[q]);
  }
  return longest;
}

// A consumer's place in the ring.
template <class C>
struct Ring {
  char* stages;
  uint32_t base;
  uint32_t full;
  uint32_t empty;
  int count;
  uint32_t x_descriptor;  // low word of the first stage's x
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ const char* at() const { return stages + stage * C::kStageBytes; }
  __device__ __forceinline__ void wait() const { mbarrier_wait(full + stage * 8, parity); }
  // The warp has read stage `which`.
  __device__ __forceinline__ void release(int which, int thread) const {
    if (thread % 32 < kWarpArrivals) mbarrier_arrive(empty + which * 8);
  }
  __device__ __forceinline__ void advance() {
    if (++stage == count) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A warpgroup without rows in a tile.
template <class C>
__device__ __forceinline__ void skip(Ring<C>& ring, int iterations, int thread) {
  for (int i = 0; i < iterations; ++i) {
    ring.wait();
    ring.release(ring.stage, thread);
    ring.advance();
  }
}

// ---- barriers of consumers ------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;\n" ::"n"(C::kConsumers) : "memory");
}
// Of the warpgroups that store rows through shared memory of their own: each by itself, so that one may
// multiply while another stores. Dense tiles store for longer than their ring lasts: there they stay together.
template <class C>
__device__ __forceinline__ void store_sync(int group) {
  if constexpr (C::kU4) {
    asm volatile("bar.sync %0, 128;\n" ::"r"(2 + group) : "memory");
  } else {
    consumers_sync<C>();
  }
}

// ---- 4-bit ---------------------------------------------------------------------------------------

// Group words of the two rows of W that a thread holds.
struct RowMeta {
  uint32_t low;
  uint32_t high;
};
__device__ __forceinline__ RowMeta load_row_meta(uint32_t address) {
  uint32_t low[4];
  uint32_t high[4];
  load_shared<4>(low, address);
  load_shared<4>(high, address + 32);
  return {low[0], high[0]};
}

// Where a thread's part of a block of 64 rows lies in a stage, as addresses in the first one. Kept in
// registers: the compiler would compute them again for each chunk.
template <class C>
struct Places {
  uint32_t words;
  uint32_t meta;

  __device__ __forceinline__ Places(uint32_t base, int block, int thread)
      : words(kept(base + C::kWeightOffset + block * C::kBlockBytes + thread * 16)),
        meta(kept(base + C::kMetaOffset + block * C::kMetaBlockBytes + row_of(thread) * 4)) {}
  __device__ __forceinline__ static int row_of(int thread) {
    return thread / 32 * 16 + thread % 32 / 4;
  }
};

// Half a chunk, 64 columns and so four k16 steps, of a block of 64 rows: packed words and the group words
// of its rows, for groups of 128 only with the first half.
template <class C>
struct Words {
  static constexpr int kGroups = C::kGroupSize < 64 ? 64 / C::kGroupSize : 1;
  uint4 four;
  RowMeta rows[kGroups];

  // stage: distance of the stage from the first.
  __device__ __forceinline__ void load(const Places<C>& places, uint32_t stage, int half) {
    uint32_t words[4];
    load_shared<16>(words, places.words + stage + half * 2048);
    four = {words[0], words[1], words[2], words[3]};
    if (C::kGroupSize == 128 && half == 1) return;  // the same group
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t meta = places.meta + stage + (half * 64 / C::kGroupSize + i) * 256;
      rows[i] = load_row_meta(meta);
    }
  }
  __device__ __forceinline__ GroupPairs pairs(int step) const {
    const RowMeta& row = rows[step * kGroups / 4];
    return group_pairs<typename C::T>(row.low, row.high);
  }
  // first: of the four steps, used for all of them where they have one group. The values are there
  // afterwards: the compiler may not move the work past the next wait.
  __device__ __forceinline__ void dequant(GroupPairs first, uint32_t (&a)[4][4]) const {
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i > 0 && i * kGroups % 4 == 0) first = pairs(i);
      dequant_word<typename C::T>(words[i], first, a[i]);
      asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]));
    }
  }
};

// Four k16 steps. x: low word of the descriptor of their 64 columns.
template <class C>
__device__ __forceinline__ void multiply(float (&acc)[C::kAcc], const uint32_t (&a)[4][4],
                                         uint32_t x) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Wgmma<typename C::T, C::kTileT>::rs(acc, a[i], wgmma_descriptor_at(x + i * 2), false);
  }
  wgmma_commit();
}

// `count` chunks, at least one, added to acc. Halves of chunks take turns with two sets of registers: the
// product of one is running while the next is dequantised, whose words have been read meanwhile.
template <class C>
__device__ __forceinline__ void consume_u4(Ring<C>& ring, float (&acc)[C::kAcc], int count,
                                           int block, int thread) {
  uint32_t a[2][4][4];
  Words<C> words[2];
  const Places<C> places(ring.base, block, thread);
  ring.wait();
  words[0].load(places, ring.stage * C::kStageBytes, 0);
  words[1].load(places, ring.stage * C::kStageBytes, 1);
  int previous = -1;
#pragma unroll 1
  for (int left = count; left > 0; --left) {
    const int stage = ring.stage;
    const uint32_t x = ring.x_descriptor + stage * (C::kStageBytes / 16);
    const GroupPairs pairs = words[0].pairs(0);
    words[0].dequant(pairs, a[0]);
    multiply<C>(acc, a[0], x);
    wgmma_wait<1>();  // a[1] has been read, and all of the stage before this one
    if (previous >= 0) ring.release(previous, thread);
    previous = stage;
    ring.advance();
    if (left > 1) {
      ring.wait();
      words[0].load(places, ring.stage * C::kStageBytes, 0);
    }
    words[1].dequant(C::kGroupSize == 128 ? pairs : words[1].pairs(0), a[1]);
    multiply<C>(acc, a[1], x + C::kTileT * 128 / 16);
    if (left > 1) words[1].load(places, ring.stage * C::kStageBytes, 1);
    wgmma_wait<1>();  // a[0] has been read
  }
  wgmma_wait<0>();
  ring.release(previous, thread);
}

// The same on mma.sync, for acc zero, out of `iterations` stages: warp w of the warpgroup has rows 16w..16w+15, as in
// wgmma.
template <class C>
__device__ __forceinline__ void consume_u4_mma(Ring<C>& ring, float (&acc)[C::kAcc], int count,
                                               int iterations, int row_group, int split_group,
                                               int thread) {
  static_assert(C::kGroupSize == 128);
  const int block = split_group * C::kRowGroups + row_group;
  const int lane = thread % 32;
  const int token = C::kTileT == 8 ? lane & 7 : (lane >> 4) * 8 + (lane & 7);
  const int piece = C::kTileT == 8 ? lane >> 3 : (lane >> 3) & 1;
  const uint32_t lane_x = token * 128 + ((piece ^ (lane & 7)) << 4) + split_group * C::kXBytes;
  const Places<C> places(ring.base, block, thread);
  constexpr int kTiles = C::kTileT / 8;
  float sums[kTiles][4] = {};
  for (int i = 0; i < iterations; ++i) {
    ring.wait();
    if (i < count) {
      // All reads first: in the order of the instructions, each product would wait for its own.
      const uint32_t x = ring.base + ring.stage * C::kStageBytes + lane_x;
      Words<C> words[2];
      TokenPieces<kTiles> b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        words[half].load(places, ring.stage * C::kStageBytes, half);
        b[half].load([&](int step) { return (x ^ (step * 32)) + half * C::kTileT * 128; });
      }
      const GroupPairs pairs = words[0].pairs(0);
      multiply_words<typename C::T, kTiles>(sums, words[0].four, pairs, b[0]);
      multiply_words<typename C::T, kTiles>(sums, words[1].four, pairs, b[1]);
    }
    __syncwarp();
    ring.release(ring.stage, thread);
    ring.advance();
  }
#pragma unroll
  for (int i = 0; i < C::kAcc; ++i) acc[i] = sums[i / 4][i % 4];
}

// ---- dense -----------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void chunk_dense(float (&acc)[C::kAcc], uint32_t x, uint32_t weights) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    Wgmma<typename C::T, C::kTileT>::ss(acc, wgmma_descriptor(weights + step * 32),
                                        wgmma_descriptor(x + step * 32), false);
  }
  wgmma_commit();
}

// `count` chunks of this warpgroup's segment out of `iterations` stages, added to acc.
template <class C>
__device__ __forceinline__ void consume(Ring<C>& ring, float (&acc)[C::kAcc], int count,
                                        int iterations, int row_group, int split_group,
                                        int thread) {
  if constexpr (C::kMmaSync) {
    consume_u4_mma<C>(ring, acc, count, iterations, row_group, split_group, thread);
    return;
  } else if constexpr (C::kU4) {
    consume_u4<C>(ring, acc, count, row_group, thread);
    return;
  }
  const int block = split_group * C::kRowGroups + row_group;
  int previous = -1;
  for (int i = 0; i < iterations; ++i) {
    ring.wait();
    const uint32_t stage = ring.base + ring.stage * C::kStageBytes;
    if (i < count) {
      chunk_dense<C>(acc, stage + split_group * C::kXBytes,
                     stage + C::kWeightOffset + block * C::kBlockBytes);
    }
    wgmma_wait<1>();  // the chunk before this one has been read
    if (previous >= 0) ring.release(previous, thread);
    previous = ring.stage;
    ring.advance();
  }
  wgmma_wait<0>();
  ring.release(previous, thread);
}

}  // namespace turbomind::cuda
