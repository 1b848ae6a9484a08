// The kernel table and the rules that pick a row. Host only, no state.
#include "backend/cuda/gemm/gemm_table.h"

#include <algorithm>

namespace turbomind::cuda {
namespace {

// wgmma and mma.sync give the same bits (cuda_gemm_test holds them to it), so M may choose between them:
// up to 16 tokens the mma.sync kernel streams 4-bit weights faster (H100, Qwen2.5-32B layer, M = 1:
// 114 us against 130).
constexpr GemmKernel kTable[] = {
#ifdef TURBOMIND_HAS_SM90A
    {"u4_sm90", 90, 90, 17, supports_u4_sm90, u4_gemm_sm90},
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
  // About four CTAs of 64 rows on each of 132 SMs keep enough loads in flight for small M. The
  // figure is a constant, not the device's own, so that every GPU gives the same sums.
  constexpr int64_t kWantedUnits = 528;
  const int64_t row_blocks = ceil_div<int64_t>(n, kPackRows);
  const int64_t least_k = kind == WeightKind::awq ? 2 * kChunkColumns : 1024;
  const int64_t most = kind == WeightKind::awq ? 8 : 4;
  const int64_t by_units = std::max<int64_t>(1, kWantedUnits / row_blocks);
  return static_cast<int>(std::clamp<int64_t>(std::min(by_units, k / least_k), 1, most));
}

}  // namespace turbomind::cuda
