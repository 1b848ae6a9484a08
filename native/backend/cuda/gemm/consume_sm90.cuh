// What the consumer warpgroups of gemm_sm90.cuh do between their barriers: stages of the ring to f32
// accumulators of 64 rows of W x kTileT tokens. A group's k16 steps form one chain of sums from zero,
// scale * sum is added to the accumulator by one fma; the same in all variants here and on mma.sync.
//  - simple: a chunk at a time; warpgroups cover for each other.
//  - pipelined (group 128, 64 tokens or more): tokens in two halves, so that one half is scaled and the
//    next weights are dequantised while the tensor cores run the other.
//  - mma.sync for few tokens: less latency than a wgmma of 8 or 16 columns.
#pragma once

#include "backend/cuda/device/dequant.cuh"
#include "backend/cuda/device/hopper.cuh"
#include "backend/cuda/device/mma.cuh"
#include "backend/cuda/device/wgmma.cuh"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {

inline constexpr int kMaxStages = 16;

// kGroupSize: columns that share a scale, 0 for dense weights. kCtas: of an SM, for the register limit.
// Shared stage: x [kSplitGroups][kTileK / 64][kTileT][64] | weights [kSplitGroups][kRowGroups] |
// group words likewise; 1024-aligned.
template <class T_, int kGroupSize_, int kRowGroups_, int kSplitGroups_, int kTileT_,
          bool kMmaSync_ = false, int kCtas_ = 1>
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
  static constexpr bool kPipelined =
      kGroupSize == 128 && kTileT >= 64 && kSplitGroups == 1 && !kMmaSync;
  static constexpr int kCtas = kCtas_;
  static constexpr int kConsumers = 128 * kGroups;
  // Registers move from the producers to the consumers where tiles are big; that takes warpgroups.
  static constexpr bool kMoveRegisters = kTileT >= 64 && kGroups >= 2;
  static constexpr int kThreads = kConsumers + (kMoveRegisters ? 128 : 64);
  static constexpr int kRegisterShare = (65536 / kCtas - 128 * 24) / kConsumers / 8 * 8;
  static constexpr int kConsumerRegisters = kRegisterShare < 240 ? kRegisterShare : 240;
  static constexpr int kXBytes = kTileK / 64 * kTileT * 128;                   // of a split group
  static constexpr int kBlockBytes = kU4 ? 4096 : 8192;                        // of 64 rows
  static constexpr int kMetaBlockBytes = kU4 ? kTileK / kGroupSize * 256 : 0;  // of 64 rows
  static constexpr int kSplitLoadBytes = kXBytes + kRowGroups * (kBlockBytes + kMetaBlockBytes);
  static constexpr int kWeightOffset = kSplitGroups * kXBytes;
  static constexpr int kMetaOffset = kWeightOffset + kGroups * kBlockBytes;
  static constexpr int kStageBytes = (kSplitGroups * kSplitLoadBytes + 1023) / 1024 * 1024;
  static constexpr int kStride = kTileStride<kTileN>;
  static constexpr int kSlotFloats = kTileT * kStride;
  static constexpr int kSlice =
      kTileT < 32 ? kTileT : 32;           // tokens of an epilogue without a meeting
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
  bool in_turn;
  bool blocked_x;
  bool all_lanes;
  bool scale_is_bf16;
  EpilogueParams epilogue;
};

__device__ __forceinline__ int segment_begin(const Sm90Params& p, int segment) {
  return segment * p.chunks / p.segments;
}

// Stages that a tile passes through: the longest of the segments that this CTA runs together.
template <class C>
__device__ __forceinline__ int iterations(const int* bounds) {
  int longest = 0;
  for (int q = 0; q < C::kSplitGroups; ++q) longest = max(longest, bounds[q + 1] - bounds[q]);
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
  bool all_lanes;
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void wait() const { mbarrier_wait(full + stage * 8, parity); }
  // The warp has read stage `which`. One lane speaks for all (`all_lanes`: see GemmArgs).
  __device__ __forceinline__ void release(int which, int thread) const {
    if (thread % 32 == 0 || all_lanes) mbarrier_arrive(empty + which * 8);
  }
  __device__ __forceinline__ void advance() {
    if (++stage == count) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4 (&words)[2], int step) {
  const uint4& four = words[step / 4];
  return step % 4 == 0 ? four.x : step % 4 == 1 ? four.y : step % 4 == 2 ? four.z : four.w;
}

template <class C>
__device__ __forceinline__ void load_words(uint4 (&words)[2], const char* weights, int thread) {
  words[0] = *reinterpret_cast<const uint4*>(weights + thread * 16);
  words[1] = *reinterpret_cast<const uint4*>(weights + 2048 + thread * 16);
}

// Group words of the two rows of W that a thread holds.
struct RowMeta {
  uint32_t low;
  uint32_t high;
};
__device__ __forceinline__ RowMeta load_meta(const char* meta, int thread) {
  const int row = thread / 32 * 16 + thread % 32 / 4;
  return {*reinterpret_cast<const uint32_t*>(meta + row * 4),
          *reinterpret_cast<const uint32_t*>(meta + row * 4 + 32)};
}

template <int kCount>
__device__ __forceinline__ void add_scaled(float* acc, const float* sums, float low, float high) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) acc[i] = fmaf(i % 4 < 2 ? low : high, sums[i], acc[i]);
}

