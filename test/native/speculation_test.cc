// The controller of speculative decoding: what it measures, what it decides, and that its decisions
// pay on simulated devices.
#include "runtime/speculation.h"

#include <random>

#include "test.h"

using namespace turbomind;

namespace {

constexpr SpeculationLimits kLimits{.max_drafts = 7, .max_rows = 32};

// A device whose decode step takes fixed_ms + row_ms * rows, and a text whose guesses are right
// with one probability. Answers milliseconds a token, relative to decoding without drafts.
double relative_time(double fixed_ms, double row_ms, double right, int num_sequences) {
  std::mt19937 random(5);
  std::uniform_real_distribution<double> uniform(0, 1);
  RowCost cost;
  std::vector<Acceptance> acceptances(static_cast<size_t>(num_sequences));
  double total_ms = 0;
  int64_t tokens = 0;
  for (int step = 0; step < 4000; ++step) {
    int drafts = 0;
    for (Acceptance& acceptance : acceptances) {
      const int wanted = drafts_that_pay(acceptance.share(3), cost.share(num_sequences),
                                         std::min(kLimits.max_drafts, kLimits.max_rows - drafts));
      const int ran = cost.wants_plain_step(num_sequences) ? 0 : wanted;
      const int compared = std::max(ran, 1);
      int accepted = 0;
      while (accepted < compared && uniform(random) < right) ++accepted;
      acceptance.observe(3, std::min(accepted + 1, compared), accepted);
      tokens += 1 + std::min(accepted, ran);
      drafts += ran;
    }
    const double noise = uniform(random) < 0.02 ? 3.0 : 0.95 + 0.1 * uniform(random);
    const double ms = (fixed_ms + row_ms * (num_sequences + drafts)) * noise;
    cost.observe(num_sequences, drafts, ms);
    total_ms += ms / noise;
  }
  const double plain_ms = (fixed_ms + row_ms * num_sequences) / num_sequences;
  return total_ms / static_cast<double>(tokens) / plain_ms;
}

}  // namespace

TEST("drafts are run as deep as their probability exceeds their price") {
  EXPECT_EQ(drafts_that_pay(0.9, 0.05, 7), 7);
  EXPECT_EQ(drafts_that_pay(0.9, 0.5, 7), 6);  // 0.9^6 = 0.53
  EXPECT_EQ(drafts_that_pay(0.5, 0.2, 7), 2);
  EXPECT_EQ(drafts_that_pay(0.5, 0.5, 7), 0);
  EXPECT_EQ(drafts_that_pay(0.999, 1.0, 7), 0);
  EXPECT_EQ(drafts_that_pay(0.9, 0.05, 3), 3);
  EXPECT_EQ(drafts_that_pay(0.9, 0.05, 0), 0);
}

TEST("acceptance follows what was compared, each match length apart") {
  Acceptance acceptance;
  const double before = acceptance.share(2);
  for (int i = 0; i < 40; ++i) acceptance.observe(4, 1, 0);
  EXPECT(acceptance.share(4) < 0.01);
  EXPECT_EQ(acceptance.share(2), before);
  for (int i = 0; i < 10; ++i) acceptance.observe(4, 4, 4);
  EXPECT(acceptance.share(4) > 0.95);
  acceptance.observe(4, 3, 2);
  EXPECT(acceptance.share(4) < 0.95);
}

TEST("a row's price is what steps with drafts took beyond those without") {
  RowCost cost;
  EXPECT(cost.wants_plain_step(1));
  for (int i = 0; i < 60; ++i) {
    cost.observe(1, 0, 10.0);
    cost.observe(1, 4, 14.0);
    cost.observe(16, 0, 12.0);
    cost.observe(16, 16, 24.0);
  }
  EXPECT(!cost.wants_plain_step(1));
  EXPECT_NEAR(cost.share(1), 1.1 * 0.1, 0.01);
  EXPECT_NEAR(cost.share(16), 1.1 * 1.0, 0.02);  // a row there costs a token's time
  EXPECT_NEAR(cost.share(2), 1.1 * 0.25, 1e-9);  // not seen: the guess
  EXPECT_NEAR(cost.share(13), cost.share(16), 1e-9);
  cost.observe(1, 0, -1.0);  // a clock that did not move
  EXPECT_NEAR(cost.share(1), 1.1 * 0.1, 0.01);
}

