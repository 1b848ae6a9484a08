#include "runtime/step_budget.h"

#include <algorithm>
#include <cmath>

namespace turbomind {
namespace {

constexpr double kNewest = 0.25;    // share of the newest step in a mean
constexpr double kGoalShare = 0.9;  // of the goal; steps vary
constexpr int kFirstTokens = 64;    // before the first step with prefill was seen
constexpr double kSmallest = 1e-6;  // ms; a cost of nothing would allow anything

void update(double& mean, double value) {
  value = std::max(value, kSmallest);
  mean = mean == 0 ? value : mean + kNewest * (value - mean);
}

// value / cost, in [low, high].
int affordable(double value, double cost, int low, int high) {
  const double count = std::floor(value / cost);
  if (!(count > low)) return low;
  return count < high ? static_cast<int>(count) : high;
}

}  // namespace

StepBudgeter::StepBudgeter(double goal_ms, int max_tokens, int max_tiles)
    : goal_ms_(goal_ms), max_tokens_(max_tokens), max_tiles_(max_tiles) {}

StepBudget StepBudgeter::budget(int num_decode) const {
  if (goal_ms_ <= 0 || num_decode == 0) return {max_tokens_, max_tiles_, 0};
  if (token_ms_ == 0) return {std::min(max_tokens_, kFirstTokens), 1, 0};
  const double left = kGoalShare * goal_ms_ - decode_ms_;
  StepBudget budget;
  budget.tokens = affordable(left, token_ms_, std::min(max_tokens_, kMinTokens), max_tokens_);
  budget.tiles = tile_ms_ == 0 ? 1 : affordable(left, tile_ms_, 1, max_tiles_);
  budget.tile_tokens = affordable(tile_ms_, token_ms_, 0, max_tokens_);
  return budget;
}

void StepBudgeter::observe(const StepLoad& load, double ms) {
  if (load.num_prefill_tokens == 0 && load.num_tiles == 0) {
    if (load.num_decode > 0) update(decode_ms_, ms);
    return;
  }
  const double more = ms - (load.num_decode > 0 ? decode_ms_ : 0.0);
  // Tokens and tiles of one step cannot be told apart: each is learned with the other known.
  if (load.num_tiles == 0) {
    update(token_ms_, more / load.num_prefill_tokens);
  } else {
    update(tile_ms_, (more - load.num_prefill_tokens * token_ms_) / load.num_tiles);
  }
}

}  // namespace turbomind
