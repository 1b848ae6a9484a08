// The budget of a step against a made-up machine: it settles where steps take what they may.
#include "runtime/step_budget.h"

#include "test.h"

using namespace turbomind;

namespace {

// Decode rows take 5 ms, a prefill token 0.1 ms, a tile 8 ms.
double cost(const StepLoad& load) {
  return 5.0 + 0.1 * load.num_prefill_tokens + 8.0 * load.num_tiles;
}

StepBudget settle(StepBudgeter& budgeter, bool tiles) {
  for (int i = 0; i < 40; ++i) {
    budgeter.observe({4, 0, 0}, cost({4, 0, 0}));
    const StepBudget budget = budgeter.budget(4);
    const StepLoad load{4, budget.tokens, tiles && i % 4 == 0 ? 1 : 0};
    budgeter.observe(load, cost(load));
  }
  return budgeter.budget(4);
}

}  // namespace

TEST("without a goal, or without running streams, a step gets all") {
  StepBudgeter none(0, 512, 4);
  EXPECT_EQ(none.budget(8).tokens, 512);
  EXPECT_EQ(none.budget(8).tiles, 4);
  StepBudgeter goal(20, 512, 4);
  EXPECT_EQ(goal.budget(0).tokens, 512);
  EXPECT(goal.budget(1).tokens < 512);  // careful before it has seen a step
}

TEST("prefill fills what the goal leaves beside the decode rows, with a margin") {
  StepBudgeter budgeter(25, 512, 4);
  const StepBudget budget = settle(budgeter, false);
  const double ms = cost({4, budget.tokens, 0});
  EXPECT(ms <= 25 && ms >= 20);
  EXPECT_NEAR(budgeter.token_ms(), 0.1, 1e-6);
}

TEST("tiles cost tokens, and one always may go") {
  StepBudgeter budgeter(25, 512, 4);
  const StepBudget budget = settle(budgeter, true);
  EXPECT_EQ(budget.tiles, 2);
  EXPECT_NEAR(budget.tile_tokens, 80, 8);  // learned beside tokens, from moving means
  StepBudgeter tight(6, 512, 4);
  EXPECT_EQ(settle(tight, true).tiles, 1);
}

TEST("prefill's share is never 0, and never above the bound") {
  StepBudgeter tight(1, 512, 4);
  EXPECT_EQ(settle(tight, false).tokens, StepBudgeter::kMinTokens);
  StepBudgeter small(1, 3, 1);
  EXPECT_EQ(settle(small, false).tokens, 3);
  StepBudgeter loose(10000, 512, 4);
  EXPECT_EQ(settle(loose, false).tokens, 512);
}

TEST("a slower machine gets smaller steps") {
  StepBudgeter budgeter(25, 512, 4);
  const int before = settle(budgeter, false).tokens;
  for (int i = 0; i < 40; ++i) {
    const int tokens = budgeter.budget(4).tokens;
    budgeter.observe({4, tokens, 0}, 5.0 + 0.4 * tokens);
  }
  EXPECT(budgeter.budget(4).tokens < before / 3);
}

TEST_MAIN()
