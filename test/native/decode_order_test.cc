// The order in which the CTAs of a CUDA decode step compute the parts of sequences and heads: every part by
// one CTA, none before those that are folded before it, and of one time first by the CTA that folds them.
#include "backend/cuda/decode_order.h"

#include <random>
#include <vector>

#include "test.h"

namespace {

using namespace turbomind::cuda::decode;

// Walks a step as the CTAs do. chains: parts of each.
void check(const std::vector<int>& chains, int ctas) {
  std::vector<int> begins;
  int units = 0;
  for (int parts : chains) {
    begins.push_back(units);
    units += parts;
  }
  struct Done {
    int cta = -1, time = 0;
  };
  std::vector<Done> done(static_cast<size_t>(units));
  for (int cta = 0; cta < ctas; ++cta) {
    const int begin = run_begin(units, ctas, cta);
    const int end = run_begin(units, ctas, cta + 1);
    auto chain = static_cast<int>(chains.size()) - 1;
    for (int left = end; left > begin;) {
      while (begins[static_cast<size_t>(chain)] >= left) --chain;
      const int head = begins[static_cast<size_t>(chain)];
      const int parts = chains[static_cast<size_t>(chain)];
      EXPECT_EQ(cta_of(units, ctas, left - 1), cta);
      const PartOrder order = part_order(units, ctas, cta, head, parts);
      const int count = left - std::max(head, begin);
      for (int i = 0; i < count; ++i) {
        const int part = order.part(end - left + i);
        EXPECT(part >= 0 && part < parts);
        if (part < 0 || part >= parts) return;
        Done& unit = done[static_cast<size_t>(head + part)];
        EXPECT_EQ(unit.cta, -1);
        unit = {cta, end - left + i};
      }
      left -= count;
    }
  }
  for (size_t c = 0; c < chains.size(); ++c) {
    const int last = cta_of(units, ctas, begins[c] + chains[c] - 1);
    const int last_begin = run_begin(units, ctas, last + 1) - begins[c] - chains[c];
    const PartOrder order = part_order(units, ctas, last, begins[c], chains[c]);
    const auto folder = [&](const Done& unit) { return unit.time < last_begin ? last - 1 : last; };
    for (int part = 0; part < chains[c]; ++part) {
      const Done& unit = done[static_cast<size_t>(begins[c] + part)];
      EXPECT(unit.cta >= 0 && unit.cta <= last);
      if (cta_of(units, ctas, begins[c]) == last) continue;
      EXPECT_EQ(part < order.early_parts(), unit.time < last_begin);
      if (part == 0) {
        EXPECT_EQ(unit.cta, folder(unit));
        continue;
      }
      const Done& before = done[static_cast<size_t>(begins[c] + part - 1)];
      const bool leads = before.cta == folder(before);
      EXPECT(before.time < unit.time ||
             (before.time == unit.time && (leads || before.cta < unit.cta)));
      EXPECT(before.time < unit.time || unit.cta != folder(unit));
    }
  }
}

TEST("every part is computed once, in the order of time") {
  std::mt19937 random(1);
  const auto draw = [&](int most) {
    return static_cast<int>(random() % static_cast<uint32_t>(most)) + 1;
  };
  for (int i = 0; i < 600; ++i) {
    const int longest = i % 3 == 0 ? 4 : i % 3 == 1 ? 40 : 600;
    std::vector<int> chains(static_cast<size_t>(draw(20)));
    for (int& parts : chains) parts = draw(longest);
    check(chains, draw(i % 2 == 0 ? 12 : 400));
  }
}

TEST("equal sequences of 8k keys, a GPU's CTAs") {
  for (const int ctas : {264, 396}) check(std::vector<int>(128, 32), ctas);
}

}  // namespace

TEST_MAIN()
