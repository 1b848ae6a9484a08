// 16-bit weights on mma.sync: gemm_sm80.cuh with row-major tiles. Compared with: `naive`.
#include <algorithm>

#include "backend/cuda/gemm/gemm_sm80.cuh"

namespace turbomind::cuda {

bool supports_dense_sm80(const GemmArgs& args, const LaunchContext&) {
  if (args.w->kind != WeightKind::dense) return false;
  return args.ldx % 8 == 0;
}

void dense_gemm_sm80(const GemmArgs& args, const LaunchContext& context) {
  visit_dtype(args.w->dtype,
              [&]<class T>() { run_sm80_for<T, WeightKind::dense, false>(args, context); });
}

}  // namespace turbomind::cuda
