// Attention of the few new rows of many sequences (decode; drafts to verify) over their paged keys,
// by the definition in flash.cuh. Unit of work: one part of 256 keys, one KV head, up to 8 or 16
// columns (query rows x query heads of the group). Persistent CTAs: a producer warp keeps a ring of KV
// tiles full, ahead of the units, so that memory never waits for arithmetic; four consumer warps take
// one tile of keys each for the scores, meet twice a unit (maxima; probabilities), and take 16 dims in
// turn for the product with V. Keys are the m16 operand, columns the n8 one. Parts meet in L2, where the
// CTA that comes last folds them in order. Bound: HBM, K and V read once for all columns.
//
// In a step without prefill rows it also does rope_kv's work: a CTA rotates the columns that it takes,
// and the one that takes a new token's key puts its K and V into the tiles in shared memory, exactly as
// the cache will hold them, and into the cache. Nothing that is fetched then comes from this step, and
// the ring fills before the kernel before this one has ended.
#include <algorithm>

#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/device/head.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kWarps = kPartTiles;  // consumers: a tile each
constexpr int kConsumers = kWarps * 32;
constexpr int kThreads = kConsumers + 32;
constexpr int kMaxSlots = 16;

struct Params {
  DecodeAttentionArgs args;
  int group;          // query heads a KV head
  int column_blocks;  // most of a sequence
  int pairs;          // stored column pairs of a unit
  int slots;
  float scale_log2;
  __device__ __forceinline__ bool rotates() const { return args.rope.inv_freq != nullptr; }
};

template <class TYPE, int DIM, int BITS, int TILES>
struct Config {
  using T = TYPE;
  static constexpr int kDim = DIM;
  static constexpr int kBits = BITS;
  static constexpr int kN = TILES;  // n8 tiles of columns
  static constexpr int kColumns = 8 * kN;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kOwn = (kSteps + kWarps - 1) / kWarps;  // 16-dim rows of V a warp takes
  static constexpr int kSlotBytes = (kTileBytes<kDim, kBits> + 127) / 128 * 128;
  static constexpr int kCtas = 2;  // meant to share an SM
  // Parts folded at once: as many as registers hold, at most 8 / kN (see fold_parts).
  static constexpr int kFoldBatch = kN == 2 ? 2 : kBits == 16 ? 8 : 4;
  static constexpr bool kEarlyRows = kN == 1;  // registers hold new keys and values from the start
};

// What the warps hand each other. Fragments of P as the lane that needs them reads them.
template <class C>
struct Exchange {
  uint2 probabilities[C::kN][kBlockTokens / 16 * kPartTiles][32];
  float tile_max[kPartTiles][C::kColumns];
  float sums[kPartTiles][8][C::kColumns];
  float zeros[C::kBits == 16 ? 1 : kPartTiles][8][C::kColumns];
  float2 rotations[kMaxDecodeRows][C::kDim / 2];  // sine, cosine of the sequence's rows
  typename C::T query[C::kColumns]
                     [C::kDim + 8];  // rotated; the padding spreads rows over the banks
  uint8_t levels[kWarps][C::kBits == 16 ? 1 : C::kDim];
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
  int64_t row = 0;  // first row of the sequence
};

// The units of a CTA: a run of those of the step, which lie sequence by sequence, column block and KV
// head by head, part by part. Within a run of parts the query stays, and one ticket counts them all.
struct Run {
  int begin, end;
};
__device__ __forceinline__ Run run_of_cta(const Params& p) {
  const int64_t units = static_cast<int64_t>(__ldcg(p.args.step.block_stride + 1)) *
                        p.column_blocks * p.args.num_kv_heads;
  return {static_cast<int>(units * blockIdx.x / gridDim.x),
          static_cast<int>(units * (blockIdx.x + 1) / gridDim.x)};
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
  const int rows = __ldcg(a.step.query_start + sequence + 1) - static_cast<int>(unit.row);
  unit.parts = (unit.num_keys + kSplitTokens - 1) / kSplitTokens;
  const int within = index - __ldcg(a.step.split_start + sequence) * heads;
  unit.part = within % unit.parts;
  unit.kv_head = within / unit.parts % a.num_kv_heads;
  unit.column0 = within / unit.parts / a.num_kv_heads * C::kColumns;
  unit.columns = min(C::kColumns, rows * p.group - unit.column0);
  if (unit.columns > 0) unit.sequence = sequence;
  unit.history = unit.num_keys - rows;
  unit.tiles =
      min(kPartTiles, (unit.num_keys + kBlockTokens - 1) / kBlockTokens - unit.part * kPartTiles);
  return unit;
}