// ---- simple ----------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void chunk_u4(float (&acc)[C::kAcc], uint32_t x, const char* weights,
                                         const char* meta, bool scale_is_bf16, int thread) {
  constexpr int kSteps = C::kGroupSize / 16;       // k16 steps of a group
  constexpr int kBatch = kSteps < 4 ? kSteps : 4;  // steps whose fragments live together
  float sums[C::kAcc];
  uint4 words[2];
  load_words<C>(words, weights, thread);
#pragma unroll
  for (int group = 0; group < 8 / kSteps; ++group) {
    const RowMeta rows = load_meta(meta + group * 256, thread);
    const uint32_t zero_low = zero_pair<typename C::T>(rows.low);
    const uint32_t zero_high = zero_pair<typename C::T>(rows.high);
    uint32_t a[kSteps / kBatch][kBatch][4];
#pragma unroll
    for (int batch = 0; batch < kSteps / kBatch; ++batch) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        dequant_word<typename C::T>(word_of(words, group * kSteps + batch * kBatch + i), zero_low,
                                    zero_high, a[batch][i]);
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
    const float scale_low = group_scale(rows.low, scale_is_bf16);
    const float scale_high = group_scale(rows.high, scale_is_bf16);
    wgmma_wait<0>();
    add_scaled<C::kAcc>(acc, sums, scale_low, scale_high);
  }
}

// The same on mma.sync: warp w of the warpgroup has rows 16w..16w+15, as in wgmma.
template <class C>
__device__ __forceinline__ void chunk_u4_mma(float (&acc)[C::kAcc], uint32_t x, const char* weights,
                                             const char* meta, bool scale_is_bf16, int thread) {
  static_assert(C::kTileT == 8 || C::kTileT == 16);
  constexpr int kSteps = C::kGroupSize / 16;
  const int lane = thread % 32;
  uint4 words[2];
  load_words<C>(words, weights, thread);
  uint32_t b[4];
#pragma unroll
  for (int group = 0; group < 8 / kSteps; ++group) {
    const RowMeta rows = load_meta(meta + group * 256, thread);
    const uint32_t zero_low = zero_pair<typename C::T>(rows.low);
    const uint32_t zero_high = zero_pair<typename C::T>(rows.high);
    float sums[C::kTileT / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int step = group * kSteps + i;
      const uint32_t base = x + (step / 4) * C::kTileT * 128;
      uint32_t a[4];
      dequant_word<typename C::T>(word_of(words, step), zero_low, zero_high, a);
      if constexpr (C::kTileT == 8) {
        if (step % 2 == 0) {  // four pieces of eight columns: two steps
          const int t = lane & 7;
          ldmatrix_x4(b, base + t * 128 + ((((step % 4) * 2 + (lane >> 3)) ^ t) << 4));
        }
        mma_16816<typename C::T>(sums[0], a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
      } else {
        const int t = (lane >> 4) * 8 + (lane & 7);
        ldmatrix_x4(b, base + t * 128 + ((((step % 4) * 2 + ((lane >> 3) & 1)) ^ (t & 7)) << 4));
        mma_16816<typename C::T>(sums[0], a, b[0], b[1]);
        mma_16816<typename C::T>(sums[C::kTileT / 16], a, b[2], b[3]);
      }
    }
    const float scale_low = group_scale(rows.low, scale_is_bf16);
    const float scale_high = group_scale(rows.high, scale_is_bf16);
#pragma unroll
    for (int j = 0; j < C::kTileT / 8; ++j) {
      add_scaled<4>(acc + 4 * j, sums[j], scale_low, scale_high);
    }
  }
}

// ---- pipelined ---------------------------------------------------------------------------------------

// The values are there afterwards: the compiler may not move the work past the next wait.
template <class C>
__device__ __forceinline__ void dequant_half(uint32_t (&a)[4][4], const uint4& words,
                                             const RowMeta& rows) {
  const uint32_t zero_low = zero_pair<typename C::T>(rows.low);
  const uint32_t zero_high = zero_pair<typename C::T>(rows.high);
  dequant_word<typename C::T>(words.x, zero_low, zero_high, a[0]);
  dequant_word<typename C::T>(words.y, zero_low, zero_high, a[1]);
  dequant_word<typename C::T>(words.z, zero_low, zero_high, a[2]);
  dequant_word<typename C::T>(words.w, zero_low, zero_high, a[3]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3]));
  }
}

// Four k16 steps against half of the tokens. x: of the half, in its 64 columns.
template <class C>
__device__ __forceinline__ void multiply_half(float (&sums)[C::kAcc / 2], const uint32_t (&a)[4][4],
                                              uint32_t x, bool first) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Wgmma<typename C::T, C::kTileT / 2>::rs(sums, a[i], wgmma_descriptor(x + i * 32),
                                            first && i == 0);
  }
  wgmma_commit();
}

