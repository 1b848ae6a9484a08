// 4-bit weights on wgmma and, for few tokens, mma.sync: which tile of gemm_sm90.cuh serves which M.
// Instantiated in u4_*_sm90.cu, a file for each type so that they compile side by side. Compared with
// `naive` and `u4_sm80`.
#pragma once

#include "backend/cuda/gemm/gemm_sm90.cuh"

namespace turbomind::cuda {

// CTAs that a launch of C has with its segments together.
template <class C>
int64_t ctas_together(const GemmArgs& args) {
  return ceil_div<int64_t>(args.w->n, C::kTileN) * ceil_div(args.m, C::kTileT) *
         (args.w->segments / C::kSplitGroups);
}

// Few tokens only stream weights: rings as large as lets all CTAs stay resident, but at least and at
// most so many bytes; what is left on an SM takes the CTAs of the next kernel, which then fetches its
// first weights while this one ends.
template <class C>
void run_stream(const GemmArgs& args, const LaunchContext& context, int least, int most) {
  const int slots =
      args.w->segments == 1 ? C::kSlice * C::kStride * 4 : C::kSplitGroups * C::kSlotFloats * 4;
  const int64_t on_sm = ceil_div<int64_t>(ctas_together<C>(args), context.num_sms);
  // Of each CTA's share the driver takes 1 KiB and the barriers some more.
  constexpr int64_t kReserved = 2048;
  const int bytes =
      std::clamp(static_cast<int>(context.max_shared_bytes / on_sm - kReserved), least, most);
  run_sm90<C>(args, context, Segments::together,
              {.stages = std::max(2, (bytes - slots) / C::kStageBytes)});
}

// Tiles that keep the tensor cores busy: segments together where that ends sooner. The meeting costs
// as much as about kMeeting chunks.
template <class C>
void run_tiles(const GemmArgs& args, const LaunchContext& context) {
  constexpr int64_t kMeeting = 9;
  const int64_t chunks = args.w->k_padded / C::kTileK;
  const int64_t together = ctas_together<C>(args);
  const auto rounds = [&](int64_t ctas) { return ceil_div<int64_t>(ctas, context.num_sms); };
  const bool share = rounds(together) * (chunks / args.w->segments + kMeeting) <
                     rounds(together / args.w->segments) * chunks;
  // CTAs that stay for the next tile pay where K is short.
  run_sm90<C>(args, context, share ? Segments::together : Segments::in_turn,
              {.ctas = chunks <= 64 ? context.num_sms : 0});
}

// Up to 32 tokens, groups of 128. T: activations.
template <class T>
void run_u4_few(const GemmArgs& args, const LaunchContext& context) {
  constexpr int kKiB = 1024;
  if (args.m > 16) {
    return run_stream<Sm90Config<T, 128, 2, 1, 32, false, 2>>(args, context, 110 * kKiB,
                                                              220 * kKiB);
  }
  if (args.m > 8) {
    return run_stream<Sm90Config<T, 128, 2, 1, 16, true, 2>>(args, context, 110 * kKiB, 220 * kKiB);
  }
  // A short K's four segments meet inside a CTA, a long one's in a cluster.
  if (args.w->segments == 4 && args.w->k_padded <= 8192) {
    return run_stream<Sm90Config<T, 128, 1, 4, 8, true>>(args, context, 110 * kKiB, 110 * kKiB);
  }
  return run_stream<Sm90Config<T, 128, 1, 1, 8, true, 5>>(args, context, 56 * kKiB, 110 * kKiB);
}

// More tokens; groups other than the usual 128 have one tile for all of them.
template <class T, int kGroupSize>
void run_u4_many(const GemmArgs& args, const LaunchContext& context) {
  if constexpr (kGroupSize == 128) {
    if (args.m <= 64) {
      using Tall = Sm90Config<T, 128, 3, 1, 64>;
      using Wide = Sm90Config<T, 128, 2, 1, 64>;
      // Three warpgroups a CTA where that makes one round of CTAs and two do not.
      const bool tall = ctas_together<Tall>(args) <= context.num_sms &&
                        ctas_together<Wide>(args) > context.num_sms;
      return tall ? run_tiles<Tall>(args, context) : run_tiles<Wide>(args, context);
    }
  }
  return run_tiles<Sm90Config<T, kGroupSize, 2, 1, 128>>(args, context);
}

// By type; `few` up to 32 tokens.
void run_u4_bf16_few(const GemmArgs& args, const LaunchContext& context);
void run_u4_bf16_many(const GemmArgs& args, const LaunchContext& context);
void run_u4_bf16_small_groups(const GemmArgs& args, const LaunchContext& context);
void run_u4_f16_few(const GemmArgs& args, const LaunchContext& context);
void run_u4_f16_many(const GemmArgs& args, const LaunchContext& context);
void run_u4_f16_small_groups(const GemmArgs& args, const LaunchContext& context);

}  // namespace turbomind::cuda