// The one after it: the next part, or looked up.
template <class C>
__device__ __forceinline__ Unit next_unit(const Params& p, Unit unit, int index, int end) {
  if (++unit.part < unit.parts) {
    unit.tiles =
        min(kPartTiles, (unit.num_keys + kBlockTokens - 1) / kBlockTokens - unit.part * kPartTiles);
    return unit;
  }
  return index < end ? find_unit<C>(p, index) : Unit{};
}

// A place in the ring and the parity of the phase that its barriers are in.
struct RingCursor {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int count, int slots) {
    slot += count;
    while (slot >= slots) {
      slot -= slots;
      parity ^= 1;
    }
  }
};

// ---- producer ------------------------------------------------------------------------------------

// One tile into a slot, by the lanes of the producer warp.
template <class C>
__device__ __forceinline__ void load_slot(uint32_t slot, uint32_t full, const char* tile,
                                          int lane) {
  constexpr int kBytes = kTileBytes<C::kDim, C::kBits>;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (lane == 0) {
    mbarrier_expect_bytes(full, kBytes);
    bulk_load(slot, tile, kBytes, full);
  }
#else
  for (int i = lane * 16; i < kBytes; i += 32 * 16) cp_async_16(slot + i, tile + i, true);
  mbarrier_arrive_copies(full);
#endif
}

template <class C>
__device__ __forceinline__ void produce(const Params& p, uint32_t ring, uint32_t full,
                                        uint32_t empty, const Run& run, int lane) {
  constexpr int64_t kBytes = kTileBytes<C::kDim, C::kBits>;
  const DecodeAttentionArgs& a = p.args;
  if (!p.rotates()) grid_dependency_wait();  // else nothing here was written in this step
  const auto block_of = [&](const Unit& unit) {
    if (unit.sequence < 0 || lane >= unit.tiles) return 0;
    return __ldcg(a.step.block_table + unit.sequence * __ldcg(a.step.block_stride) +
                  unit.part * kPartTiles + lane);
  };
  RingCursor at{0, 1};  // the first wait for each slot passes at once
  if (run.begin >= run.end) return;
  Unit unit = find_unit<C>(p, run.begin);
  int block = block_of(unit);
  for (int index = run.begin; index < run.end; ++index) {
    // The next unit is looked up before this one waits for room.
    const Unit next = next_unit<C>(p, unit, index + 1, run.end);
    const int next_block = index + 1 < run.end ? block_of(next) : 0;
    for (int i = 0; i < 2 * unit.tiles && unit.sequence >= 0; ++i) {
      const bool values = i >= unit.tiles;
      const int64_t id = __shfl_sync(~0U, block, values ? i - unit.tiles : i);
      mbarrier_wait(empty + at.slot * 8, at.parity);
      load_slot<C>(ring + at.slot * C::kSlotBytes, full + at.slot * 8,
                   static_cast<const char*>(a.cache) +
                       ((id * a.num_kv_heads + unit.kv_head) * 2 + (values ? 1 : 0)) * kBytes,
                   lane);
      at.advance(1, p.slots);
    }
    unit = next;
    block = next_block;
  }
}

// ---- consumers -----------------------------------------------------------------------------------

__device__ __forceinline__ void consumer_sync() { named_barrier<1>(kConsumers); }

__device__ __forceinline__ float group_max(float value) {  // over the lanes of equal lane % 4
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0U, value, offset));
  }
  return value;
}
__device__ __forceinline__ float group_sum(float value) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) value += __shfl_xor_sync(~0U, value, offset);
  return value;
}

// A row of the step's q, k or v: head `head` of all.
template <class C>
__device__ __forceinline__ const typename C::T* qkv_head(const DecodeAttentionArgs& a, int64_t row,
                                                         int head) {
  return static_cast<const typename C::T*>(a.qkv) +
         (row * (a.num_heads + 2 * a.num_kv_heads) + head) * C::kDim;
}

// The angles of the unit's rows; before the wait for the kernel before, too.
template <class C>
__device__ __forceinline__ void stage_rotations(Exchange<C>& exchange, const Params& p,
                                                const Unit& unit) {
  constexpr int kHalf = C::kDim / 2;
  const RopeArgs& rope = p.args.rope;
  const int rows = unit.num_keys - unit.history;
  for (int i = threadIdx.x; i < rows * kHalf; i += kConsumers) {
    const int position = __ldcg(p.args.step.positions + unit.row + i / kHalf);
    const SineCosine angle = sine_cosine(rope, position, i % kHalf);
    exchange.rotations[i / kHalf][i % kHalf] = {angle.sine, angle.cosine};
  }
}
template <int kDim>
__device__ __forceinline__ Rotation load_rotation(const float2 (&angles)[kDim / 2], int lane) {
  Rotation rotation;
#pragma unroll
  for (int i = 0; i < kHeadPairs; ++i) {
    const float2 angle = lane + 32 * i < kDim / 2 ? angles[lane + 32 * i] : float2{0.0F, 1.0F};
    rotation.sine[i] = angle.x;
    rotation.cosine[i] = angle.y;
  }
  return rotation;
}

