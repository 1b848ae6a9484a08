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
#include "backend/cuda/device/decode_records.cuh"
#include "backend/cuda/device/decode_values.cuh"

namespace turbomind::cuda {
namespace decode {
namespace {

// The ring as a consumer warp sees it.
struct Ring {
  uint32_t slots;  // shared addresses
  uint32_t full;
  uint32_t empty;
};

// A part's probabilities in the exchange: every warp has done its tile's. `seen`: keys that the unit's first
// column sees. Leaves `base` at the part's values.
template <class C>
__device__ __forceinline__ void part_probabilities(Maxima<C>& maxima, Exchange<C>& exchange,
                                                   const Params& p, const Ring& ring,
                                                   RingCursor& base, int part, int tiles,
                                                   int num_keys, int seen, int warp, int lane) {
  const int first_key = (part * kPartTiles + warp) * kBlockTokens;
  const bool has_tile = warp < tiles;
  const bool whole = first_key + kBlockTokens <= seen;  // all columns see all of the tile
  float score[4][C::kN][4] = {};
  if (has_tile) {
    RingCursor keys = base;
    keys.advance(warp, p.slots);
    mbarrier_wait(ring.full + keys.slot * 8, keys.parity);
    tile_scores<C>(score, exchange, ring.slots + keys.slot * C::kSlotBytes, warp, lane);
    __syncwarp();
    for (int i = lane; i < kWarps * kWarpArrivals; i += 32) {  // for all warps
      mbarrier_arrive(ring.empty + keys.slot * 8);
    }
    if (whole) {
      mask_and_maximum<C, true>(score, exchange, p, first_key, warp, lane);
    } else {
      mask_and_maximum<C, false>(score, exchange, p, first_key, warp, lane);
    }
  } else {
    absent_maximum<C>(exchange, warp, lane);
  }
  base.advance(tiles, p.slots);
  consumer_sync();

  running_maxima<C>(maxima, exchange, warp, p.scale_log2, lane);
  if (has_tile) {
    RingCursor values = base;
    values.advance(warp, p.slots);
    const uint32_t tile = ring.slots + values.slot * C::kSlotBytes;
    const int valid = num_keys - first_key;
    if (C::kBits != 16 || valid < kBlockTokens) {
      mbarrier_wait(ring.full + values.slot * 8, values.parity);
      if constexpr (C::kBits == 16) clear_values<C>(tile, valid, lane);
    }
    if (C::kBits == 16 || whole) {
      share_probabilities<C, true>(score, exchange, maxima, tile, valid, warp, p.scale_log2, lane);
    } else {
      share_probabilities<C, false>(score, exchange, maxima, tile, valid, warp, p.scale_log2, lane);
    }
  } else {
    absent_sums<C>(exchange, warp, lane);
  }
  consumer_sync();
}

// Adds the part's zeros to `out`; sums of its probabilities.
template <class C>
__device__ __forceinline__ void part_sums(float2 (&sum)[C::kN], Out<C>& out,
                                          const Exchange<C>& exchange, const Maxima<C>& maxima,
                                          int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    sum[n] = part_sum<C>(exchange.sums, maxima, n, lane);
    if constexpr (C::kBits != 16) {
      const float2 zero = part_sum<C>(exchange.zeros, maxima, n, lane);
#pragma unroll
      for (int o = 0; o < C::kOwn; ++o) {
        out[o][n][0] += zero.x;
        out[o][n][1] += zero.y;
        out[o][n][2] += zero.x;
        out[o][n][3] += zero.y;
      }
    }
  }
}

// What a CTA does of one sequence and head.
struct Piece {
  int begin, end;  // units that the CTA has done before and after it
  int first;       // unit of the step: the first part
};

// Looks up what comes after `done` units; its unit and order to the exchange.
template <class C>
__device__ __forceinline__ Piece find_piece(Exchange<C>& exchange, const Params& p, const Run& run,
                                            int done, int warp, int lane) {
  Units<C> units;
  units.done = units.head_end = done;
  units.find(p, run);
  __syncwarp();
  if (lane == 0) {
    exchange.unit[warp] = units.unit;
    exchange.order[warp] = units.order;
  }
  __syncwarp();
  return {done, units.head_end, units.first};
}

// A step of at most one unit a CTA: the unit, whose query is in the exchange. Less code than `attend`: in a layer
// each launch finds none of it in its SM, and fetching it takes as long as running it.
template <class C>
__device__ __forceinline__ void attend_once(Exchange<C>& exchange, Barriers& barriers,
                                            const Params& p, const Ring& ring, const Piece& piece,
                                            int warp, int lane) {
  const Unit& unit = exchange.unit[warp];
  const int tiles = unit.tiles;
  RingCursor base;
  Maxima<C> maxima;
  part_probabilities<C>(maxima, exchange, p, ring, base, unit.part, tiles, unit.num_keys,
                        keys_seen(p, unit, 0), warp, lane);
  Out<C> out = {};
  part_product<C>(out, exchange, maxima, p, barriers, ring.slots, base, tiles, warp, lane);
  float2 sum[C::kN];
  part_sums<C>(sum, out, exchange, maxima, lane);
  if (unit.parts > 1) {
    publish_part<C>(out, maxima.last, sum, p, piece.first + unit.part, true, warp, lane);
    return;
  }
  Total<C> total;
  clear(total);
  fold_part_into<C>(total, out, maxima.last, sum, p.scale_log2);
  store_rows<C>(total, p, unit, warp, lane);
}

// One piece of a larger step, whose query is in the exchange.
template <class C>
__device__ __forceinline__ void attend(Exchange<C>& exchange, Barriers& barriers, const Params& p,
                                       const Ring& ring, RingCursor& base, const Piece& piece,
                                       int warp, int lane) {
  const Unit& unit = exchange.unit[warp];
  const PartOrder& order = exchange.order[warp];
  const int num_keys = unit.num_keys;
  const int seen = keys_seen(p, unit, 0);
  const bool whole = piece.end - piece.begin == unit.parts;
  Total<C> total;
  clear(total);
  keep<C>(exchange, total);
  PartFold fold = part_fold(order, piece.first, whole, unit.parts);
  int trips = 0;  // to L2 before the next unit, which alone would not keep up with what arrives
#pragma unroll 1
  for (int time = piece.begin;;) {
    if (trips > 0 || (time == piece.end && fold.next < fold.end)) {
      recall<C>(total, exchange);
#pragma unroll 1
      do {
        Arrivals<C, C::kFoldBatch> arrivals;
        request_parts<C>(arrivals, p, fold, fold.end, warp, lane);
        const int folded = fold_arrived<C>(total, arrivals, p, fold, fold.end, warp, lane);
        fold.next += folded;
        trips = folded == C::kFoldBatch ? trips - 1 : 0;
      } while (fold.next < fold.end && (trips > 0 || time == piece.end));
      keep<C>(exchange, total);
    }
    if (fold.hands_over && fold.next == fold.end) {
      recall<C>(total, exchange);
      publish_part<C>(total.out, total.largest, total.sum, p, piece.first, false, warp, lane);
      fold = PartFold{};
    }
    if (time == piece.end) break;
    const int part = order.part(time);
    ++time;
    const int tiles = tiles_of(num_keys, part);
    Maxima<C> maxima;
    part_probabilities<C>(maxima, exchange, p, ring, base, part, tiles, num_keys, seen, warp, lane);
    const int end = min(part, fold.end);
    Arrivals<C, C::kFoldAhead> arrivals;  // on their way during the product
    request_parts<C>(arrivals, p, fold, end, warp, lane);
    Out<C> out = {};
    part_product<C>(out, exchange, maxima, p, barriers, ring.slots, base, tiles, warp, lane);
    base.advance(tiles, p.slots);
    float2 sum[C::kN];
    part_sums<C>(sum, out, exchange, maxima, lane);
    recall<C>(total, exchange);
    const int folded = fold_arrived<C>(total, arrivals, p, fold, end, warp, lane);
    fold.next += folded;
    if (whole || part == fold.next) {
      fold_part_into<C>(total, out, maxima.last, sum, p.scale_log2);
      ++fold.next;
    } else {
      publish_part<C>(out, maxima.last, sum, p, piece.first + part, false, warp, lane);
      if (folded == C::kFoldAhead) trips = order.between / C::kFoldBatch + 1;
    }
    keep<C>(exchange, total);
  }
  if (!whole && !order.is_last) return;
  recall<C>(total, exchange);
  store_rows<C>(total, p, unit, warp, lane);
}

template <class C>
__device__ __forceinline__ void consume(Exchange<C>& exchange, Barriers& barriers, const Params& p,
                                        char* slots, const Run& run) {
  const Ring ring{smem_address(slots), smem_address(barriers.full), smem_address(barriers.empty)};
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const Unit& unit = exchange.unit[warp];
  // Looked up before the kernel before this one has ended.
  Piece piece = find_piece<C>(exchange, p, run, 0, warp, lane);
  if (run.single) {
    const FoldPlan plan = plan_fold<C>(p, run, unit);
    if (lane == 0) exchange.plan[warp] = plan;
    __syncwarp();
  }
  RingCursor base;
  while (piece.begin < piece.end) {
    if (unit.sequence >= 0) {
      if (p.rotates()) stage_rotations<C>(exchange, p, unit);
      if (piece.begin == 0) prefetch_query<C>(p, unit);
      grid_dependency_wait();
      consumer_sync();
      stage_query<C>(exchange, p, unit, warp, lane);
      consumer_sync();
      if constexpr (C::kBits != 16) store_query_sums<C>(exchange, warp, lane);
      if (run.single) {
        attend_once<C>(exchange, barriers, p, ring, piece, warp, lane);
      } else {
        attend<C>(exchange, barriers, p, ring, base, piece, warp, lane);
      }
    }
    if (run.single) break;
    piece = find_piece<C>(exchange, p, run, piece.end, warp, lane);
  }
  // A kernel ends after the one before it, whatever it did: those after it count on that.
  grid_dependency_wait();
  if (run.single) fold_records<C>(p, exchange.plan[warp], warp, lane);
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kCtas) decode_kernel(const Params p) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ Barriers barriers;
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
    consume<C>(exchange, barriers, p, shared, run);
  }
}

template <class C>
void run(const LaunchContext& context, const DecodeAttentionArgs& args, int group) {
  const int columns = args.max_rows * group;
  const int blocks = ceil_div(columns, C::kColumns);
  // Shared memory of an SM beyond what one CTA may take: its own share of the reserve.
  const int exchange = static_cast<int>(sizeof(Exchange<C>));
  const int reserve =
      1024 + 1024;  // the system's, and what lies before the ring, which begins aligned
  const int ctas = context.max_shared_bytes > 200 * 1024 ? C::kCtas : 1;
  const int available = (context.max_shared_bytes + 1024) / ctas - reserve - exchange;
  const int units = args.num_items * blocks * args.num_kv_heads;
  const int grid = std::min(2 * units + kFolders, ctas * context.num_sms);
  TM_CHECK(static_cast<int64_t>(units + 1) * grid <= UINT32_MAX,
           "decode attention of %d units of work by %d CTAs; expected a product of 32 bits", units,
           grid);
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

size_t decode_record_bytes(int num_heads, int head_dim) {
  // For 16 dims and a pair of columns each: pairs, rounded up, are never more than columns.
  return static_cast<size_t>(num_heads) * ceil_div(head_dim, 16) * decode::kRecordWords *
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
