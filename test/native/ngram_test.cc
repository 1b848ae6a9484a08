// The n-gram index against a search through the whole text.
#include "runtime/ngram.h"

#include <random>

#include "test.h"

using namespace turbomind;

namespace {

// The latest earlier occurrence of the last `length` tokens, longest first.
NgramMatch search(const std::vector<TokenId>& tokens) {
  const auto size = static_cast<int>(tokens.size());
  for (int length = std::min(NgramIndex::kLongest, size); length >= NgramIndex::kShortest;
       --length) {
    for (int next = size - 1; next >= length; --next) {
      if (std::equal(tokens.end() - length, tokens.end(), tokens.begin() + next - length)) {
        return {length, next};
      }
    }
  }
  return {};
}

std::vector<TokenId> drafts_of(const std::vector<TokenId>& tokens, const NgramMatch& match,
                               size_t count) {
  std::vector<TokenId> drafts(count);
  continue_match(tokens, match, drafts);
  return drafts;
}

}  // namespace

TEST("the longest match wins, then the latest; without one there is none") {
  NgramIndex index(100);
  const std::vector<TokenId> tokens = {1, 2, 3, 4, 9, 2, 3, 4, 8, 7, 3, 4, 5, 1, 2, 3, 4};
  index.extend(std::span(tokens).first(5));
  EXPECT_EQ(index.find(std::span(tokens).first(5)).length, 0);
  index.extend(tokens);
  const NgramMatch match = index.find(tokens);
  EXPECT_EQ(match.length, 4);
  EXPECT_EQ(match.next, 4);
  EXPECT(drafts_of(tokens, match, 3) == std::vector<TokenId>({9, 2, 3}));
  const std::vector<TokenId> changed = {1, 2, 3, 4, 9, 2, 3, 4, 8, 7, 3, 4, 5, 6, 3, 4};
  NgramIndex other(100);
  other.extend(changed);
  EXPECT_EQ(other.find(changed).length, 2);
  EXPECT_EQ(other.find(changed).next, 12);
}

TEST("a loop is continued past the end of the text, whatever its period") {
  for (int period = 1; period <= 5; ++period) {
    std::vector<TokenId> tokens = {50, 51};
    for (int i = 0; i < 3 * period + 4; ++i) tokens.push_back(i % period);
    NgramIndex index(100);
    index.extend(tokens);
    const NgramMatch match = index.find(tokens);
    EXPECT_EQ(match.length, 4);
    const std::vector<TokenId> drafts = drafts_of(tokens, match, 12);
    for (int i = 0; i < 12; ++i) {
      EXPECT_EQ(drafts[static_cast<size_t>(i)], (3 * period + 4 + i) % period);
    }
  }
}

TEST("random texts: every match is one, and almost always the one a search finds") {
  std::mt19937 random(11);
  int lookups = 0, equal = 0, found = 0;
  for (int text = 0; text < 60; ++text) {
    const auto alphabet = 2 + random() % 30;
    NgramIndex index(400);
    std::vector<TokenId> tokens;
    while (tokens.size() < 400) {
      // Text that was there before comes again now and then; it arrives in pieces.
      for (auto i = 1 + random() % 12; i > 0; --i) {
        tokens.push_back(static_cast<TokenId>(random() % alphabet) - 1);
      }
      if (random() % 3 == 0) {
        const size_t from = random() % tokens.size();
        const size_t count = std::min<size_t>(random() % 20, tokens.size() - from);
        for (size_t i = 0; i < count; ++i) tokens.push_back(tokens[from + i]);
      }
      index.extend(tokens);
      const NgramMatch got = index.find(tokens);
      const NgramMatch expected = search(tokens);
      ++lookups;
      equal += got.length == expected.length && got.next == expected.next ? 1 : 0;
      EXPECT(got.length <= expected.length);
      if (got.length == 0) continue;
      ++found;
      EXPECT(got.next >= got.length && got.next < static_cast<int>(tokens.size()));
      EXPECT(std::equal(tokens.end() - got.length, tokens.end(),
                        tokens.begin() + got.next - got.length));
    }
  }
  EXPECT(found > lookups / 2);
  EXPECT(equal > lookups * 9 / 10);  // entries are shared by n-grams of one hash
}

TEST("memory is bounded, and a text beyond it is still matched where it is recent") {
  EXPECT_EQ(NgramIndex(1 << 20).bytes(), size_t{3} * (1 << 15) * 4);
  EXPECT(NgramIndex(100).bytes() <= 3 * 256 * 4);
  NgramIndex index(1 << 20);
  std::mt19937 random(3);
  std::vector<TokenId> tokens;
  for (int i = 0; i < 100000; ++i) tokens.push_back(static_cast<TokenId>(random() % 50000));
  for (int i = 0; i < 4; ++i) tokens.push_back(tokens[99990 + static_cast<size_t>(i)]);
  index.extend(tokens);
  EXPECT_EQ(index.find(tokens).length, 4);
  EXPECT_EQ(index.find(tokens).next, 99994);
}

TEST("texts of no, one and two tokens have no match") {
  for (size_t size = 0; size < 3; ++size) {
    NgramIndex index(10);
    const std::vector<TokenId> tokens(size, 7);
    index.extend(tokens);
    EXPECT_EQ(index.find(tokens).length, 0);
  }
}

TEST_MAIN()