// The unit's columns, rotated, to the exchange; column by column over the warps, from the one after
// those that have new keys and values.
template <class C>
__device__ __forceinline__ void stage_query(Exchange<C>& exchange, const Params& p,
                                            const Unit& unit, int warp, int lane) {
  const DecodeAttentionArgs& a = p.args;
  constexpr int kMost = C::kColumns / kWarps;
  const int first = (warp + 2 * kWarps - unit.tiles - 1) % kWarps;
  Head head[kMost] = {};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int column = first + i * kWarps;
    const int place = unit.column0 + column;
    if (column >= unit.columns) continue;
    head[i] = load_head<typename C::T, C::kDim>(
        qkv_head<C>(a, unit.row + place / p.group, unit.kv_head * p.group + place % p.group), lane);
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int column = first + i * kWarps;
    if (column >= unit.columns) continue;
    const int row = (unit.column0 + column) / p.group;
    norm_and_rotate<C::kDim>(head[i], a.rope.q_norm, a.rope.q_norm_eps,
                             load_rotation<C::kDim>(exchange.rotations[row], lane), lane);
    store_head<typename C::T, C::kDim>(exchange.query[column], head[i], lane);
  }
}

// The new tokens whose keys lie in a tile of a part: [begin, end) of the sequence's rows.
struct NewRows {
  int begin = 0;
  int end = 0;
};
__device__ __forceinline__ NewRows new_rows(const Params& p, const Unit& unit, int tile) {
  if (!p.rotates() || tile >= unit.tiles) return {};
  const int first_key = (unit.part * kPartTiles + tile) * kBlockTokens;
  return {max(first_key, unit.history) - unit.history,
          min(first_key + kBlockTokens, unit.num_keys) - unit.history};
}
template <class C>
__device__ __forceinline__ Head load_new(const Params& p, const Unit& unit, int row, bool is_v,
                                         int lane) {
  const DecodeAttentionArgs& a = p.args;
  return load_head<typename C::T, C::kDim>(
      qkv_head<C>(a, unit.row + row, a.num_heads + (is_v ? a.num_kv_heads : 0) + unit.kv_head),
      lane);
}

// K or V of the new tokens of a tile into its copy in shared memory (other CTAs may have one too) and
// once into the cache. `head`: of the first of them, with kEarlyRows. Other warps read the tile after
// a barrier only.
template <class C>
__device__ __forceinline__ void put_new_rows(Exchange<C>& exchange, Head head, const NewRows& rows,
                                             const Params& p, const Unit& unit, char* tile,
                                             bool is_v, int warp, int lane) {
  const DecodeAttentionArgs& a = p.args;
#pragma unroll 1
  for (int row = rows.begin; row < rows.end; ++row) {
    if (!C::kEarlyRows || row > rows.begin) head = load_new<C>(p, unit, row, is_v, lane);
    if (!is_v) {
      norm_and_rotate<C::kDim>(head, a.rope.k_norm, a.rope.k_norm_eps,
                               load_rotation<C::kDim>(exchange.rotations[row], lane), lane);
    }
    const int slot = __ldcg(a.step.slots + unit.row + row);
    char* cached = unit.column0 == 0 && slot >= 0
                       ? cache_tile<C::kDim, C::kBits>(a.cache, slot / kBlockTokens, a.num_kv_heads,
                                                       unit.kv_head, is_v)
                       : nullptr;
    store_in_tiles<typename C::T, C::kDim, C::kBits>(
        tile, cached, (unit.history + row) % kBlockTokens, is_v, head, exchange.levels[warp], lane);
  }
  fence_async_shared();  // the slot is written by a bulk copy next
  __syncwarp();
}

// Columns as the n8 operand: a lane holds dims 2c, 2c + 1, 2c + 8, 2c + 9 of column lane / 4.
template <class C>
__device__ __forceinline__ void load_columns(uint32_t (&q)[C::kN][C::kSteps][2],
                                             const Exchange<C>& exchange, const Params& p,
                                             const Unit& unit, int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    const int column = n * 8 + lane / 4;
    const int place = unit.column0 + column;
    const typename C::T* x = p.rotates() ? exchange.query[column]
                                         : qkv_head<C>(p.args, unit.row + place / p.group,
                                                       unit.kv_head * p.group + place % p.group);
    x += lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        q[n][step][i] =
            column < unit.columns ? *reinterpret_cast<const uint32_t*>(x + step * 16 + i * 8) : 0U;
      }
    }
  }
}

