// Chooses a table, and the norm entry points that other ops of the backend share.
#include "backend/cpu/kernels/kernel_table.h"

#include "base/error.h"

namespace turbomind::cpu {

const Kernels& kernels_for(Isa isa) {
  // best_isa() also obtains the permission that the first tile instruction needs.
  TM_CHECK(isa <= best_isa(), "kernels for %s on a machine with %s at best", to_string(isa),
           to_string(best_isa()));
#if defined(__x86_64__)
  switch (isa) {
    case Isa::scalar:
      return kScalarKernels;
    case Isa::avx2:
      return kAvx2Kernels;
    case Isa::avx512:
      return kAvx512Kernels;
    case Isa::amx:
      return kAmxKernels;
  }
#endif
  (void)isa;
  return kScalarKernels;
}

RowNorm row_norm_of(const Norm& norm, int64_t n) {
  TM_CHECK(norm.weight && norm.weight.dtype == DType::f32 && norm.weight.elements() == n,
           "norm weight: need %lld f32 values", static_cast<long long>(n));
  TM_CHECK(!norm.bias || (norm.bias.dtype == DType::f32 && norm.bias.elements() == n),
           "norm bias: need %lld f32 values", static_cast<long long>(n));
  return RowNorm{norm.kind, norm.weight.as<float>(), norm.bias ? norm.bias.as<float>() : nullptr,
                 norm.eps};
}

void row_norm(const RowNorm& norm, const float* x, float* y, int64_t n, Isa isa) {
  const Kernels& kernels = kernels_for(isa);
  kernels.norm_apply(norm, kernels.norm_stats(norm, x, n), x, y, n);
}

}  // namespace turbomind::cpu
