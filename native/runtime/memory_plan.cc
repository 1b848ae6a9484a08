#include "runtime/memory_plan.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "base/error.h"
#include "base/types.h"
#include "runtime/speculation.h"

namespace turbomind {
namespace {

// Far above any use; keeps every product of two limits inside 64 bits and T inside 32.
constexpr int kMaxSequences = 65536;
constexpr int kMaxPrefillTokens = 1 << 20;
constexpr int kMaxBlockSize = 1024;

void check_range(const char* name, int value, int low, int high) {
  if (value >= low && value <= high) return;
  throw Error(ErrorCode::invalid_argument,
              format("%s is %d; expected %d to %d", name, value, low, high));
}

double mib(size_t bytes) { return static_cast<double>(bytes) / (1024.0 * 1024.0); }

}  // namespace

MemoryPlan plan_steps(const MemoryBudget& budget) {
  check_range("sessionLen", budget.session_len, 2, std::numeric_limits<int>::max() / 2);
  check_range("maxBatchSize", budget.max_batch_size, 1, kMaxSequences);
  check_range("maxPrefillTokenNum", budget.max_prefill_token_num, 1, kMaxPrefillTokens);
  check_range("blockSize", budget.block_size, 1, kMaxBlockSize);
  check_range("numSpeculativeTokens", budget.max_drafts, 0, kMaxDrafts);
  if (!std::has_single_bit(static_cast<unsigned>(budget.block_size))) {
    throw Error(
        ErrorCode::invalid_argument,
        format("blockSize is %d; expected a power of two (the default is 64)", budget.block_size));
  }
  MemoryPlan plan;
  plan.blocks_per_session = ceil_div(budget.session_len, budget.block_size);
  plan.max_sequences = budget.max_batch_size;
  plan.max_tokens = budget.max_prefill_token_num + budget.max_batch_size;
  // Drafts run in steps without prefill and take its room.
  const int64_t drafts = std::min<int64_t>({kMaxDraftRows, budget.max_prefill_token_num,
                                            int64_t{budget.max_drafts} * budget.max_batch_size});
  plan.max_rows = budget.max_batch_size + static_cast<int>(drafts);
  if (budget.tokens_per_tile > 0) {
    plan.max_tiles = std::max(1, budget.max_prefill_token_num / budget.tokens_per_tile);
  }
  return plan;
}

MemoryPlan plan_memory(const MemoryBudget& budget) {
  MemoryPlan plan = plan_steps(budget);
  const double share = budget.cache_max_entry_count;
  if (!(share > 0.0 && share <= 1.0)) {
    throw Error(ErrorCode::invalid_argument,
                format("cacheMaxEntryCount is %g; expected a share of free memory above 0 and at "
                       "most 1",
                       share));
  }
  TM_CHECK(budget.block_bytes > 0, "KV blocks of 0 bytes");
  const double affordable =
      static_cast<double>(budget.free_bytes) * share / static_cast<double>(budget.block_bytes);
  const int64_t useful = int64_t{plan.blocks_per_session} * budget.max_batch_size;
  // A slot, block * block_size + offset, is an int32.
  const int64_t addressable = std::numeric_limits<int32_t>::max() / budget.block_size;
  const int64_t wanted = std::min(useful, addressable);
  const int64_t blocks =
      affordable < static_cast<double>(wanted) ? static_cast<int64_t>(affordable) : wanted;
  if (blocks < plan.blocks_per_session) {
    const auto session_bytes = static_cast<size_t>(plan.blocks_per_session) * budget.block_bytes;
    throw Error(ErrorCode::out_of_memory,
                format("the KV cache of one session of %d tokens takes %d blocks of %.2f MiB = "
                       "%.1f MiB, but %.0f%% of %.1f MiB free memory holds %lld; lower sessionLen, "
                       "raise cacheMaxEntryCount or free memory",
                       budget.session_len, plan.blocks_per_session, mib(budget.block_bytes),
                       mib(session_bytes), share * 100.0, mib(budget.free_bytes),
                       static_cast<long long>(blocks)));
  }
  plan.num_blocks = static_cast<int>(blocks);
  plan.kv_cache_bytes = static_cast<size_t>(blocks) * budget.block_bytes;
  return plan;
}

}  // namespace turbomind