// sum(q) of columns 2c and 2c + 1.
template <class C>
__device__ __forceinline__ float2 column_sums(const uint32_t (&q)[C::kSteps][2], int lane) {
  float sum = 0.0F;
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    sum = add_pair<typename C::T>(add_pair<typename C::T>(sum, q[step][0]), q[step][1]);
  }
  sum = quad_sum(sum);
  return {__shfl_sync(~0U, sum, lane % 4 * 8), __shfl_sync(~0U, sum, lane % 4 * 8 + 4)};
}

// Scores of the 64 keys of a tile: register i of [m][n] is key 16 m + g + 8 (i / 2), column 2c + i % 2.
template <class C>
__device__ __forceinline__ void tile_scores(float (&score)[4][C::kN][4],
                                            const uint32_t (&q)[C::kN][C::kSteps][2], uint32_t tile,
                                            int lane) {
  using Fragments = KeyFragments<typename C::T, C::kDim, C::kBits>;
#pragma unroll
  for (int step = 0; step < C::kSteps; step += Fragments::kGroup) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a[Fragments::kGroup][4];
      Fragments::load(a, tile, m * 16, step, lane);
#pragma unroll
      for (int e = 0; e < Fragments::kGroup; ++e) {
#pragma unroll
        for (int n = 0; n < C::kN; ++n) {
          mma_16816<typename C::T>(score[m][n], a[e], q[n][step + e][0], q[n][step + e][1]);
        }
      }
    }
  }
  if constexpr (C::kBits != 16) {
    float2 query_sum[C::kN];
#pragma unroll
    for (int n = 0; n < C::kN; ++n) query_sum[n] = column_sums<C>(q[n], lane);
    const uint32_t meta = tile + PackedTile<C::kDim, C::kBits>::kDataBytes;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t word[4];
        load_shared<4>(word, meta + (m * 16 + r * 8 + lane / 4) * 4);
        const float2 scale_zero = unpack_scale_zero<C::kBits>(word[0]);
#pragma unroll
        for (int n = 0; n < C::kN; ++n) {
          score[m][n][2 * r] = packed_score(score[m][n][2 * r], scale_zero, query_sum[n].x);
          score[m][n][2 * r + 1] = packed_score(score[m][n][2 * r + 1], scale_zero, query_sum[n].y);
        }
      }
    }
  }
}

// Hides what a column must not see; the tile's maxima to the exchange.
template <class C>
__device__ __forceinline__ void mask_and_maximum(float (&score)[4][C::kN][4], Exchange<C>& exchange,
                                                 const Params& p, const Unit& unit, int tile,
                                                 int lane) {
  const int first_key = (unit.part * kPartTiles + tile) * kBlockTokens;
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    float2 largest;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = n * 8 + lane % 4 * 2 + h;
      const int row = (unit.column0 + min(column, unit.columns - 1)) / p.group;
      const int limit = unit.history + row + 1 - first_key;
      float most = -INFINITY;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& value = score[m][n][2 * r + h];
          if (m * 16 + r * 8 + lane / 4 >= limit) value = -INFINITY;
          most = fmaxf(most, value);
        }
      }
      (h == 0 ? largest.x : largest.y) = group_max(most);
    }
    if (lane < 4) {
      *reinterpret_cast<float2*>(&exchange.tile_max[tile][n * 8 + lane * 2]) = largest;
    }
  }
}

// Running maxima over the tiles of a part, of two columns.
template <class C>
struct Maxima {
  float2 factor[kPartTiles][C::kN];  // of what the tiles before have summed
  float2 last[C::kN];
  float2 own[C::kN];  // after this warp's tile
};

template <class C>
__device__ __forceinline__ void running_maxima(Maxima<C>& maxima, const Exchange<C>& exchange,
                                               int tiles, int own, float scale_log2, int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    float2 largest{-INFINITY, -INFINITY};
#pragma unroll
    for (int t = 0; t < kPartTiles; ++t) {
      if (t >= tiles) break;
      const float2 tile =
          *reinterpret_cast<const float2*>(&exchange.tile_max[t][n * 8 + lane % 4 * 2]);
      const float2 after{fmaxf(largest.x, tile.x), fmaxf(largest.y, tile.y)};
      maxima.factor[t][n] = {
          rescale_factor(largest.x, max_offset(after.x, scale_log2), scale_log2),
          rescale_factor(largest.y, max_offset(after.y, scale_log2), scale_log2)};
      largest = after;
      if (t == own) maxima.own[n] = after;
    }
    maxima.last[n] = largest;
  }
}