// `count` chunks of one group each. Names of the commit groups of a chunk: A, B (columns 0..63, the two
// halves of the tokens), C, D (columns 64..127).
template <class C>
__device__ __forceinline__ void consume_pipelined(const Sm90Params& p, Ring<C>& ring,
                                                  float (&acc)[C::kAcc], int count, int row_group,
                                                  int thread) {
  constexpr int kHalf = C::kAcc / 2;
  constexpr int kHalfX = C::kTileT / 2 * 128;
  float sums0[kHalf];
  float sums1[kHalf];
  uint32_t a0[4][4];
  uint32_t a1[4][4];
  uint4 words[2];
  RowMeta rows;
  uint32_t x = 0;
  const auto fetch = [&] {
    ring.wait();
    const char* weights = ring.stages + ring.stage * C::kStageBytes + C::kWeightOffset;
    load_words<C>(words, weights + row_group * C::kBlockBytes, thread);
    rows = load_meta(weights + C::kRowGroups * C::kBlockBytes + row_group * C::kMetaBlockBytes,
                     thread);
    x = ring.base + ring.stage * C::kStageBytes;
  };
  // B to D of the current chunk; A has been issued.
  const auto multiply_rest = [&] {
    wgmma_fence();
    multiply_half<C>(sums1, a0, x + kHalfX, true);  // B
    dequant_half<C>(a1, words[1], rows);
    wgmma_fence();
    multiply_half<C>(sums0, a1, x + 2 * kHalfX, false);  // C
    multiply_half<C>(sums1, a1, x + 3 * kHalfX, false);  // D
  };
  fetch();
  dequant_half<C>(a0, words[0], rows);
  wgmma_fence();
  multiply_half<C>(sums0, a0, x, true);  // A
  for (int i = 1; i < count; ++i) {
    multiply_rest();
    const float low = group_scale(rows.low, p.scale_is_bf16);
    const float high = group_scale(rows.high, p.scale_is_bf16);
    const int previous = ring.stage;
    ring.advance();
    fetch();
    wgmma_wait<2>();  // A and B have read a0
    dequant_half<C>(a0, words[0], rows);
    wgmma_wait<1>();  // C
    add_scaled<kHalf>(acc, sums0, low, high);
    wgmma_fence();
    multiply_half<C>(sums0, a0, x, true);  // A of the next chunk
    wgmma_wait<1>();                       // D
    add_scaled<kHalf>(acc + kHalf, sums1, low, high);
    ring.release(previous, thread);
  }
  multiply_rest();
  const float low = group_scale(rows.low, p.scale_is_bf16);
  const float high = group_scale(rows.high, p.scale_is_bf16);
  wgmma_wait<0>();
  add_scaled<kHalf>(acc, sums0, low, high);
  add_scaled<kHalf>(acc + kHalf, sums1, low, high);
  ring.release(ring.stage, thread);
  ring.advance();
}

// ---- dense -----------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void chunk_dense(float (&acc)[C::kAcc], uint32_t x, uint32_t weights,
                                            bool first) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    Wgmma<typename C::T, C::kTileT>::ss(acc, wgmma_descriptor(weights + step * 32),
                                        wgmma_descriptor(x + step * 32), first && step == 0);
  }
  wgmma_commit();
}

// `count` chunks of this warpgroup's segment out of `iterations` stages, into acc (zero before).
template <class C>
__device__ __forceinline__ void consume(const Sm90Params& p, Ring<C>& ring, float (&acc)[C::kAcc],
                                        int count, int iterations, int row_group, int split_group,
                                        int thread) {
  if constexpr (C::kPipelined) {
    consume_pipelined<C>(p, ring, acc, count, row_group, thread);
    return;
  }
  const int block = split_group * C::kRowGroups + row_group;
  int previous = -1;
  for (int i = 0; i < iterations; ++i) {
    ring.wait();
    const uint32_t stage = ring.base + ring.stage * C::kStageBytes;
    const uint32_t x = stage + split_group * C::kXBytes;
    if constexpr (C::kU4) {
      const char* data = ring.stages + ring.stage * C::kStageBytes;
      const char* weights = data + C::kWeightOffset + block * C::kBlockBytes;
      const char* meta = data + C::kMetaOffset + block * C::kMetaBlockBytes;
      if (i < count) {
        if constexpr (C::kMmaSync) {
          chunk_u4_mma<C>(acc, x, weights, meta, p.scale_is_bf16, thread);
        } else {
          chunk_u4<C>(acc, x, weights, meta, p.scale_is_bf16, thread);
        }
      }
      __syncwarp();
      ring.release(ring.stage, thread);
    } else {
      if (i < count) {
        chunk_dense<C>(acc, x, stage + C::kWeightOffset + block * C::kBlockBytes, i == 0);
      }
      wgmma_wait<1>();  // the chunk before this one has been read
      if (previous >= 0) ring.release(previous, thread);
      previous = ring.stage;
    }
    ring.advance();
  }
  if constexpr (!C::kU4) {
    wgmma_wait<0>();
    ring.release(previous, thread);
  }
}

}  // namespace turbomind::cuda
