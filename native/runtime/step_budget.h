// How much prefill a step may carry so that running streams keep their inter-token latency: learns
// what steps cost and shares out what the goal leaves beside the decode rows. A goal, not a promise:
// prefill always gets some of every step. Pure arithmetic; the scheduler measures. Engine thread.
#pragma once

#include "runtime/step_plan.h"

namespace turbomind {

struct StepLoad {
  int num_decode = 0;
  int num_prefill_tokens = 0;
  int num_tiles = 0;  // encoded
};

class StepBudgeter {
 public:
  // goal_ms: of a step with decode rows; 0: none, every step gets all.
  StepBudgeter(double goal_ms, int max_tokens, int max_tiles);

  StepBudget budget(int num_decode) const;
  void observe(const StepLoad& load, double ms);
  // Mean cost of a prefill token, ms; 0: not seen yet.
  double token_ms() const { return token_ms_; }

  // The same of an encoded tile.
  double tile_ms() const { return tile_ms_; }

  // Tokens of prefill beside decode rows, however tight the goal.
  static constexpr int kMinTokens = 16;

 private:
  double goal_ms_;
  int max_tokens_;
  int max_tiles_;
  // Moving means; 0: not seen yet.
  double decode_ms_ = 0;  // a step of decode rows alone
  double token_ms_ = 0;   // a prefill token more
  double tile_ms_ = 0;    // an encoded tile more
};

}  // namespace turbomind