// Scores → probabilities, as fragments of the n8 operand, and their sums, in the exchange.
template <class C>
__device__ __forceinline__ void share_probabilities(float (&score)[4][C::kN][4],
                                                    Exchange<C>& exchange, const Maxima<C>& maxima,
                                                    uint32_t value_tile, int valid, int tile,
                                                    float scale_log2, int lane) {
  constexpr float kShift = kProbabilityShift<typename C::T, C::kBits>;
  float2 scale_zero[4][2];
  if constexpr (C::kBits != 16) {
    const uint32_t meta = value_tile + PackedTile<C::kDim, C::kBits>::kDataBytes;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = m * 16 + r * 8 + lane / 4;
        uint32_t word[4];
        load_shared<4>(word, meta + token * 4);
        scale_zero[m][r] =
            token < valid ? unpack_scale_zero<C::kBits>(word[0]) : float2{0.0F, 0.0F};
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    const float offset[2] = {max_offset(maxima.own[n].x, scale_log2),
                             max_offset(maxima.own[n].y, scale_log2)};
    float sum[2] = {};
    float zero[2] = {};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = fast_exp2(fmaf(score[m][n][i], scale_log2, kShift - offset[i % 2]));
        sum[i % 2] += x;
        score[m][n][i] = x;
        if constexpr (C::kBits != 16) {
          zero[i % 2] = fmaf(x, scale_zero[m][i / 2].y, zero[i % 2]);
          score[m][n][i] = __fmul_rn(x, scale_zero[m][i / 2].x);
        }
      }
      exchange.probabilities[n][tile * 4 + m][lane] = {
          transpose_8x8(pack_pair<typename C::T>(score[m][n][0], score[m][n][1])),
          transpose_8x8(pack_pair<typename C::T>(score[m][n][2], score[m][n][3]))};
    }
    const int column = n * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(&exchange.sums[tile][lane / 4][column]) = {sum[0], sum[1]};
    if constexpr (C::kBits != 16) {
      *reinterpret_cast<float2*>(&exchange.zeros[tile][lane / 4][column]) = {zero[0], zero[1]};
    }
  }
}

// A chain of sums over the tiles, then over the eight residues: of columns 2c and 2c + 1.
template <class C>
__device__ __forceinline__ float2 part_sum(const float (&sums)[kPartTiles][8][C::kColumns],
                                           const Maxima<C>& maxima, int n, int tiles, int lane) {
  float2 total{0.0F, 0.0F};
#pragma unroll
  for (int t = 0; t < kPartTiles; ++t) {
    if (t >= tiles) break;
    const float2 sum = *reinterpret_cast<const float2*>(&sums[t][lane / 4][n * 8 + lane % 4 * 2]);
    total = {fmaf(total.x, maxima.factor[t][n].x, sum.x),
             fmaf(total.y, maxima.factor[t][n].y, sum.y)};
  }
  return {group_sum(total.x), group_sum(total.y)};
}

// out: register i of [o][n] is dim 16 (warp + 4 o) + g + 8 (i / 2), column 2c + i % 2.
template <class C>
using Out = float[C::kOwn][C::kN][4];

template <class C>
__device__ __forceinline__ void store_rows(const Out<C>& out, const float2 (&sum)[C::kN],
                                           const Params& p, const Unit& unit, int warp, int lane) {
  const DecodeAttentionArgs& a = p.args;
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = n * 8 + lane % 4 * 2 + h;
      if (column >= unit.columns) continue;
      const int place = unit.column0 + column;
      const int64_t row = unit.row + place / p.group;
      const int head = unit.kv_head * p.group + place % p.group;
      auto* y = static_cast<typename C::T*>(a.y) + (row * a.num_heads + head) * C::kDim + lane / 4;
      const float total = h == 0 ? sum[n].x : sum[n].y;
      const float inverse = total > 0.0F ? 1.0F / total : 0.0F;
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        const int m = warp + kWarps * o;
        if (m >= C::kSteps) break;
        y[m * 16] = from_float<typename C::T>(out[o][n][h] * inverse);
        y[m * 16 + 8] = from_float<typename C::T>(out[o][n][2 + h] * inverse);
      }
    }
  }
}

// Place of a unit's registers [o][n] of this lane among the parts in L2.
template <class C>
__device__ __forceinline__ int64_t partial_index(const Params& p, int64_t unit, int m, int n,
                                                 int lane) {
  return ((unit * C::kSteps + m) * p.pairs + n * 4 + lane % 4) * 8 + lane / 4;
}

