// 4-bit weights on sm_90a: which tile serves which M; up to 32 tokens have u4_few_sm90.cuh. Instantiated in
// u4_*_sm90.cu, a file for each type so that they compile side by side. Compared with `naive` and `u4_sm80`.
#pragma once

#include <limits>

#include "backend/cuda/gemm/gemm_sm90.cuh"

namespace turbomind::cuda {

// CTAs that a launch of C has with its segments together.
template <class C>
int64_t ctas_together(const GemmArgs& args) {
  return ceil_div<int64_t>(args.w->n, C::kTileN) * ceil_div(args.m, C::kTileT) *
         (args.w->segments / C::kSplitGroups);
}

// All of K in one segment: CTAs have equal shares of the rows where the tokens fit in one tile, and stay
// for the next tile otherwise.
template <class C>
void run_unsplit(const GemmArgs& args, const LaunchContext& context) {
  run_sm90<C>(args, context, {.ctas = C::kCtas * context.num_sms, .even = args.m <= C::kTileT});
}

// The same with three warpgroups of 64 rows or with Other, whichever takes less: its passes over a CTA's share
// of the rows, each of which costs `cost` hundredths of one of three warpgroups.
template <class Three, class Other>
void run_unsplit_best(const GemmArgs& args, const LaunchContext& context, int64_t cost) {
  const int64_t blocks = ceil_div<int64_t>(args.w->n_padded / kPackRows, context.num_sms);
  if (100 * ceil_div<int64_t>(blocks, 3) <= cost * ceil_div<int64_t>(blocks, Other::kRowGroups)) {
    run_unsplit<Three>(args, context);
  } else {
    run_unsplit<Other>(args, context);
  }
}

// Each tile shared by the CTAs of a cluster, a segment each.
template <class C>
void run_shared(const GemmArgs& args, const LaunchContext& context) {
  run_sm90<C>(args, context, {});
}

// Whether CTAs take a block of 64 rows each, segments in turn: where K is short and there is a block for most SMs,
// which clusters would have to take in rounds.
inline bool are_blocks_alone(const GemmArgs& args, const LaunchContext& context) {
  constexpr int64_t kShort = 8192;
  const int64_t blocks = args.w->n_padded / kPackRows;
  return args.w->k_padded <= kShort && blocks <= context.num_sms && 2 * blocks >= context.num_sms;
}

// Whether all tiles have a cluster at a time.
template <class C>
bool fits_clusters(const GemmArgs& args) {
  const int segments = args.w->segments;
  return ctas_together<C>(args) / segments <= resident_clusters<C>(segments);
}

// Tiles of many tokens whose K has several segments. A CTA computes all of them in turn; but where the
// last round of tiles would leave CTAs without work, its tiles are shared by clusters.
// Costs: what the busiest CTA takes, in chunks of its tile's rows.
struct SplitTiles {
  int64_t whole;
  int64_t cost;
  bool shared;
  int clusters;
};
template <class C>
SplitTiles split_tiles(const GemmArgs& args, const LaunchContext& context) {
  constexpr int64_t kMeeting = 6;  // chunks that take as long as a meeting
  const int64_t segments = args.w->segments;
  const int64_t chunks = args.w->k_padded / C::kTileK;
  const int64_t tiles = ctas_together<C>(args) / segments;
  const int64_t alone = ceil_div<int64_t>(tiles, context.num_sms) * chunks;
  const int64_t clusters = resident_clusters<C>(static_cast<int>(segments));
  const int64_t whole = tiles / (clusters * segments) * (clusters * segments);
  const int64_t shared =
      whole / (clusters * segments) * chunks +
      ceil_div<int64_t>(tiles - whole, clusters) * (chunks / segments + kMeeting);
  if (shared < alone) return {C::kInTurn ? whole : 0, shared, true, static_cast<int>(clusters)};
  return {tiles, alone, false, 0};
}
template <class C>
void run_split_tiles(const GemmArgs& args, const LaunchContext& context) {
  const SplitTiles tiles = split_tiles<C>(args, context);
  run_sm90<C>(args, context,
              {.ctas = tiles.shared ? tiles.clusters * args.w->segments : context.num_sms,
               .whole = tiles.whole});
}

// Up to two token tiles shared by clusters: row tiles of three and of two blocks of 64 rows, so many of each that the
// rounds of clusters are few and full. True if that takes less than tiles of two blocks.
template <class Three, class Two>
bool run_mixed_tiles(const GemmArgs& args, const LaunchContext& context) {
  static_assert(Three::kRowGroups == 3 && Two::kRowGroups == 2);
  constexpr int64_t kMeeting = 12;  // blocks times chunks that take as long as a meeting
  const int token_tiles = ceil_div(args.m, Three::kTileT);
  if (token_tiles > 2) return false;
  const int segments = args.w->segments;
  const int clusters = resident_clusters<Three>(segments);
  const auto blocks = static_cast<int>(args.w->n_padded / kPackRows);
  const int64_t chunks = args.w->k_padded / Three::kTileK / segments;
  int64_t least = 2 * split_tiles<Two>(args, context).cost;
  int best = 0;
  for (int tiles = ceil_div(blocks, 3); 2 * tiles <= blocks; ++tiles) {
    // Those of three come first; a cluster has every `clusters`-th tile.
    const int rounds = ceil_div(tiles * token_tiles, clusters);
    const int of_three = ceil_div((blocks - 2 * tiles) * token_tiles, clusters);
    const int64_t cost = (2 * rounds + of_three) * chunks + kMeeting * rounds;
    if (cost >= least) continue;
    least = cost;
    best = tiles;
  }
  if (best == 0) return false;
  run_sm90<Three>(args, context, {.ctas = clusters * segments, .row_tiles = best});
  return true;
}

// More tokens; groups other than the usual 128 have one tile for all of them.
template <class T, int kGroupSize>
void run_u4_many(const GemmArgs& args, const LaunchContext& context) {
  const bool split = args.w->segments > 1;
  if constexpr (kGroupSize == 128) {
    if (args.m <= 64) {
      using Narrow = Sm90Config<T, 128, 1, 1, 64, 2>;
      using Tall = Sm90Config<T, 128, 3, 1, 64>;
      using Taller = Sm90Config<T, 128, 4, 1, 64>;
      if (!split) return run_unsplit_best<Tall, Taller>(args, context, 100);
      // One round of CTAs with as many warpgroups as fill the SMs.
      if (ctas_together<Narrow>(args) <= 2 * context.num_sms) {
        return run_shared<Narrow>(args, context);
      }
      if (ctas_together<Tall>(args) <= context.num_sms) return run_shared<Tall>(args, context);
      return run_shared<Sm90Config<T, 128, 2, 1, 64, 2>>(args, context);
    }
    using Wide = Sm90Config<T, 128, 2, 1, 128>;
    using Tall = Sm90Config<T, 128, 3, 1, 128>;
    if (!split && args.m <= 128) return run_unsplit_best<Tall, Wide>(args, context, 69);
    if (!split) {
      const auto rounds = [&](int64_t tiles) { return ceil_div<int64_t>(tiles, context.num_sms); };
      const bool tall =
          3 * rounds(ctas_together<Tall>(args)) <= 2 * rounds(ctas_together<Wide>(args));
      return tall ? run_unsplit<Tall>(args, context) : run_unsplit<Wide>(args, context);
    }
    if (args.m <= 128 && are_blocks_alone(args, context)) {
      return run_sm90<Wide>(
          args, context,
          {.ctas = context.num_sms, .whole = std::numeric_limits<int>::max(), .even = true});
    }
    // One round of clusters, if there is one.
    if (fits_clusters<Wide>(args)) return run_shared<Wide>(args, context);
    if (fits_clusters<Tall>(args)) return run_shared<Tall>(args, context);
    if (run_mixed_tiles<Tall, Wide>(args, context)) return;
  }
  using Tile = Sm90Config<T, kGroupSize, 2, 1, 128>;
  return split ? run_split_tiles<Tile>(args, context) : run_unsplit<Tile>(args, context);
}

// By type.
void run_u4_bf16_many(const GemmArgs& args, const LaunchContext& context);
void run_u4_bf16_small_groups(const GemmArgs& args, const LaunchContext& context);
void run_u4_f16_many(const GemmArgs& args, const LaunchContext& context);
void run_u4_f16_small_groups(const GemmArgs& args, const LaunchContext& context);

}  // namespace turbomind::cuda