TEST("a step without drafts is asked for now and then, and a high price is tried again") {
  RowCost cost;
  cost.observe(1, 0, 10.0);
  int plain = 0;
  for (int i = 0; i < 1000; ++i) {
    const bool wants = cost.wants_plain_step(1);
    cost.observe(1, wants ? 0 : 3, 10.0);
    plain += wants ? 1 : 0;
  }
  EXPECT(plain >= 15 && plain <= 30);
  EXPECT_NEAR(cost.share(1), 0.05, 1e-9);
  for (int i = 0; i < 100; ++i) cost.observe(1, 3, 40.0);
  EXPECT(cost.share(1) > 0.9);
  for (int i = 0; i < 1024; ++i) cost.observe(1, 0, 10.0);
  EXPECT(cost.share(1) < 0.5);
}

TEST("drafts save time where rows are free, and cost next to nothing where they are not") {
  EXPECT(relative_time(10, 0.1, 0.9, 1) < 0.30);  // memory-bound, repetitive text
  EXPECT(relative_time(10, 0.1, 0.5, 1) < 0.70);
  EXPECT(relative_time(10, 0.1, 0.02, 1) < 1.02);  // nothing is ever right
  EXPECT(relative_time(10, 0.1, 0.8, 4) < 0.45);
  EXPECT(relative_time(0.1, 10, 0.9, 1) < 1.06);  // compute-bound
  EXPECT(relative_time(5, 5, 0.9, 1) < 0.95);     // half and half
  EXPECT(relative_time(2, 1, 0.7, 32) < 1.05);
}

TEST("a drafter guesses what followed before, and learns from what was drawn") {
  Drafter drafter(100);
  std::vector<TokenId> tokens = {1, 2, 3, 4, 5, 1, 2};
  drafter.look_up(tokens);
  EXPECT_EQ(drafter.num_worthwhile(kLimits, 0.05, 7), 3);  // 0.4^3 > 0.05
  EXPECT_EQ(drafter.num_worthwhile(kLimits, 0.05, 2), 2);
  EXPECT_EQ(drafter.num_worthwhile(kLimits, 0.05, 0), 0);
  EXPECT_EQ(drafter.num_worthwhile(kLimits, 0.45, 7), 0);
  SpeculationLimits always = kLimits;
  always.measured = false;
  EXPECT_EQ(drafter.num_worthwhile(always, 9.0, 7), 7);
  always.max_drafts = 2;
  EXPECT_EQ(drafter.num_worthwhile(always, 9.0, 7), 2);
  std::vector<TokenId> drafts(3);
  drafter.guess(tokens, drafts);
  EXPECT(drafts == std::vector<TokenId>({3, 4, 5}));
  const double before = drafter.acceptance().share(2);
  tokens.insert(tokens.end(), {3, 4, 9});
  drafter.judge(tokens, 3);  // two right, one wrong
  const double after = drafter.acceptance().share(2);
  EXPECT(after > before);
  drafter.look_up(tokens);
  EXPECT_EQ(drafter.num_worthwhile(always, 0.05, 7), 0);  // 9 is new
  tokens.push_back(1);
  drafter.judge(tokens, 0);
  EXPECT_EQ(drafter.acceptance().share(2), after);
}

TEST("guesses are judged while none runs, by their first token") {
  Drafter drafter(100);
  std::vector<TokenId> tokens = {1, 2, 3, 1, 2, 3, 1};
  double before = drafter.acceptance().share(4);
  for (int i = 0; i < 20; ++i) {
    drafter.look_up(tokens);
    tokens.push_back(tokens[tokens.size() - 3]);
    drafter.judge(tokens, 0);
  }
  EXPECT(drafter.acceptance().share(4) > before);
  EXPECT(drafter.acceptance().share(4) > 0.9);
}

TEST_MAIN()
