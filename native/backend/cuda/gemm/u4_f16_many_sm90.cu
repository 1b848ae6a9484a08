// u4_sm90.cuh for f16, groups of 128, many tokens.
#include "backend/cuda/gemm/u4_sm90.cuh"

namespace turbomind::cuda {

void run_u4_f16_many(const GemmArgs& args, const LaunchContext& context) {
  run_u4_many<__half, 128>(args, context);
}

}  // namespace turbomind::cuda
