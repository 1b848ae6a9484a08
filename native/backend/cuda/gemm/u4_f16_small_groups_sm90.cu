// u4_sm90.cuh for f16, groups of 32 and 64.
#include "backend/cuda/gemm/u4_sm90.cuh"

namespace turbomind::cuda {

void run_u4_f16_small_groups(const GemmArgs& args, const LaunchContext& context) {
  if (args.w->group_size == 32) {
    run_u4_many<__half, 32>(args, context);
  } else {
    run_u4_many<__half, 64>(args, context);
  }
}

}  // namespace turbomind::cuda
