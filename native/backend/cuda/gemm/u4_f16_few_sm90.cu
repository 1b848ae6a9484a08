// u4_few_sm90.cuh for f16, groups of 128, few tokens.
#include "backend/cuda/gemm/u4_few_sm90.cuh"

namespace turbomind::cuda {

void run_u4_f16_few(const GemmArgs& args, const LaunchContext& context) {
  run_u4_few<__half>(args, context);
}

}  // namespace turbomind::cuda
