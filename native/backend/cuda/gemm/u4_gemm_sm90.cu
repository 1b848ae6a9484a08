// The table's row u4_sm90: picks the instantiation of u4_sm90.cuh.
#include "backend/cuda/gemm/u4_sm90.cuh"

namespace turbomind::cuda {

bool supports_u4_sm90(const GemmArgs& args, const LaunchContext&) {
  if (args.w->kind != WeightKind::awq) return false;
  if (reinterpret_cast<uintptr_t>(args.x) % 16 != 0) return false;
  return args.ldx % 8 == 0;
}

void u4_gemm_sm90(const GemmArgs& args, const LaunchContext& context) {
  const bool small_groups = args.w->group_size < 128;
  if (args.w->dtype == DType::f16) {
    small_groups ? run_u4_sm90_f16_small_groups(args, context) : run_u4_sm90_f16(args, context);
  } else {
    small_groups ? run_u4_sm90_bf16_small_groups(args, context) : run_u4_sm90_bf16(args, context);
  }
}

}  // namespace turbomind::cuda
