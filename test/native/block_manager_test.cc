// The pool of KV blocks: order, references, exhaustion, and its guards against misuse.
#include "runtime/block_manager.h"

#include "test.h"

using namespace turbomind;

TEST("blocks are handed out in a fixed order, the last released first") {
  BlockManager manager(4, 64);
  std::vector<BlockId> first;
  EXPECT(manager.allocate(3, first));
  EXPECT(first == (std::vector<BlockId>{0, 1, 2}));
  manager.release(first);
  std::vector<BlockId> again;
  EXPECT(manager.allocate(2, again));
  EXPECT(again == (std::vector<BlockId>{0, 1}));
  manager.check_invariants();
}

TEST("an allocation that does not fit changes nothing") {
  BlockManager manager(2, 64);
  std::vector<BlockId> blocks;
  EXPECT(!manager.allocate(3, blocks));
  EXPECT(blocks.empty());
  EXPECT_EQ(manager.num_free(), 2);
  EXPECT(manager.allocate(0, blocks));
  EXPECT(manager.allocate(2, blocks));
  EXPECT(!manager.allocate(1, blocks));
  EXPECT_EQ(manager.num_used(), 2);
}

TEST("a shared block is free only when its last holder released it") {
  BlockManager manager(2, 64);
  std::vector<BlockId> blocks;
  EXPECT(manager.allocate(1, blocks));
  manager.share(blocks);
  EXPECT_EQ(manager.reference_count(0), 2);
  manager.release(blocks);
  EXPECT_EQ(manager.num_free(), 1);
  manager.check_invariants();
  manager.release(blocks);
  EXPECT_EQ(manager.num_free(), 2);
  manager.check_invariants();
}

TEST("misuse is a typed error: double release, sharing a free block, ids outside the pool") {
  BlockManager manager(2, 64);
  std::vector<BlockId> blocks;
  EXPECT(manager.allocate(1, blocks));
  manager.release(blocks);
  EXPECT_ERROR(manager.release(blocks), ErrorCode::internal);
  EXPECT_ERROR(manager.share(blocks), ErrorCode::internal);
  const BlockId outside[] = {2};
  EXPECT_ERROR(manager.release(outside), ErrorCode::internal);
  EXPECT_ERROR(manager.reference_count(-1), ErrorCode::internal);
  EXPECT_ERROR(BlockManager(0, 64), ErrorCode::internal);
  manager.check_invariants();
}

TEST("a table grows by whole blocks, maps tokens to slots and returns its blocks when it dies") {
  BlockManager manager(4, 4);
  std::vector<BlockId> other;
  EXPECT(manager.allocate(1, other));  // so that the table's blocks are not 0, 1, …
  {
    BlockTable table(manager);
    EXPECT(table.grow_to(1));
    EXPECT_EQ(table.num_blocks(), 1);
    EXPECT(table.grow_to(4));
    EXPECT_EQ(table.num_blocks(), 1);
    EXPECT(table.grow_to(5));
    EXPECT_EQ(table.num_blocks(), 2);
    EXPECT_EQ(table.slot(0), 4);
    EXPECT_EQ(table.slot(3), 7);
    EXPECT_EQ(table.slot(4), 8);
    EXPECT_ERROR(table.slot(8), ErrorCode::internal);
    EXPECT(!table.grow_to(13));
    EXPECT_EQ(table.num_blocks(), 2);
    EXPECT(table.grow_to(12));
    EXPECT_EQ(manager.num_free(), 0);
  }
  EXPECT_EQ(manager.num_free(), 3);
  manager.check_invariants();
}

TEST_MAIN()
