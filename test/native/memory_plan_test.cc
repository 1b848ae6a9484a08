// The number of KV blocks and the size of a step, from budgets worked out by hand.
#include "runtime/memory_plan.h"

#include <limits>
#include <string>

#include "test.h"

using namespace turbomind;

namespace {

MemoryBudget budget() {
  return {.session_len = 1000,
          .max_batch_size = 4,
          .max_prefill_token_num = 512,
          .block_size = 64,
          .cache = {.share = 0.5},
          .parts = {.weights = 7000, .scratch = 3000},
          .free_bytes = 110 * 1000,
          .block_bytes = 1000,
          .tokens_per_tile = 256};
}

}  // namespace

TEST("the pool takes its share of free memory") {
  const MemoryPlan plan = plan_memory(budget());
  EXPECT_EQ(plan.blocks_per_session, 16);
  EXPECT_EQ(plan.num_blocks, 50);
  EXPECT_EQ(plan.kv_cache_bytes, size_t{50000});
}

TEST("the pool never exceeds max_batch_size full sessions") {
  MemoryBudget b = budget();
  b.free_bytes = size_t{1} << 40;
  EXPECT_EQ(plan_memory(b).num_blocks, 64);
}

TEST("a step holds a prefill and a decode row of each sequence, and the tiles these tokens use") {
  const MemoryPlan plan = plan_steps(budget());
  EXPECT_EQ(plan.max_tokens, 516);
  EXPECT_EQ(plan.max_sequences, 4);
  EXPECT_EQ(plan.max_tiles, 2);
  MemoryBudget small = budget();
  small.max_prefill_token_num = 100;
  EXPECT_EQ(plan_steps(small).max_tiles, 1);
  small.tokens_per_tile = 0;
  EXPECT_EQ(plan_steps(small).max_tiles, 1);
}

TEST("drafts add rows to a step, no more than the prefill they stand in for has tokens") {
  MemoryBudget b = budget();
  EXPECT_EQ(plan_steps(b).max_rows, 4);
  b.max_drafts = 3;
  EXPECT_EQ(plan_steps(b).max_rows, 4 + 12);
  EXPECT_EQ(plan_steps(b).max_tokens, 516);
  b.max_drafts = 7;
  b.max_batch_size = 100;
  EXPECT_EQ(plan_steps(b).max_rows, 100 + 32);
  b.max_prefill_token_num = 10;
  EXPECT_EQ(plan_steps(b).max_rows, 100 + 10);
  for (int bad : {-1, 8}) {
    b.max_drafts = bad;
    EXPECT_ERROR(plan_steps(b), ErrorCode::invalid_argument);
  }
}

TEST("a pool that cannot hold one session is refused with the numbers and the remedy") {
  MemoryBudget b = budget();
  b.free_bytes = 41 * 1000;  // 15.5 blocks of the 16 needed
  EXPECT_ERROR(plan_memory(b), ErrorCode::out_of_memory);
  try {
    (void)plan_memory(b);
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT(message.find("1000 tokens takes 16 blocks") != std::string::npos);
    EXPECT(message.find("holds 15") != std::string::npos);
    EXPECT(message.find("lower sessionLen") != std::string::npos);
    EXPECT(message.find("cacheMaxEntryCount") != std::string::npos);
  }
  b.free_bytes = 42 * 1000;
  EXPECT_EQ(plan_memory(b).num_blocks, 16);
}

TEST("an absolute amount is honoured to the block, or refused with the numbers") {
  MemoryBudget b = budget();
  b.cache.kv_bytes = 90999;
  EXPECT_EQ(plan_memory(b).num_blocks, 90);  // more than full sessions need: prefixes stay
  b.cache.kv_bytes = 100 * 1000;
  EXPECT_EQ(plan_memory(b).kv_cache_bytes, size_t{100000});
  b.cache.kv_bytes = 100 * 1000 + 1;
  EXPECT_ERROR(plan_memory(b), ErrorCode::out_of_memory);
  b.cache.total_bytes = 50 * 1000;
  EXPECT_ERROR(plan_memory(b), ErrorCode::invalid_argument);  // both
  b.cache.kv_bytes = 0;
  EXPECT_EQ(plan_memory(b).num_blocks, 40);
  for (const size_t bytes : {size_t{9000}, size_t{25000}, size_t{110001}}) {
    b.cache.total_bytes = bytes;  // less than the parts, than a session, more than there is
    EXPECT_ERROR(plan_memory(b), ErrorCode::out_of_memory);
  }
  b.cache.total_bytes = 9000;
  try {
    (void)plan_memory(b);
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT(message.find("weights 0.0 MiB, scratch 0.0 MiB") != std::string::npos);
    EXPECT(message.find("raise memoryBudgetBytes") != std::string::npos);
  }
}