// All parts of a sequence are in L2, units `first` and on: folds them left to right.
template <class C>
__device__ __forceinline__ void fold_parts(const Params& p, const Unit& unit, int64_t first,
                                           int warp, int lane) {
  const DecodeAttentionArgs& a = p.args;
  const auto* partial = reinterpret_cast<const float4*>(a.partial_out);
  const auto* max_sum = reinterpret_cast<const float4*>(a.partial_max_sum);
  Out<C> total = {};
  float2 largest[C::kN];
  float2 sum[C::kN] = {};
#pragma unroll
  for (int n = 0; n < C::kN; ++n) largest[n] = {-INFINITY, -INFINITY};
  for (int batch = 0; batch < unit.parts; batch += C::kFoldBatch) {
    float4 values[C::kFoldBatch][C::kOwn][C::kN];
    // This lane's pair of columns (of 4 kN) of its part: maximum and sum of one, of the other.
    const int pair = lane % (4 * C::kN);
    const int64_t own = first + batch + lane / (4 * C::kN);
    float4 max_and_sum{};
    if (own < first + unit.parts && pair < p.pairs) {
      max_and_sum = __ldcg(max_sum + own * p.pairs + pair);
    }
#pragma unroll
    for (int i = 0; i < C::kFoldBatch; ++i) {
      const int64_t at = first + batch + i;
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        if (batch + i >= unit.parts || n * 4 + lane % 4 >= p.pairs) continue;
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
          const int m = warp + kWarps * o;
          if (m < C::kSteps) {
            values[i][o][n] = __ldcg(partial + partial_index<C>(p, at, m, n, lane));
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < C::kFoldBatch; ++i) {
      if (batch + i >= unit.parts) break;
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        const int from = (i * C::kN + n) * 4 + lane % 4;
        const float4 part{
            __shfl_sync(~0U, max_and_sum.x, from), __shfl_sync(~0U, max_and_sum.y, from),
            __shfl_sync(~0U, max_and_sum.z, from), __shfl_sync(~0U, max_and_sum.w, from)};
        if (n * 4 + lane % 4 >= p.pairs) continue;
        const FoldFactors x = fold_factors(largest[n].x, part.x, p.scale_log2);
        const FoldFactors y = fold_factors(largest[n].y, part.z, p.scale_log2);
        sum[n] = {fold(sum[n].x, part.y, x), fold(sum[n].y, part.w, y)};
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
          const float4& v = values[i][o][n];
          total[o][n][0] = fold(total[o][n][0], v.x, x);
          total[o][n][1] = fold(total[o][n][1], v.y, y);
          total[o][n][2] = fold(total[o][n][2], v.z, x);
          total[o][n][3] = fold(total[o][n][3], v.w, y);
        }
      }
    }
  }
  store_rows<C>(total, sum, p, unit, warp, lane);
}

// A finished part: the row itself, or to L2.
template <class C>
__device__ __forceinline__ void finish_part(const Out<C>& out, const Maxima<C>& maxima,
                                            const float2 (&sum)[C::kN], const Params& p,
                                            const Unit& unit, int index, int warp, int lane) {
  const DecodeAttentionArgs& a = p.args;
  if (unit.parts == 1) {
    store_rows<C>(out, sum, p, unit, warp, lane);
    return;
  }
  auto* partial = reinterpret_cast<float4*>(a.partial_out);
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    if (n * 4 + lane % 4 >= p.pairs) continue;
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
      const int m = warp + kWarps * o;
      if (m >= C::kSteps) break;
      __stcg(partial + partial_index<C>(p, index, m, n, lane),
             make_float4(out[o][n][0], out[o][n][1], out[o][n][2], out[o][n][3]));
    }
    if (warp == 0 && lane < 4) {
      __stcg(reinterpret_cast<float4*>(a.partial_max_sum) + static_cast<int64_t>(index) * p.pairs +
                 n * 4 + lane,
             make_float4(maxima.last[n].x, sum[n].x, maxima.last[n].y, sum[n].y));
    }
  }
}

// This CTA has finished `count` parts of a sequence, the last of them unit `index`: counts them, and
// folds all if they are the last.
template <class C>
__device__ __forceinline__ void finish_parts(const Params& p, const Unit& unit, int index,
                                             int count, bool* last, int warp, int lane) {
  const DecodeAttentionArgs& a = p.args;
  consumer_sync();
  uint32_t* ticket =
      a.tickets +
      (static_cast<int64_t>(unit.sequence) * p.column_blocks + unit.column0 / C::kColumns) *
          a.num_kv_heads +
      unit.kv_head;
  if (threadIdx.x ==
      0) {  // its fences cover what the CTA wrote before, and reads after, the barriers
    __threadfence();
    *last = atomicAdd(ticket, static_cast<uint32_t>(count)) ==
            static_cast<uint32_t>(unit.parts - count);
    __threadfence();
  }
  consumer_sync();
  if (!*last) return;
  fold_parts<C>(p, unit, index - unit.part, warp, lane);
  if (threadIdx.x == 0) *ticket = 0;
}

