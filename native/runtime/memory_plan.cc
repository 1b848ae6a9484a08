#include "runtime/memory_plan.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

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
    plan.max_held_tiles = std::max(plan.max_tiles, budget.session_len / budget.tokens_per_tile);
  }
  return plan;
}

namespace {

// "weights 1.0 MiB, activations 2.0 MiB, ...", parts of nothing left out.
std::string describe(const MemoryParts& parts) {
  const std::pair<const char*, size_t> named[] = {
      {"weights", parts.weights},
      {"vision weights", parts.vision_weights},
      {"activations", parts.activations},
      {"vision activations", parts.vision_activations},
      {"image embeddings", parts.image_embeddings},
      {"scratch", parts.scratch},
      {"sampling", parts.sampling},
      {"graphs", parts.graphs},
      {"reserve", parts.reserve},
      {"swap space", parts.device_is_host ? parts.swap : 0}};
  std::string text;
  for (const auto& [name, bytes] : named) {
    if (bytes == 0) continue;
    text += format("%s%s %.1f MiB", text.empty() ? "" : ", ", name, mib(bytes));
  }
  return text;
}

void check_cache(const CacheBudget& cache) {
  if (cache.kv_bytes > 0 && cache.total_bytes > 0) {
    throw Error(ErrorCode::invalid_argument,
                "kvCacheBytes and memoryBudgetBytes exclude each other; give one of them");
  }
  if (cache.share > 0.0 && cache.share <= 1.0) return;
  throw Error(ErrorCode::invalid_argument,
              format("cacheMaxEntryCount is %g; expected a share of free memory above 0 and at "
                     "most 1",
                     cache.share));
}

// Bytes that the pool may take, whatever it can use.
double pool_bytes(const MemoryBudget& budget) {
  const size_t parts = budget.parts.total();
  const CacheBudget& cache = budget.cache;
  const size_t total = cache.total_bytes > 0 ? cache.total_bytes : budget.free_bytes;
  if (total > budget.free_bytes) {
    throw Error(
        ErrorCode::out_of_memory,
        format("memoryBudgetBytes is %.1f MiB, but only %.1f MiB are free; lower it or free "
               "memory",
               mib(total), mib(budget.free_bytes)));
  }
  if (parts > total) {
    throw Error(
        ErrorCode::out_of_memory,
        format("the model takes %.1f MiB without a KV cache (%s), but %.1f MiB are %s; lower "
               "maxPrefillTokenNum or maxBatchSize, or %s",
               mib(parts), describe(budget.parts).c_str(), mib(total),
               cache.total_bytes > 0 ? "budgeted" : "free",
               cache.total_bytes > 0 ? "raise memoryBudgetBytes" : "free memory"));
  }
  const size_t left = total - parts;
  if (cache.total_bytes > 0) return static_cast<double>(left);
  if (cache.kv_bytes == 0) return static_cast<double>(left) * cache.share;
  if (cache.kv_bytes > left) {
    throw Error(
        ErrorCode::out_of_memory,
        format("kvCacheBytes is %.1f MiB, but %.1f MiB free memory less %.1f MiB (%s) leave "
               "%.1f MiB; lower it or free memory",
               mib(cache.kv_bytes), mib(total), mib(parts), describe(budget.parts).c_str(),
               mib(left)));
  }
  return static_cast<double>(cache.kv_bytes);
}

// Blocks of host memory, no more than all sequences together can have.
int swap_blocks(const MemoryBudget& budget, int64_t useful) {
  const bool on_host = budget.parts.device_is_host;
  const size_t automatic = on_host ? 0 : std::min(kDefaultSwapBytes, budget.host_free_bytes / 10);
  const size_t wanted = budget.cache.swap_bytes.value_or(automatic);
  const size_t blocks = std::min(wanted / budget.block_bytes, static_cast<size_t>(useful));
  if (!budget.cache.swap_bytes || wanted == 0) return static_cast<int>(blocks);
  if (blocks == 0) {
    throw Error(
        ErrorCode::invalid_argument,
        format("swapSpaceBytes is %zu, less than one KV block of %zu bytes; raise it or give "
               "0 to have none",
               wanted, budget.block_bytes));
  }
  const size_t bytes = blocks * budget.block_bytes;
  if (!on_host && bytes > budget.host_free_bytes) {
    throw Error(ErrorCode::out_of_memory,
                format("swapSpaceBytes takes %.1f MiB, but only %.1f MiB of host memory are free; "
                       "lower it",
                       mib(bytes), mib(budget.host_free_bytes)));
  }
  return static_cast<int>(blocks);
}

}  // namespace

MemoryPlan plan_memory(const MemoryBudget& given) {
  MemoryBudget budget = given;
  MemoryPlan plan = plan_steps(budget);
  check_cache(budget.cache);
  TM_CHECK(budget.block_bytes > 0, "KV blocks of 0 bytes");
  const int64_t useful = int64_t{plan.blocks_per_session} * budget.max_batch_size;
  plan.num_swap_blocks =
      swap_blocks(budget, std::min<int64_t>(useful, std::numeric_limits<int32_t>::max()));
  budget.parts.swap = static_cast<size_t>(plan.num_swap_blocks) * budget.block_bytes;
  const double bytes = pool_bytes(budget);
  const double affordable = bytes / static_cast<double>(budget.block_bytes);
  // A slot, block * block_size + offset, is an int32.
  const int64_t addressable = std::numeric_limits<int32_t>::max() / budget.block_size;
  // An absolute amount is taken as it is: blocks beyond full sessions keep prefixes.
  const bool absolute = budget.cache.kv_bytes > 0 || budget.cache.total_bytes > 0;
  const int64_t wanted = absolute ? addressable : std::min(useful, addressable);
  const int64_t blocks =
      affordable < static_cast<double>(wanted) ? static_cast<int64_t>(affordable) : wanted;
  if (blocks < plan.blocks_per_session) {
    const auto session_bytes = static_cast<size_t>(plan.blocks_per_session) * budget.block_bytes;
    throw Error(
        ErrorCode::out_of_memory,
        format(
            "the KV cache of one session of %d tokens takes %d blocks of %.2f MiB = %.1f MiB, "
            "but the %.1f MiB for it (of %.1f MiB free, %.1f MiB taken by the model) holds %lld; "
            "lower sessionLen, raise cacheMaxEntryCount, kvCacheBytes or memoryBudgetBytes, set "
            "quantPolicy or free memory",
            budget.session_len, plan.blocks_per_session, mib(budget.block_bytes),
            mib(session_bytes), bytes / (1024.0 * 1024.0), mib(budget.free_bytes),
            mib(budget.parts.total()), static_cast<long long>(blocks)));
  }
  plan.num_blocks = static_cast<int>(blocks);
  plan.kv_cache_bytes = static_cast<size_t>(blocks) * budget.block_bytes;
  plan.block_bytes = budget.block_bytes;
  plan.free_bytes = budget.free_bytes;
  plan.parts = budget.parts;
  return plan;
}

}  // namespace turbomind
