// 4-bit weights on sm_90a, up to 32 tokens: which kernel and tile serves which M. The others are in
// u4_sm90.cuh.
#pragma once

#include "backend/cuda/gemm/u4_sm90.cuh"
#include "backend/cuda/gemm/u4_stream_sm90.cuh"

namespace turbomind::cuda {

// Few tokens only stream weights: rings as large as lets all CTAs stay resident, but at least and at
// most so many bytes; what is left on an SM takes the CTAs of the next kernel, which then fetches its
// first weights while this one ends.
template <class C>
void run_rings(const GemmArgs& args, const LaunchContext& context, int least, int most) {
  const int64_t on_sm = ceil_div<int64_t>(ctas_together<C>(args), context.num_sms);
  // Of each CTA's share the driver takes 1 KiB and the barriers some more.
  constexpr int64_t kReserved = 2048;
  const int bytes =
      std::clamp(static_cast<int>(context.max_shared_bytes / on_sm - kReserved), least, most);
  run_sm90<C>(args, context, {.bytes = bytes});
}

// CTAs of `rows` rows with all of K.
inline int64_t ctas_of_rows(const GemmArgs& args, int rows) {
  return ceil_div<int64_t>(args.w->n, rows);
}

// Shared memory of a CTA, more than it needs, so that CTAs spread over the SMs: three to one, or one.
inline constexpr int kThirdOfSm = 73 * 1024;
inline constexpr int kMostOfSm = 115 * 1024;

// One token, K in four segments, each warp with its own x. Of CTAs that an SM holds three of, the rest is
// the next kernel's; but a third CTA on an SM delays the end where K is long, and where not all CTAs run at
// once, larger ones do.
template <class T>
bool run_u4_one_token(const GemmArgs& args, const LaunchContext& context) {
  using Four = StreamConfig<T, 1, 4, 1, 8, 1, true>;
  using Tall = StreamConfig<T, 1, 4, 2, 6, 2, true>;
  const int64_t sms = context.num_sms;
  const int64_t ctas = ctas_of_rows(args, Four::kTileN);
  if (ctas <= 3 * sms) {
    const bool apart = ctas <= sms && args.w->k_padded > 8192;
    run_stream<Four>(args, context, apart ? kMostOfSm : kThirdOfSm);
    return true;
  }
  if (ctas_of_rows(args, Tall::kTileN) > sms) return false;
  run_stream<Tall>(args, context, kMostOfSm);
  return true;
}

// Up to eight tokens whose CTAs run in one round: the least latency.
template <class T>
bool run_u4_one_round(const GemmArgs& args, const LaunchContext& context) {
  using Two = StreamConfig<T, 1, 4, 1, 8>;
  using Eight = StreamConfig<T, 1, 4, 2, 8>;
  using One = StreamConfig<T, 1, 1, 4, 8>;
  using Seven = StreamConfig<T, 1, 1, 7, 6, 2>;
  const int segments = args.w->segments;
  const int64_t sms = context.num_sms;
  if (segments == 1) {
    if (ctas_of_rows(args, One::kTileN) <= 3 * sms) {
      run_stream<One>(args, context, kThirdOfSm);
      return true;
    }
    // Slabs of two chunks keep the warps of a CTA in step, so that they end together.
    if (args.m > 1 || ctas_of_rows(args, Seven::kTileN) > 2 * sms) return false;
    run_stream<Seven>(args, context, 0, 1024);
    return true;
  }
  if (segments != 4) return false;
  if (args.m == 1) return run_u4_one_token<T>(args, context);
  if (args.m == 2 && ctas_of_rows(args, Two::kTileN) <= 3 * sms) {
    run_stream<Two>(args, context, kThirdOfSm);
    return true;
  }
  if (args.m == 2 || ctas_of_rows(args, Eight::kTileN) > sms) return false;
  run_stream<Eight>(args, context, kMostOfSm, 64 * 1024);
  return true;
}

// Two to sixteen tokens where CTAs of many rows, one to an SM, are one round that fills most SMs: x is
// read by few. Clusters leave more of them free, since theirs lie together.
template <class T>
bool run_u4_tall(const GemmArgs& args, const LaunchContext& context) {
  using Taller = StreamConfig<T, 2, 1, 14, 5, 2>;
  using TallerFew = StreamConfig<T, 1, 1, 14, 5, 2>;
  using Tall = StreamConfig<T, 2, 1, 8, 4, 2>;
  const int segments = args.w->segments;
  const int64_t sms = context.num_sms;
  const auto ctas = [&](int rows) { return ctas_of_rows(args, rows) * segments; };
  if (segments == 1 && ctas(Taller::kTileN) <= sms && ctas(Taller::kTileN) * 10 >= sms * 8) {
    if (args.m <= 8) {
      run_stream<TallerFew>(args, context, kMostOfSm, 32 * 1024);
    } else {
      run_stream<Taller>(args, context, kMostOfSm, 32 * 1024);
    }
    return true;
  }
  if (args.m <= 8) return false;
  if (segments == 4 && ctas(Tall::kTileN) * 10 <= sms * 9 && ctas(Tall::kTileN) * 10 >= sms * 8) {
    run_stream<Tall>(args, context, kMostOfSm, 48 * 1024);
    return true;
  }
  return false;
}

// Nine to sixteen tokens, K in four segments, one round of CTAs that an SM each has for itself: of 176 rows
// where segments are long, of 64 or, where K is short, of 32 with all segments.
template <class T>
bool run_u4_apart(const GemmArgs& args, const LaunchContext& context) {
  using Long = StreamConfig<T, 2, 1, 11, 8>;
  using Middle = StreamConfig<T, 2, 1, 4, 8>;
  using Short = StreamConfig<T, 2, 4, 2, 8>;
  const PackedMatrix& w = *args.w;
  if (w.segments != 4) return false;
  const auto fits = [&](int rows) { return ctas_of_rows(args, rows) * 4 <= context.num_sms; };
  if (w.k_padded > 4 * 4096) {
    if (!fits(Long::kTileN)) return false;
    run_stream<Long>(args, context, kMostOfSm, 68 * 1024);
  } else if (!fits(Middle::kTileN)) {
    return false;
  } else if (w.k_padded > 4096) {
    run_stream<Middle>(args, context, 0, 40 * 1024);
  } else {
    run_stream<Short>(args, context, kMostOfSm, 96 * 1024);
  }
  return true;
}

// Up to 32 tokens, groups of 128. T: activations.
template <class T>
void run_u4_few(const GemmArgs& args, const LaunchContext& context) {
  constexpr int kKiB = 1024;
  if (args.m > 16) {
    using Tall = Sm90Config<T, 128, 3, 1, 32>;
    if (args.w->segments == 1) {
      return run_unsplit_best<Tall, Sm90Config<T, 128, 4, 1, 32>>(args, context, 100);
    }
    // Three warpgroups where they make one round of CTAs and two do not.
    if (ctas_together<Tall>(args) <= context.num_sms &&
        ceil_div<int64_t>(args.w->n, 128) * args.w->segments > context.num_sms) {
      return run_shared<Tall>(args, context);
    }
    return run_rings<Sm90Config<T, 128, 2, 1, 32, 2>>(args, context, 110 * kKiB, 220 * kKiB);
  }
  if (args.m > 8) {
    if (run_u4_tall<T>(args, context) || run_u4_apart<T>(args, context)) return;
    // Long segments: many small CTAs instead of few large ones.
    if (args.w->segments > 1 && args.w->k_padded / args.w->segments > 4096) {
      return run_stream<StreamConfig<T, 2, 1, 4, 8>>(args, context, 0);
    }
    return run_rings<Sm90Config<T, 128, 2, 1, 16, 2, true>>(args, context, 110 * kKiB, 220 * kKiB);
  }
  if (run_u4_one_round<T>(args, context)) return;
  if (args.m > 1 && run_u4_tall<T>(args, context)) return;
  // A short K's four segments meet inside a CTA, a long one's in a cluster.
  if (args.w->segments == 4 && args.w->k_padded <= 8192) {
    return run_rings<Sm90Config<T, 128, 1, 4, 8, 1, true>>(args, context, 110 * kKiB, 110 * kKiB);
  }
  return run_rings<Sm90Config<T, 128, 1, 1, 8, 5, true>>(args, context, 56 * kKiB, 110 * kKiB);
}

// By type.
void run_u4_bf16_few(const GemmArgs& args, const LaunchContext& context);
void run_u4_f16_few(const GemmArgs& args, const LaunchContext& context);

}  // namespace turbomind::cuda
