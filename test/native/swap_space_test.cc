// Who owns which slot of host memory.
#include "runtime/swap_space.h"

#include "base/error.h"
#include "test.h"

using namespace turbomind;

TEST("slots are given out once, in neighbouring order, and come back") {
  SwapSpace space(5);
  std::vector<int32_t> slots;
  EXPECT(space.allocate(3, slots));
  EXPECT(slots == (std::vector<int32_t>{0, 1, 2}));
  EXPECT(!space.allocate(3, slots));
  EXPECT_EQ(slots.size(), size_t{3});
  EXPECT_EQ(space.num_free(), 2);
  space.check_invariants();
  space.release(slots);
  EXPECT_EQ(space.num_free(), 5);
  space.check_invariants();
  EXPECT_ERROR(space.release(slots), ErrorCode::internal);
  const int32_t outside[] = {5};
  EXPECT_ERROR(space.release(outside), ErrorCode::internal);
}

TEST("a space of nothing holds nothing") {
  SwapSpace space(0);
  std::vector<int32_t> slots;
  EXPECT(!space.allocate(1, slots));
  EXPECT(space.allocate(0, slots));
  EXPECT_ERROR(SwapSpace(-1), ErrorCode::internal);
}

TEST("kept blocks give their slots back when they are cleared, moved over or die") {
  SwapSpace space(6);
  {
    SwappedBlocks kept;
    EXPECT(kept.take(space, 2, 5, 19));
    EXPECT_EQ(kept.first_block(), 2);
    EXPECT_EQ(kept.num_tokens(), 19);
    EXPECT_EQ(kept.slot(4), 2);
    EXPECT_ERROR(kept.slot(1), ErrorCode::internal);
    EXPECT_ERROR(kept.take(space, 0, 1, 1), ErrorCode::internal);
    SwappedBlocks full;
    EXPECT(!full.take(space, 0, 4, 9));
    EXPECT(full.empty());
    SwappedBlocks other = std::move(kept);
    EXPECT(kept.empty() && !other.empty());
    EXPECT_EQ(space.num_free(), 3);
    other.clear();
    EXPECT_EQ(space.num_free(), 6);
    EXPECT(other.take(space, 0, 6, 20));
  }
  EXPECT_EQ(space.num_free(), 6);
  space.check_invariants();
}

TEST_MAIN()
