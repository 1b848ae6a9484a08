// 16-bit weights on wgmma, both operands from shared memory: gemm_sm90.cuh with tensor maps.
// Compared with `naive` and `dense_sm80`.
#include <limits>

#include "backend/cuda/gemm/gemm_sm90.cuh"

namespace turbomind::cuda {

bool supports_dense_sm90(const GemmArgs& args, const LaunchContext&) {
  if (args.w->kind != WeightKind::dense) return false;
  if (reinterpret_cast<uintptr_t>(args.x) % 16 != 0) return false;
  return args.ldx % 8 == 0;
}

void dense_gemm_sm90(const GemmArgs& args, const LaunchContext& context) {
  visit_dtype(args.w->dtype, [&]<class T>() {
    const int m = args.m;
    // Few tokens: the segments of K go to a cluster of CTAs.
    if (m <= 8) {
      return run_sm90<Sm90Config<T, 0, 1, 1, 8>>(args, context, {.stages = 6});
    }
    if (m <= 32) {
      return run_sm90<Sm90Config<T, 0, 1, 1, 32>>(args, context, {.stages = 6});
    }
    if (m <= 64) {
      return run_sm90<Sm90Config<T, 0, 2, 1, 64>>(args, context, {.stages = 4});
    }
    // Segments in turn need an f32 tile beside the ring: it fits with 128 tokens only.
    if (m <= 128 || args.w->segments > 1) {
      return run_sm90<Sm90Config<T, 0, 2, 1, 128>>(
          args, context, {.whole = m <= 256 ? 0 : std::numeric_limits<int64_t>::max()});
    }
    // CTAs that stay for the next tile pay where K is short.
    return run_sm90<Sm90Config<T, 0, 2, 1, 256>>(args, context,
                                                 {.ctas = args.w->k <= 2048 ? context.num_sms : 0});
  });
}

}  // namespace turbomind::cuda
