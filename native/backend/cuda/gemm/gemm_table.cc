// The kernel table and the rules that pick a row. Host only, no state.
#include "backend/cuda/gemm/gemm_table.h"

#include <algorithm>

namespace turbomind::cuda {
namespace {

// wgmma and mma.sync give the same bits (cuda_gemm_test holds them to it), so M may choose between them.
constexpr GemmKernel kTable[] = {
#ifdef TURBOMIND_HAS_SM90A
    {"u4_sm90", 90, 90, 1, supports_u4_sm90, u4_gemm_sm90},
    {"dense_sm90", 90, 90, 1, supports_dense_sm90, dense_gemm_sm90},
#endif
    {"u4_sm80", 80, 999, 1, supports_u4_sm80, u4_gemm_sm80},
    {"dense_sm80", 80, 999, 1, supports_dense_sm80, dense_gemm_sm80},
    {"naive", 0, 999, 1, supports_naive, gemm_naive},
};

}  // namespace

std::span<const GemmKernel> gemm_table() { return kTable; }

const GemmKernel& select_gemm(const GemmArgs& args, const LaunchContext& context,
                              std::string_view name) {
  for (const GemmKernel& row : kTable) {
    if (name.empty() ? args.m < row.min_tokens : row.name != name) continue;
    if (context.sm < row.min_sm || context.sm > row.max_sm) continue;
    if (row.supports(args, context)) return row;
  }
  TM_CHECK(false, "no GEMM kernel `%s` for M %d, N %lld, K %lld, group %d on sm_%d",
           std::string(name).c_str(), args.m, static_cast<long long>(args.w->n),
           static_cast<long long>(args.w->k), args.w->group_size, context.sm);
  return kTable[0];
}

int choose_segments(WeightKind kind, int64_t n, int64_t k) {
  // Enough warpgroups of 64 rows to keep 132 SMs loading for small M. The figure is a constant, not
  // the device's own, so that every GPU gives the same sums; powers of two, because the CTAs of a
  // cluster or the warpgroups of a CTA share them; no more than four, because CTAs with many tokens
  // run them in turn (down of Qwen2.5-32B with eight: 11 % faster at M = 1, 14 % slower at 4096).
  // 16-bit weights fill an SM's ring with one warpgroup, and their widest tile takes no segments.
  const int64_t wanted_units = kind == WeightKind::awq ? 300 : 128;
  const int64_t row_blocks = ceil_div<int64_t>(n, kPackRows);
  const int64_t least_k = kind == WeightKind::awq ? 2 * kChunkColumns : 4096;
  constexpr int64_t kMost = 4;
  int64_t segments = 1;
  while (segments < kMost && segments * row_blocks < wanted_units &&
         k / (2 * segments) >= least_k) {
    segments *= 2;
  }
  return static_cast<int>(segments);
}

}  // namespace turbomind::cuda
