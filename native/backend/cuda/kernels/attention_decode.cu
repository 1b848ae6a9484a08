// Attention of the few new rows of many sequences (decode; drafts to verify) over their paged keys,
// by the definition in flash.cuh. Unit of work: one part of 256 keys, one KV head, up to 8 or 16
// columns (query rows x query heads of the group). Persistent CTAs: a producer warp (decode_produce.cuh)
// keeps a ring of KV tiles full, ahead of the units, so that memory never waits for arithmetic; four
// consumer warps take one tile of keys each for the scores, meet twice a unit (maxima; probabilities),
// and take 16 dims in turn for the product with V. Keys are the m16 operand, columns the n8 one. Parts
// meet by decode_fold.cuh. Bound: HBM, K and V read once for all columns.
//
// In a step without prefill rows it also does rope_kv's work: a CTA rotates the columns that it takes,
// and the producer completes the tiles that the new tokens belong to.
#include <algorithm>

#include "backend/cuda/device/decode_fold.cuh"
#include "backend/cuda/device/decode_produce.cuh"

namespace turbomind::cuda {
namespace decode {
namespace {

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

// The query of a column of the unit's sequence.
template <class C>
__device__ __forceinline__ const typename C::T* column_head(const Params& p, const Unit& unit,
                                                            int column) {
  const int place = unit.column0 + column;
  const int row = p.row_of(place);
  return qkv_head<C>(p.args, unit.row + row, unit.kv_head * p.group + place - row * p.group);
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

// The unit's columns, rotated, to the exchange, column by column over the warps.
template <class C>
__device__ __forceinline__ void stage_query(Exchange<C>& exchange, const Params& p,
                                            const Unit& unit, int warp, int lane) {
  constexpr int kMost = C::kColumns / kWarps;
  Head head[kMost] = {};
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int column = warp + i * kWarps;
    if (column >= unit.columns) continue;
    head[i] = load_head<typename C::T, C::kDim>(column_head<C>(p, unit, column), lane);
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int column = warp + i * kWarps;
    if (column < unit.columns && p.rotates()) {
      const int row = p.row_of(unit.column0 + column);
      norm_and_rotate<C::kDim>(head[i], p.args.rope.q_norm, p.args.rope.q_norm_eps,
                               load_rotation<C::kDim>(exchange.rotations[row], lane), lane);
    }
    store_head<typename C::T, C::kDim>(exchange.query[column], head[i], lane);
  }
}
// The lines that stage_query reads, on their way while the kernel before this one ends.
template <class C>
__device__ __forceinline__ void prefetch_query(const Params& p, const Unit& unit) {
  const int column = static_cast<int>(threadIdx.x) / 8;
  const int byte = static_cast<int>(threadIdx.x) % 8 * 128;
  if (column >= unit.columns || byte >= C::kDim * 2) return;
  prefetch_l2(reinterpret_cast<const char*>(column_head<C>(p, unit, column)) + byte);
}

// Columns of steps `step` and on as the n8 operand: a lane holds dims 2c, 2c + 1 and 2c + 8, 2c + 9 of
// column g.
template <class C>
__device__ __forceinline__ void load_columns(uint32_t (&q)[4], const Exchange<C>& exchange, int n,
                                             int step, int lane) {
  const uint32_t row = smem_address(exchange.query[n * 8 + lane % 8] + step * 16);
  if (step + 1 < C::kSteps) {
    ldmatrix_x4(q, row + lane / 8 * 16);
  } else {
    uint32_t one[2];
    ldmatrix_x2(one, row + lane / 8 % 2 * 16);
    q[0] = one[0];
    q[1] = one[1];
  }
}

// sum(q) of the columns, for this warp.
template <class C>
__device__ __forceinline__ void store_query_sums(Exchange<C>& exchange, int warp, int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    float sum = 0.0F;
#pragma unroll
    for (int step = 0; step < C::kSteps; step += 2) {
      uint32_t q[4];
      load_columns<C>(q, exchange, n, step, lane);
      sum = add_pair<typename C::T>(add_pair<typename C::T>(sum, q[0]), q[1]);
      if (step + 1 == C::kSteps) continue;
      sum = add_pair<typename C::T>(add_pair<typename C::T>(sum, q[2]), q[3]);
    }
    sum = quad_sum(sum);
    if (lane % 4 == 0) exchange.query_sums[warp][n * 8 + lane / 4] = sum;
  }
  __syncwarp();
}

// Scores of the 64 keys of a tile: register i of [m][n] is key 16 m + g + 8 (i / 2), column 2c + i % 2.
// Four chains of products side by side, their operands read ahead of them.
template <class C>
__device__ __forceinline__ void tile_scores(float (&score)[4][C::kN][4],
                                            const Exchange<C>& exchange, uint32_t tile, int warp,
                                            int lane) {
  using Fragments = KeyFragments<typename C::T, C::kDim, C::kBits>;
  uint32_t q[C::kN][4];
#pragma unroll
  for (int step = 0; step < C::kSteps; step += Fragments::kGroup) {
    typename Fragments::Words words[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) Fragments::load_words(words[m], tile, m * 16, step, lane);
#pragma unroll
    for (int e = 0; e < Fragments::kGroup; ++e) {
      const int odd = (step + e) % 2;
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        if (odd == 0) load_columns<C>(q[n], exchange, n, step + e, lane);
      }
      uint32_t a[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) Fragments::unpack(a[m], words[m], e);
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma_16816<typename C::T>(score[m][n], a[m], q[n][2 * odd], q[n][2 * odd + 1]);
        }
      }
    }
  }
  if constexpr (C::kBits != 16) {
    float2 query_sum[C::kN];
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      query_sum[n] =
          *reinterpret_cast<const float2*>(&exchange.query_sums[warp][n * 8 + lane % 4 * 2]);
    }
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
      const int row = p.row_of(unit.column0 + min(column, unit.columns - 1));
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

