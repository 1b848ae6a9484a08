// Decode attention's units of work, its ring of tiles and what its warps hand each other: shared by the
// producer (decode_produce.cuh), the consumers (kernels/attention_decode.cu) and what brings parts together
// (decode_fold.cuh). Device only, but for the sizes that the launch needs.
#pragma once

#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/device/head.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda::decode {

inline constexpr int kWarps = kPartTiles;  // consumers: a tile each
inline constexpr int kConsumers = kWarps * 32;
inline constexpr int kThreads = kConsumers + 32;
inline constexpr int kMaxSlots = 16;
// CTAs without a unit that fold the last head of a step of one unit a CTA.
inline constexpr int kFolders = 8;

struct Params {
  DecodeAttentionArgs args;
  int group;          // query heads a KV head
  int group_inverse;  // 65536 / group, rounded up
  int column_blocks;  // most of a sequence
  int pairs;          // stored column pairs of a unit
  int slots;
  float scale_log2;
  __device__ __forceinline__ bool rotates() const { return args.rope.inv_freq != nullptr; }
  // Query row of a column of a sequence; exact while columns times group stay below 65536.
  __device__ __forceinline__ int row_of(int place) const { return place * group_inverse >> 16; }
};

template <class TYPE, int DIM, int BITS, int TILES>
struct Config {
  using T = TYPE;
  using Product = ProductType<TYPE, BITS>;
  static constexpr int kDim = DIM;
  static constexpr int kBits = BITS;
  static constexpr int kN = TILES;  // n8 tiles of columns
  static constexpr int kColumns = 8 * kN;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kOwn = (kSteps + kWarps - 1) / kWarps;  // 16-dim rows of V a warp takes
  static constexpr int kSlotBytes = (kTileBytes<kDim, kBits> + 127) / 128 * 128;
  // A third CTA hides what two wait for where tiles are small enough for rings of more than a unit.
  static constexpr int kCtas = kBits == 4 && kN == 1 ? 3 : 2;
  // As registers allow: parts folded at once; parts folded where they are computed.
  static constexpr int kFoldBatch = kN == 2 ? 1 : 4;
  static constexpr bool kRuns = kN == 1;
  // Whether what is folded lies in shared memory meanwhile: the registers are few with three CTAs an SM.
  static constexpr bool kSharesTotal = kCtas == 3;
  // Whether a warp has a row of V's dims number `o`; known to the compiler but for the last of 80 and 96.
  static __device__ __forceinline__ bool owns(int warp, int o) {
    return kWarps * (o + 1) <= kSteps || warp + kWarps * o < kSteps;
  }
};

// Factors and sums of parts that meet, for pairs of columns.
inline constexpr int kFoldParts = 32;
template <class C>
struct FoldChunk {
  float4 factors[kFoldParts][C::kColumns / 2];  // before, part; of one column, of the other
  float2 sums[kFoldParts][C::kColumns / 2];
};

struct Unit {
  int sequence = -1;  // -1: nothing to do
  int part = 0;
  int parts = 0;
  int kv_head = 0;
  int column0 = 0;
  int columns = 0;
  int num_keys = 0;
  int history = 0;  // keys before the sequence's first row
  int tiles = 0;    // KV tiles of the part
  int row = 0;      // first row of the sequence
};

// In a step of one unit a CTA: what a CTA folds, which ended with unit `end` - 1, as number `folder` of
// `folders` that do so.
struct FoldPlan {
  Unit unit;  // that one; sequence -1: nothing
  int end;
  int folder;
  int folders;
};

// What the warps hand each other. Fragments of P as the lane that needs them reads them.
template <class C>
struct Exchange {
  union {
    uint2 probabilities[C::kN][kBlockTokens / 16 * kPartTiles][32];
    FoldChunk<C> fold;
  };
  // Rotated, and zeros past the unit's columns; the padding spreads rows over the banks.
  alignas(16) typename C::Product query[C::kColumns][C::kDim + 8];
  float2 rotations[kMaxDecodeRows][C::kDim / 2];  // sine, cosine of the sequence's rows
  float tile_max[kPartTiles][C::kColumns];
  float sums[kPartTiles][8 * C::kColumns];  // by residues of the keys mod 8
  float zeros[C::kBits == 16 ? 1 : kPartTiles][8 * C::kColumns];
  float query_sums[kWarps][C::kColumns];
  // Each warp's own copies, of what few registers could hold.
  Unit unit[kWarps];
  FoldPlan plan[kWarps];
  // What each thread has folded so far: outputs; maxima and sums.
  float4 total[C::kSharesTotal ? (C::kOwn + 1) * C::kN : 1][C::kSharesTotal ? kConsumers : 1];
  uint8_t levels[C::kBits == 16 ? 1 : C::kDim];  // the producer's
};