// Rows of V past the last key hold anything, and 0 times it may be no number.
template <class C>
__device__ __forceinline__ void clear_values(uint32_t tile, int valid, int lane) {
  using Tile = HalfTile<C::kDim>;
  constexpr int kPieces = C::kDim / 8;
  for (int i = lane; i < (kBlockTokens - valid) * kPieces; i += 32) {
    store_shared_zero16(tile + Tile::offset(valid + i / kPieces, i % kPieces * 8));
  }
  fence_async_shared();  // the slot is written by a bulk copy next
}

template <class C>
__device__ __forceinline__ void consume(Exchange<C>& exchange, const Params& p, char* slots,
                                        uint32_t full, uint32_t empty, const Run& run, bool* last) {
  const uint32_t ring = smem_address(slots);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  RingCursor base;
  Unit next;
  if (run.begin < run.end) next = find_unit<C>(p, run.begin);
  bool waited = false;  // for the kernel before this one
  uint32_t q[C::kN][C::kSteps][2];
  int count = 0;  // parts since the query was loaded
  for (int index = run.begin; index < run.end; ++index) {
    const Unit unit = next;
    next = next_unit<C>(p, unit, index + 1, run.end);
    if (unit.sequence < 0) continue;
    if (count == 0 && p.rotates()) stage_rotations<C>(exchange, p, unit);
    if (!waited) grid_dependency_wait();
    waited = true;
    // New keys of the own tile; new values of the one before it, so that one warp has not both.
    const NewRows new_keys = new_rows(p, unit, warp);
    const int other = (warp + kWarps - 1) % kWarps;
    const NewRows new_values = new_rows(p, unit, other);
    Head key = {};
    Head value = {};
    if (C::kEarlyRows && new_keys.begin < new_keys.end) {
      key = load_new<C>(p, unit, new_keys.begin, false, lane);
    }
    if (C::kEarlyRows && new_values.begin < new_values.end) {
      value = load_new<C>(p, unit, new_values.begin, true, lane);
    }
    if (count++ == 0) {
      if (p.rotates()) {
        consumer_sync();
        stage_query<C>(exchange, p, unit, warp, lane);
        consumer_sync();
      }
      load_columns<C>(q, exchange, p, unit, lane);
    }
    const int valid =  // keys of this warp's tile
        min(kBlockTokens, unit.num_keys - (unit.part * kPartTiles + warp) * kBlockTokens);
    const bool has_tile = warp < unit.tiles;

    // scores of the own tile
    float score[4][C::kN][4] = {};
    if (has_tile) {
      RingCursor keys = base;
      keys.advance(warp, p.slots);
      mbarrier_wait(full + keys.slot * 8, keys.parity);
      if (new_keys.begin < new_keys.end) {
        put_new_rows<C>(exchange, key, new_keys, p, unit, slots + keys.slot * C::kSlotBytes, false,
                        warp, lane);
      }
      tile_scores<C>(score, q, ring + keys.slot * C::kSlotBytes, lane);
      __syncwarp();
      if (lane < kWarps) mbarrier_arrive(empty + keys.slot * 8);  // for all warps
      mask_and_maximum<C>(score, exchange, p, unit, warp, lane);
    }
    base.advance(unit.tiles, p.slots);
    if (new_values.begin < new_values.end) {
      // The copy of these values may await every key's release, so it is awaited after the own one.
      RingCursor values = base;
      values.advance(other, p.slots);
      mbarrier_wait(full + values.slot * 8, values.parity);
      put_new_rows<C>(exchange, value, new_values, p, unit, slots + values.slot * C::kSlotBytes,
                      true, warp, lane);
    }
    consumer_sync();

    // probabilities
    Maxima<C> maxima;
    running_maxima<C>(maxima, exchange, unit.tiles, warp, p.scale_log2, lane);
    if (has_tile) {
      RingCursor values = base;
      values.advance(warp, p.slots);
      const uint32_t tile = ring + values.slot * C::kSlotBytes;
      if (C::kBits != 16 || valid < kBlockTokens) {
        mbarrier_wait(full + values.slot * 8, values.parity);
        if constexpr (C::kBits == 16) clear_values<C>(tile, valid, lane);
      }
      share_probabilities<C>(score, exchange, maxima, tile, valid, warp, p.scale_log2, lane);
    }
    consumer_sync();

    // product with V
    Out<C> out = {};
    for (int t = 0; t < unit.tiles; ++t) {
      RingCursor values = base;
      values.advance(t, p.slots);
      mbarrier_wait(full + values.slot * 8, values.parity);
      const uint32_t tile = ring + values.slot * C::kSlotBytes;
      float2 factor[C::kN];
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        factor[n] = t == 0   ? maxima.factor[0][n]
                    : t == 1 ? maxima.factor[1][n]
                    : t == 2 ? maxima.factor[2][n]
                             : maxima.factor[3][n];
      }
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        const int m = warp + kWarps * o;
        if (m >= C::kSteps) break;
        uint32_t a[4][4];
        load_values<typename C::T, C::kDim, C::kBits>(a, tile, m, lane);
#pragma unroll
        for (int n = 0; n < C::kN; ++n) {
          out[o][n][0] *= factor[n].x;
          out[o][n][1] *= factor[n].y;
          out[o][n][2] *= factor[n].x;
          out[o][n][3] *= factor[n].y;
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            const uint2 b = exchange.probabilities[n][t * 4 + step][lane];
            mma_16816<typename C::T>(out[o][n], a[step], b.x, b.y);
          }
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty + values.slot * 8);
    }
    base.advance(unit.tiles, p.slots);

    // sums
    float2 sum[C::kN];
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      sum[n] = part_sum<C>(exchange.sums, maxima, n, unit.tiles, lane);
      if constexpr (C::kBits != 16) {
        const float2 zero = part_sum<C>(exchange.zeros, maxima, n, unit.tiles, lane);
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
          out[o][n][0] += zero.x;
          out[o][n][1] += zero.y;
          out[o][n][2] += zero.x;
          out[o][n][3] += zero.y;
        }
      }
    }
    finish_part<C>(out, maxima, sum, p, unit, index, warp, lane);
    if (unit.part + 1 == unit.parts || index + 1 == run.end) {
      if (unit.parts > 1) finish_parts<C>(p, unit, index, count, last, warp, lane);
      count = 0;
    }
  }
  // A kernel ends after the one before it, whatever it did: those after it count on that.
  if (!waited) grid_dependency_wait();
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kCtas) decode_kernel(const Params p) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[2 * kMaxSlots];
  __shared__ bool last;
  grid_dependency_launch();
  const uint32_t ring = smem_address(shared);
  const uint32_t full = smem_address(barriers);
  const uint32_t empty = full + kMaxSlots * 8;
  auto& exchange = *reinterpret_cast<Exchange<C>*>(shared + p.slots * C::kSlotBytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      mbarrier_init(full + i * 8, 1);
#else
      mbarrier_init(full + i * 8, 32);
#endif
      mbarrier_init(empty + i * 8, kWarps);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const Run run = run_of_cta(p);
  if (threadIdx.x >= kConsumers) {
    produce<C>(p, ring, full, empty, run, threadIdx.x % 32);
  } else {
    consume<C>(exchange, p, shared, full, empty, run, &last);
  }
}