// Running maxima over the tiles of a part, of two columns; past its last tile they stay.
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
    float2 tile[kPartTiles];
#pragma unroll
    for (int t = 0; t < kPartTiles; ++t) {
      tile[t] = *reinterpret_cast<const float2*>(&exchange.tile_max[t][n * 8 + lane % 4 * 2]);
    }
    float2 largest{-INFINITY, -INFINITY};
#pragma unroll
    for (int t = 0; t < kPartTiles; ++t) {
      const float2 after{t < tiles ? fmaxf(largest.x, tile[t].x) : largest.x,
                         t < tiles ? fmaxf(largest.y, tile[t].y) : largest.y};
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
  float2 sum[kPartTiles];
#pragma unroll
  for (int t = 0; t < kPartTiles; ++t) {
    sum[t] = *reinterpret_cast<const float2*>(&sums[t][lane / 4][n * 8 + lane % 4 * 2]);
  }
  float2 total{0.0F, 0.0F};
#pragma unroll
  for (int t = 0; t < kPartTiles; ++t) {
    const float2 next{fmaf(total.x, maxima.factor[t][n].x, sum[t].x),
                      fmaf(total.y, maxima.factor[t][n].y, sum[t].y)};
    if (t < tiles) total = next;
  }
  return {group_sum(total.x), group_sum(total.y)};
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

// Product of a part's probabilities and values: out = factor * out + V * probabilities, tile by tile, as many
// chains side by side as a warp has.
template <class C>
__device__ __forceinline__ void part_product(Out<C>& out, const Exchange<C>& exchange,
                                             const Maxima<C>& maxima, const Params& p,
                                             Barriers& barriers, uint32_t ring, RingCursor at,
                                             int tiles, int warp, int lane) {
  using Fragments = ValueFragments<typename C::T, C::kDim, C::kBits>;
#pragma unroll 1
  for (int t = 0; t < tiles; ++t) {
    float2 factor[C::kN];
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      factor[n] = t == 0   ? maxima.factor[0][n]
                  : t == 1 ? maxima.factor[1][n]
                  : t == 2 ? maxima.factor[2][n]
                           : maxima.factor[3][n];
    }
    mbarrier_wait(smem_address(&barriers.full[at.slot]), at.parity);
    uint32_t a[C::kOwn][4][4];
#pragma unroll
    for (int o = 0; o < C::kOwn; ++o) {
      const int m = warp + kWarps * o;
      if (m >= C::kSteps) continue;
      typename Fragments::Words words;
      Fragments::load_words(words, ring + at.slot * C::kSlotBytes, m, lane);
#pragma unroll
      for (int step = 0; step < 4; ++step) Fragments::unpack(a[o][step], words, step);
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        out[o][n][0] *= factor[n].x;
        out[o][n][1] *= factor[n].y;
        out[o][n][2] *= factor[n].x;
        out[o][n][3] *= factor[n].y;
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        const uint2 b = exchange.probabilities[n][t * 4 + step][lane];
#pragma unroll
        for (int o = 0; o < C::kOwn; ++o) {
          if (warp + kWarps * o >= C::kSteps) continue;
          mma_16816<typename C::T>(out[o][n], a[o][step], b.x, b.y);
        }
      }
    }
    __syncwarp();
    if (lane < kWarpArrivals) mbarrier_arrive(smem_address(&barriers.empty[at.slot]));
    at.advance(1, p.slots);
  }
}

