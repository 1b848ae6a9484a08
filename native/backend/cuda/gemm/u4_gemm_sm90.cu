// 4-bit weights on wgmma, the register operand: gemm_sm90.cuh with packed tiles. Compared with
// `naive` and `u4_sm80`.
#include "backend/cuda/gemm/gemm_sm90.cuh"

namespace turbomind::cuda {
namespace {

template <class T, int kGroupSize>
void run(const GemmArgs& args, const LaunchContext& context) {
  const int m = args.m;
  if (m <= 8) return run_sm90<Sm90Config<T, kGroupSize, 1, 8>>(args, context, 6);
  if (m <= 16) return run_sm90<Sm90Config<T, kGroupSize, 1, 16>>(args, context, 5);
  if (m <= 32) return run_sm90<Sm90Config<T, kGroupSize, 1, 32>>(args, context, 4);
  if (m <= 64) return run_sm90<Sm90Config<T, kGroupSize, 2, 64>>(args, context, 4);
  return run_sm90<Sm90Config<T, kGroupSize, 2, 128>>(args, context, 5);
}

}  // namespace

bool supports_u4_sm90(const GemmArgs& args, const LaunchContext&) {
  if (args.w->kind != WeightKind::awq) return false;
  if (reinterpret_cast<uintptr_t>(args.x) % 16 != 0) return false;
  return args.ldx % 8 == 0;
}

void u4_gemm_sm90(const GemmArgs& args, const LaunchContext& context) {
  visit_dtype(args.w->dtype, [&]<class T>() {
    switch (args.w->group_size) {
      case 32:
        return run<T, 32>(args, context);
      case 64:
        return run<T, 64>(args, context);
      default:
        return run<T, 128>(args, context);
    }
  });
}

}  // namespace turbomind::cuda
