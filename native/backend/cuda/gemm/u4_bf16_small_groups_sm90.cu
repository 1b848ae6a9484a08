// u4_sm90.cuh for bf16, groups of 32 and 64.
#include "backend/cuda/gemm/u4_sm90.cuh"

namespace turbomind::cuda {

void run_u4_bf16_small_groups(const GemmArgs& args, const LaunchContext& context) {
  if (args.w->group_size == 32) {
    run_u4_many<__nv_bfloat16, 32>(args, context);
  } else {
    run_u4_many<__nv_bfloat16, 64>(args, context);
  }
}

}  // namespace turbomind::cuda