// Which share of the fold a CTA of a step of one unit a CTA has; `next`: its unit, or what it folds where
// it has none. The CTAs of a sequence's parts fold what lies before them, those past all units the last.
template <class C>
__device__ __forceinline__ void plan_fold(Run& run, Unit& next, const Params& p) {
  const bool has_unit = run.begin < run.end;
  const int past = static_cast<int>(blockIdx.x) - run.units;
  const int twin = past - kFolders;
  if (has_unit || (run.twins && twin >= 0 && twin < run.units)) {
    const int unit = has_unit ? run.begin : twin;
    if (!has_unit) next = find_unit<C>(p, unit);
    run.fold_end = unit - next.part;
    run.folder = next.part + (has_unit ? 0 : next.parts);
    run.folders = run.twins ? 2 * next.parts : next.parts;
  } else {
    run.fold_end = run.units;
    run.folder = past;
    run.folders = run.twins ? kFolders : static_cast<int>(gridDim.x) - run.units;
  }
  if (has_unit) return;
  const bool folds = run.fold_end > 0 && run.folder < run.folders;
  next = folds ? find_unit<C>(p, run.fold_end - 1) : Unit{};
}

template <class C>
__device__ __forceinline__ void consume(Exchange<C>& exchange, Barriers& barriers, const Params& p,
                                        char* slots, Run run, bool* last) {
  const uint32_t ring = smem_address(slots);
  const uint32_t full = smem_address(barriers.full);
  const uint32_t empty = smem_address(barriers.empty);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  RingCursor base;
  Unit next;
  if (run.begin < run.end) next = find_unit<C>(p, run.begin);
  if (run.single) plan_fold<C>(run, next, p);
  bool waited = false;  // for the kernel before this one
  int count = 0;        // parts since the query was loaded
  Total<C> total;       // of those parts, if they begin with the sequence's first
  clear(total);
  for (int index = run.begin; index < run.end; ++index) {
    const Unit unit = next;
    if (run.single) {
      next = run.fold_end > 0 ? find_unit<C>(p, run.fold_end - 1) : Unit{};
    } else {
      next = next_unit<C>(p, unit, index + 1, run.end);
    }
    if (unit.sequence < 0) continue;
    if (count == 0 && p.rotates()) stage_rotations<C>(exchange, p, unit);
    if (!waited) {
      prefetch_query<C>(p, unit);
      grid_dependency_wait();
      waited = true;
    }
    if (count++ == 0) {
      consumer_sync();
      stage_query<C>(exchange, p, unit, warp, lane);
      consumer_sync();
      if constexpr (C::kBits != 16) store_query_sums<C>(exchange, warp, lane);
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
      tile_scores<C>(score, exchange, ring + keys.slot * C::kSlotBytes, warp, lane);
      __syncwarp();
      for (int i = lane; i < kWarps * kWarpArrivals; i += 32) {  // for all warps
        mbarrier_arrive(empty + keys.slot * 8);
      }
      mask_and_maximum<C>(score, exchange, p, unit, warp, lane);
    }
    base.advance(unit.tiles, p.slots);
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
    part_product<C>(out, exchange, maxima, p, barriers, ring, base, unit.tiles, warp, lane);
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

    // with the sequence's other parts
    if (run.single && unit.parts > 1) {
      publish_part<C>(out, maxima.last, sum, p, index, warp, lane);
      continue;
    }
    const bool from_first = unit.part + 1 == count && (C::kRuns || unit.parts == 1);
    if (!C::kRuns) clear(total);
    if (from_first) {
      fold_part_into<C>(total, out, maxima.last, sum, p.scale_log2);
    } else {
      store_part<C>(out, maxima.last, sum, p, index, warp, lane);
    }
    if (unit.part + 1 < unit.parts && index + 1 < run.end) continue;
    if (from_first && count == unit.parts) {
      store_rows<C>(total, p, unit, warp, lane);
    } else {
      if (from_first) store_part<C>(total.out, total.largest, total.sum, p, index, warp, lane);
      finish_parts<C>(exchange.fold, p, unit, index, count, run, last, warp, lane);
    }
    count = 0;
    clear(total);
  }
  // A kernel ends after the one before it, whatever it did: those after it count on that.
  if (!waited) grid_dependency_wait();
  if (run.single) fold_records<C>(p, next, run, warp, lane);
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kCtas) decode_kernel(const Params p) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ Barriers barriers;
  __shared__ bool last;
  grid_dependency_launch();
  auto& exchange = *reinterpret_cast<Exchange<C>*>(shared + p.slots * C::kSlotBytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.slots; ++i) {
      mbarrier_init(smem_address(&barriers.full[i]), kTileArrivals);
      mbarrier_init(smem_address(&barriers.empty[i]), kWarps * kWarpArrivals);
    }
    for (int i = 0; i < 4; ++i) {
      mbarrier_init(smem_address(&barriers.landed[0][0]) + i * 8, kTileArrivals);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  const Run run = run_of_cta(p);
  if (threadIdx.x >= kConsumers) {
    produce<C>(exchange, barriers, p, shared, run, threadIdx.x % 32);
  } else {
    consume<C>(exchange, barriers, p, shared, run, &last);
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
  const int folders = args.records != nullptr ? kFolders : 0;
  const int grid = std::min(folders > 0 ? 2 * units + folders : units, ctas * context.num_sms);
  // No more than a CTA's keys and values: what is left lets the next kernel in.
  const int slots =
      std::min({kMaxSlots, available / C::kSlotBytes, 2 * kPartTiles * ceil_div(units, grid)});
  TM_CHECK(slots >= kPartTiles, "%d bytes of shared memory are too few for decode attention",
           context.max_shared_bytes);
  const Params params{.args = args,
                      .group = group,
                      .group_inverse = ceil_div(65536, group),
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
}  // namespace decode

size_t decode_record_bytes(const LaunchContext& context) {
  constexpr int kMostRecords = 8 * 8;  // of a unit: head dims / 16, pairs of columns
  return static_cast<size_t>(3 * context.num_sms) * kMostRecords * decode::kRecordWords *
         sizeof(uint32_t);
}

void decode_attention(const LaunchContext& context, DType dtype, const DecodeAttentionArgs& args) {
  if (args.num_items == 0) return;
  const int group = args.num_heads / args.num_kv_heads;
  visit_dtype(dtype, [&]<class T>() {
    visit_head_dim(args.head_dim, [&]<int kDim>() {
      visit_kv_bits(args.kv_bits, [&]<int kBits>() {
        if constexpr (kDim == 128) {
          if (args.max_rows * group > 8) {
            decode::run<decode::Config<T, kDim, kBits, 2>>(context, args, group);
            return;
          }
        }
        decode::run<decode::Config<T, kDim, kBits, 1>>(context, args, group);
      });
    });
  });
}

}  // namespace turbomind::cuda
