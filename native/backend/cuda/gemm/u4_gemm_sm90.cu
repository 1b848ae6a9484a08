// The table's row u4_sm90: picks the instantiation of u4_few_sm90.cuh or u4_sm90.cuh.
#include "backend/cuda/gemm/u4_few_sm90.cuh"

namespace turbomind::cuda {

bool supports_u4_sm90(const GemmArgs& args, const LaunchContext&) {
  if (args.w->kind != WeightKind::awq) return false;
  if (reinterpret_cast<uintptr_t>(args.x) % 16 != 0) return false;
  return args.ldx % 8 == 0;
}

void u4_gemm_sm90(const GemmArgs& args, const LaunchContext& context) {
  const bool f16 = args.w->dtype == DType::f16;
  if (args.w->group_size < 128) {
    // Few tokens with small groups: mma.sync, the same bits.
    if (args.m <= 64) return u4_gemm_sm80(args, context);
    return f16 ? run_u4_f16_small_groups(args, context) : run_u4_bf16_small_groups(args, context);
  }
  if (args.m <= 32) return f16 ? run_u4_f16_few(args, context) : run_u4_bf16_few(args, context);
  return f16 ? run_u4_f16_many(args, context) : run_u4_bf16_many(args, context);
}

}  // namespace turbomind::cuda