template <class C>
void run(const LaunchContext& context, const DecodeAttentionArgs& args, int group) {
  const int columns = args.max_rows * group;
  const int blocks = ceil_div(columns, C::kColumns);
  // Shared memory of an SM beyond what one CTA may take: its own share of the reserve.
  const int exchange = static_cast<int>(sizeof(Exchange<C>));
  const int reserve = 1024 + 512;  // the system's, and the barriers
  const int ctas = context.max_shared_bytes > 200 * 1024 ? C::kCtas : 1;
  const int available = (context.max_shared_bytes + 1024) / ctas - reserve - exchange;
  const int units = args.num_items * blocks * args.num_kv_heads;
  const int grid = std::min(units, ctas * context.num_sms);
  // No more than a CTA's keys and values: what is left lets the next kernel in.
  const int slots =
      std::min({kMaxSlots, available / C::kSlotBytes, 2 * kPartTiles * ceil_div(units, grid)});
  TM_CHECK(slots >= kPartTiles, "%d bytes of shared memory are too few for decode attention",
           context.max_shared_bytes);
  const Params params{.args = args,
                      .group = group,
                      .column_blocks = blocks,
                      .pairs = ceil_div(std::min(columns, C::kColumns), 2),
                      .slots = slots,
                      .scale_log2 = args.softmax_scale * 1.4426950408889634F};
  launch(decode_kernel<C>,
         {.grid = dim3(static_cast<unsigned>(grid)),
          .threads = kThreads,
          .shared_bytes = slots * C::kSlotBytes + exchange},
         context.stream, context.programmatic, params);
}

}  // namespace

void decode_attention(const LaunchContext& context, DType dtype, const DecodeAttentionArgs& args) {
  if (args.num_items == 0) return;
  const int group = args.num_heads / args.num_kv_heads;
  visit_dtype(dtype, [&]<class T>() {
    visit_head_dim(args.head_dim, [&]<int kDim>() {
      visit_kv_bits(args.kv_bits, [&]<int kBits>() {
        if constexpr (kDim == 128) {
          if (args.max_rows * group > 8) {
            run<Config<T, kDim, kBits, 2>>(context, args, group);
            return;
          }
        }
        run<Config<T, kDim, kBits, 1>>(context, args, group);
      });
    });
  });
}

}  // namespace turbomind::cuda
