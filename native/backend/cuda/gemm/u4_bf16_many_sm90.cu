// u4_sm90.cuh for bf16, groups of 128, many tokens.
#include "backend/cuda/gemm/u4_sm90.cuh"

namespace turbomind::cuda {

void run_u4_bf16_many(const GemmArgs& args, const LaunchContext& context) {
  run_u4_many<__nv_bfloat16, 128>(args, context);
}

}  // namespace turbomind::cuda
