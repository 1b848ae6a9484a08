// u4_few_sm90.cuh for bf16, groups of 128, few tokens.
#include "backend/cuda/gemm/u4_few_sm90.cuh"

namespace turbomind::cuda {

void run_u4_bf16_few(const GemmArgs& args, const LaunchContext& context) {
  run_u4_few<__nv_bfloat16>(args, context);
}

}  // namespace turbomind::cuda
