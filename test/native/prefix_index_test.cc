// The index of computed blocks: what is found, what only looks alike, and which block is given up
// first.
#include "runtime/prefix_index.h"

#include "runtime/block_manager.h"
#include "test.h"

using namespace turbomind;

namespace {

constexpr int kBlockSize = 8;

std::vector<TokenId> ids(TokenId first, int count) {
  std::vector<TokenId> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(first + i);
  return tokens;
}

BlockContent text(const std::vector<TokenId>& tokens) { return {tokens, {}}; }

}  // namespace

TEST("a full block is found by its tokens and the chain before it, and by nothing less") {
  PrefixIndex index(8, kBlockSize);
  const std::vector<TokenId> first = ids(0, 8), second = ids(100, 8);
  index.insert(3, -1, text(first));
  index.insert(5, 3, text(second));
  EXPECT_EQ(index.find(kEmptyPrefix, text(first)), 3);
  EXPECT_EQ(index.find(index.prefix_of(3), text(second)), 5);
  EXPECT_EQ(index.find(kEmptyPrefix, text(second)), -1);
  EXPECT_EQ(index.find(index.prefix_of(5), text(first)), -1);
  std::vector<TokenId> other = first;
  other[7] = 9;
  EXPECT_EQ(index.find(kEmptyPrefix, text(other)), -1);
}

TEST("a chain's name is never used again") {
  PrefixIndex index(8, kBlockSize);
  const std::vector<TokenId> first = ids(0, 8), second = ids(100, 8);
  index.insert(3, -1, text(first));
  const PrefixId old = index.prefix_of(3);
  index.erase(3);
  EXPECT_EQ(index.find(kEmptyPrefix, text(first)), -1);
  index.insert(3, -1, text(ids(50, 8)));
  index.insert(4, 3, text(second));
  EXPECT_EQ(index.find(old, text(second)), -1);
}

TEST("image tokens differ by their picture and by their place in it") {
  const std::vector<TokenId> tokens(kBlockSize, 49);
  const ImageSpan a[] = {{0, 8, 16, {1, 2}}};
  const ImageSpan other_picture[] = {{0, 8, 16, {1, 3}}};
  const ImageSpan other_place[] = {{0, 8, 24, {1, 2}}};
  PrefixIndex index(8, kBlockSize);
  index.insert(0, -1, {tokens, a});
  EXPECT_EQ(index.find(kEmptyPrefix, {tokens, a}), 0);
  EXPECT_EQ(index.find(kEmptyPrefix, {tokens, other_picture}), -1);
  EXPECT_EQ(index.find(kEmptyPrefix, {tokens, other_place}), -1);
  EXPECT_EQ(index.find(kEmptyPrefix, text(tokens)), -1);
}

TEST("common tokens end where a picture differs, ends or begins") {
  const std::vector<TokenId> tokens = {1, 2, 49, 49, 49, 49, 3, 4};
  const ImageSpan a[] = {{2, 2, 0, {1, 1}}, {4, 2, 0, {2, 2}}};
  const ImageSpan b[] = {{2, 2, 0, {1, 1}}, {4, 2, 0, {3, 3}}};
  const ImageSpan c[] = {{2, 4, 0, {1, 1}}};
  EXPECT_EQ(common_tokens({tokens, a}, {tokens, a}), 8);
  EXPECT_EQ(common_tokens({tokens, a}, {tokens, b}), 4);
  EXPECT_EQ(common_tokens({tokens, a}, {tokens, c}), 4);
  EXPECT_EQ(common_tokens(text(ids(0, 5)), text(ids(0, 8))), 5);
}

TEST("the longest beginning is found among full and partial blocks") {
  PrefixIndex index(8, kBlockSize);
  index.insert(0, -1, text(ids(0, 3)));
  index.insert(1, -1, text({0, 1, 2, 3, 4, 99}));
  index.insert(2, -1, text({0, 1, 2, 3, 4, 5, 98, 97}));
  const PrefixIndex::Partial found = index.longest(kEmptyPrefix, text(ids(0, 7)));
  EXPECT_EQ(found.block, 2);
  EXPECT_EQ(found.num_tokens, 6);
  index.erase(2);
  EXPECT_EQ(index.longest(kEmptyPrefix, text(ids(0, 7))).block, 1);
  EXPECT_EQ(index.longest(kEmptyPrefix, text(ids(7, 8))).block, -1);
}

TEST("blocks that nobody holds can be found until they are needed, the ends of chains first") {
  BlockManager blocks(4, kBlockSize);
  std::vector<BlockId> held;
  EXPECT(blocks.allocate(3, held));
  blocks.publish(held[0], -1, text(ids(0, 8)));
  blocks.publish(held[1], held[0], text(ids(8, 8)));
  blocks.publish(held[2], held[1], text(ids(16, 4)));
  blocks.release(held);
  EXPECT_EQ(blocks.num_free(), 4);
  EXPECT_EQ(blocks.num_cached(), 3);
  blocks.check_invariants();
  std::vector<BlockId> taken;
  EXPECT(blocks.allocate(2, taken));  // the untouched one, then the end of the chain
  EXPECT(!blocks.index().contains(held[2]));
  EXPECT(blocks.index().contains(held[0]) && blocks.index().contains(held[1]));
  blocks.share({held.data(), 2});
  EXPECT_EQ(blocks.num_free(), 0);
  EXPECT(!blocks.allocate(1, taken));
  blocks.release({held.data(), 2});
  EXPECT(blocks.allocate(2, taken));
  EXPECT_EQ(blocks.num_cached(), 0);
  blocks.check_invariants();
}

TEST_MAIN()
