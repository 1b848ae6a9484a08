// Decode attention's units of work, its ring of tiles and what its warps hand each other: shared by the
// producer (decode_produce.cuh), the consumers (kernels/attention_decode.cu) and what brings parts together
// (decode_fold.cuh, decode_records.cuh). Which CTA does what, and when: decode_order.h. Device only, but for
// the sizes that the launch needs.
#pragma once

#include "backend/cuda/decode_order.h"
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
  // Parts fetched at once to be folded: alone, and beside the product of a unit.
  static constexpr int kFoldBatch = kN == 2      ? 2
                                    : kCtas == 2 ? (kDim % 64 == 0 ? 4 : 3)
                                                 : (kDim == 128 ? 3 : 2);
  static constexpr int kFoldAhead = kN == 2 || kDim % 64 != 0 ? 1 : 2;
  // Whether what is folded lies in shared memory meanwhile, where registers are few.
  static constexpr bool kSharesTotal = kCtas == 3 || kN == 2;
  // Whether a warp has a row of V's dims number `o`; known to the compiler but for the last of 80 and 96.
  static __device__ __forceinline__ bool owns(int warp, int o) {
    return kWarps * (o + 1) <= kSteps || warp + kWarps * o < kSteps;
  }
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
  uint2 probabilities[C::kN][kBlockTokens / 16 * kPartTiles][32];
  // Rotated, and zeros past the unit's columns; the padding spreads rows over the banks.
  alignas(16) typename C::Product query[C::kColumns][C::kDim + 8];
  float2 rotations[kMaxDecodeRows][C::kDim / 2];  // sine, cosine of the sequence's rows
  float tile_max[kPartTiles][C::kColumns];
  float sums[kPartTiles][8 * C::kColumns];  // by residues of the keys mod 8
  float zeros[C::kBits == 16 ? 1 : kPartTiles][8 * C::kColumns];
  float query_sums[kWarps][C::kColumns];
  // Each warp's own copies, of what few registers could hold.
  Unit unit[kWarps];
  PartOrder order[kWarps];
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
// head by head, as many as there are parts. It does the last of these heads first, and of a head that it
// shares the parts that its order tells. Within a head the query stays.
struct Run {
  int begin, end;
  int units;    // of the step
  bool single;  // at most one a CTA, and some CTAs have none
};
__device__ __forceinline__ Run run_of_cta(const Params& p) {
  const int units = __ldcg(p.args.step.block_stride + 1) * p.column_blocks * p.args.num_kv_heads;
  const int cta = static_cast<int>(blockIdx.x);
  const int ctas = static_cast<int>(gridDim.x);
  if (units + kFolders <= ctas) return {min(cta, units), min(cta + 1, units), units, true};
  return {run_begin(units, ctas, cta), run_begin(units, ctas, cta + 1), units, false};
}
// The order of the parts of a sequence and head whose first is unit `first`; `unit`: any of them, the CTA's
// own if it has one alone.
__device__ __forceinline__ PartOrder order_of(const Run& run, int first, const Unit& unit) {
  if (run.single) {
    PartOrder order{};
    order.last_begin = -unit.part;
    return order;
  }
  return part_order(run.units, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x), first,
                    unit.parts);
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

// The units of a CTA, one after the other.
template <class C>
struct Units {
  Unit unit;  // sequence -1: none, or nothing to do
  PartOrder order;
  int first = 0;     // unit of the step: the first part of its sequence and head
  int done = 0;      // units before it
  int head_end = 0;  // as many, when the CTA is through with this head

  __device__ __forceinline__ bool any(const Run& run) const { return done < run.end - run.begin; }
  // Looks up number `done`.
  __device__ __forceinline__ void find(const Params& p, const Run& run) {
    if (done == head_end) {
      unit = Unit{};
      if (!any(run)) return;
      const int index = run.end - done - 1;
      unit = find_unit<C>(p, index);
      first = index - unit.part;
      order = order_of(run, first, unit);
      head_end += min(unit.part + 1, index + 1 - run.begin);
    }
    unit.part = order.part(done);
    unit.tiles = tiles_of(unit.num_keys, unit.part);
  }
};

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
