// 4-bit weights on mma.sync: gemm_sm80.cuh with packed tiles. Compared with: `naive`.
#include <algorithm>

#include "backend/cuda/gemm/gemm_sm80.cuh"

namespace turbomind::cuda {

bool supports_u4_sm80(const GemmArgs& args, const LaunchContext&) {
  if (args.w->kind != WeightKind::awq) return false;
  return args.ldx % 8 == 0;
}

void u4_gemm_sm80(const GemmArgs& args, const LaunchContext& context) {
  visit_dtype(args.w->dtype, [&]<class T>() {
    if (args.w->group_size == kChunkColumns) {
      run_sm80_for<T, WeightKind::awq, true>(args, context);
    } else {
      run_sm80_for<T, WeightKind::awq, false>(args, context);
    }
  });
}

}  // namespace turbomind::cuda
