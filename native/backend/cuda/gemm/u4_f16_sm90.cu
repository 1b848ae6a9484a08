// u4_sm90.cuh for f16 and groups of 128.
#include "backend/cuda/gemm/u4_sm90.cuh"

namespace turbomind::cuda {

void run_u4_sm90_f16(const GemmArgs& args, const LaunchContext& context) {
  run_u4_sm90<__half, 128>(args, context);
}

}  // namespace turbomind::cuda