TEST("parts and pool never exceed free memory at any share and batch size") {
  for (const double share : {0.01, 0.5, 0.9, 0.97, 1.0}) {
    for (const int batch : {1, 5, 256, 65536}) {
      for (const size_t free : {size_t{27000}, size_t{60000}, size_t{1} << 30}) {
        MemoryBudget b = budget();
        b.cache.share = share;
        b.max_batch_size = batch;
        b.free_bytes = free;
        try {
          const MemoryPlan plan = plan_memory(b);
          EXPECT(plan.parts.total() + plan.kv_cache_bytes <= free);
          EXPECT(plan.num_blocks >= plan.blocks_per_session);
        } catch (const Error& error) {
          EXPECT(error.code() == ErrorCode::out_of_memory);
        }
      }
    }
  }
}

TEST("host memory for swapped blocks is planned in whole blocks, no more than can be of use") {
  MemoryBudget b = budget();
  b.host_free_bytes = 60 * 1000;
  const auto blocks = [&b](std::optional<size_t> wanted) {
    b.cache.swap_bytes = wanted;
    return plan_memory(b).num_swap_blocks;
  };
  EXPECT_EQ(blocks(std::nullopt), 6);  // a tenth of what is free
  EXPECT_EQ(blocks(0), 0);
  EXPECT_EQ(blocks(5999), 5);
  EXPECT_EQ(blocks(60 * 1000), 60);
  EXPECT_EQ(plan_memory(b).parts.swap, size_t{60000});
  EXPECT_EQ(plan_memory(b).parts.total(), size_t{10000});  // not on the device
  EXPECT_ERROR(blocks(61 * 1000), ErrorCode::out_of_memory);
  EXPECT_ERROR(blocks(999), ErrorCode::invalid_argument);
  b.host_free_bytes = size_t{1} << 40;
  EXPECT_EQ(blocks(size_t{1} << 39), 64);  // four full sessions
  EXPECT_EQ(blocks(std::nullopt), 64);
  // Where the device computes in host memory it is the same memory: none unless asked for.
  b.parts.device_is_host = true;
  EXPECT_EQ(blocks(std::nullopt), 0);
  EXPECT_EQ(plan_memory(b).num_blocks, 50);
  EXPECT_EQ(blocks(20 * 1000), 20);
  EXPECT_EQ(plan_memory(b).num_blocks, 40);
  b.free_bytes = 70 * 1000;
  EXPECT_ERROR(blocks(size_t{1} << 39), ErrorCode::out_of_memory);
}

TEST("slots stay within 32 bits however much memory there is") {
  MemoryBudget b = budget();
  b.session_len = 1 << 20;
  b.max_batch_size = 65536;
  b.free_bytes = std::numeric_limits<size_t>::max();
  b.block_bytes = 1;
  const MemoryPlan plan = plan_memory(b);
  EXPECT(int64_t{plan.num_blocks} * b.block_size <= std::numeric_limits<int32_t>::max());
  EXPECT(plan.num_blocks > plan.blocks_per_session);
}

TEST("values out of range are invalid arguments") {
  const auto with = [](auto change) {
    MemoryBudget b = budget();
    change(b);
    return b;
  };
  const MemoryBudget bad[] = {
      with([](MemoryBudget& b) { b.session_len = 1; }),
      with([](MemoryBudget& b) { b.session_len = -5; }),
      with([](MemoryBudget& b) { b.max_batch_size = 0; }),
      with([](MemoryBudget& b) { b.max_prefill_token_num = 0; }),
      with([](MemoryBudget& b) { b.max_prefill_token_num = 1 << 30; }),
      with([](MemoryBudget& b) { b.block_size = 0; }),
      with([](MemoryBudget& b) { b.block_size = 48; }),
      with([](MemoryBudget& b) { b.cache.share = 0.0; }),
      with([](MemoryBudget& b) { b.cache.share = 1.5; }),
      with([](MemoryBudget& b) { b.cache.share = std::nan(""); }),
  };
  for (const MemoryBudget& b : bad) EXPECT_ERROR(plan_memory(b), ErrorCode::invalid_argument);
}

TEST_MAIN()