// The barriers of a CTA. A tile with new tokens lands apart, and is full when they are in it.
struct Barriers {
  uint64_t full[kMaxSlots];
  uint64_t empty[kMaxSlots];
  uint64_t landed[2][2];  // of keys, of values; the new tokens of a part lie in two tiles at most
};

// The units of a CTA: a run of those of the step, which lie sequence by sequence, column block and KV
// head by head, part by part. Within a run of parts the query stays.
struct Run {
  int begin, end;
  int units;    // of the step
  bool single;  // at most one a CTA, and some CTAs have none: decode_records.cuh
};
__device__ __forceinline__ int run_begin(int64_t units, int cta) {
  return static_cast<int>(units * cta / gridDim.x);
}
__device__ __forceinline__ Run run_of_cta(const Params& p) {
  const int units = __ldcg(p.args.step.block_stride + 1) * p.column_blocks * p.args.num_kv_heads;
  const int cta = static_cast<int>(blockIdx.x);
  if (p.args.records != nullptr && units + kFolders <= static_cast<int>(gridDim.x)) {
    return {min(cta, units), min(cta + 1, units), units, true};
  }
  return {run_begin(units, cta), run_begin(units, cta + 1), units, false};
}

__device__ __forceinline__ int tiles_of(int num_keys, int part) {
  return min(kPartTiles, (num_keys + kBlockTokens - 1) / kBlockTokens - part * kPartTiles);
}

// Unit `index` of the step. May run before the wait for the kernel before: StepArrays are read past L1.
template <class C>
__device__ __forceinline__ Unit find_unit(const Params& p, int index) {
  Unit unit;
  const DecodeAttentionArgs& a = p.args;
  const int heads = p.column_blocks * a.num_kv_heads;
  const int sequence = __ldcg(a.step.decode_items + index / heads).x;
  unit.num_keys = __ldcg(a.step.kv_len + sequence);
  unit.row = __ldcg(a.step.query_start + sequence);
  const int rows = __ldcg(a.step.query_start + sequence + 1) - unit.row;
  unit.parts = (unit.num_keys + kSplitTokens - 1) / kSplitTokens;
  const int within = index - __ldcg(a.step.split_start + sequence) * heads;
  unit.part = within % unit.parts;
  unit.kv_head = within / unit.parts % a.num_kv_heads;
  unit.column0 = within / unit.parts / a.num_kv_heads * C::kColumns;
  unit.columns = min(C::kColumns, rows * p.group - unit.column0);
  if (unit.columns > 0) unit.sequence = sequence;
  unit.history = unit.num_keys - rows;
  unit.tiles = tiles_of(unit.num_keys, unit.part);
  return unit;
}

// Keys of the sequence that a column of the unit sees.
__device__ __forceinline__ int keys_seen(const Params& p, const Unit& unit, int column) {
  return unit.history + p.row_of(unit.column0 + column) + 1;
}

// The one after it: the next part, or looked up.
template <class C>
__device__ __forceinline__ Unit next_unit(const Params& p, Unit unit, int index, int end) {
  if (++unit.part < unit.parts) {
    unit.tiles = tiles_of(unit.num_keys, unit.part);
    return unit;
  }
  return index < end ? find_unit<C>(p, index) : Unit{};
}

// A warp's copy of a unit in shared memory.
__device__ __forceinline__ void set_unit(Unit& place, const Unit& unit, int lane) {
  __syncwarp();
  if (lane == 0) place = unit;
  __syncwarp();
}

// A place in the ring and the parity of the phase that its barriers are in.
struct RingCursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int count, int slots) {  // count <= slots
    slot += count;
    const bool wraps = slot >= slots;
    slot -= wraps ? slots : 0;
    parity ^= wraps ? 1U : 0U;
  }
};

__device__ __forceinline__ void consumer_sync() { named_barrier<1>(kConsumers); }

// out: register i of [o][n] is dim 16 (warp + 4 o) + g + 8 (i / 2), column 2c + i % 2.
template <class C>
using Out = float[C::kOwn][C::kN][4];

// A row of the step's q, k or v: head `head` of all.
template <class C>
__device__ __forceinline__ const typename C::T* qkv_head(const DecodeAttentionArgs& a, int64_t row,
                                                         int head) {
  return static_cast<const typename C::T*>(a.qkv) +
         (row * (a.num_heads + 2 * a.num_kv_heads) + head) * C::kDim;
}

}  // namespace turbomind::cuda::decode
