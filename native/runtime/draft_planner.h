// Adds drafted tokens to a step of decode rows and learns from what became of them: the scheduler's
// part of speculative decoding. A row then has 1 + k tokens and is sampled at each; the scheduler
// takes the drawn tokens while the drafts before them were right, so that results are those of
// decoding without drafts. K and V of the others are written again later. Pure. Engine thread.
#pragma once

#include "runtime/speculation.h"
#include "runtime/step_plan.h"

namespace turbomind {

class DraftPlanner {
 public:
  explicit DraftPlanner(const SpeculationLimits& limits);

  // Drafts for the rows of `plan` as far as they pay, as the limits allow and as blocks are free
  // without taking any from another sequence. Does nothing to a plan with prefill rows.
  void add_drafts(StepPlan& plan);
  // Whether any of these rows has a guess worth a draft, before it is planned.
  bool has_guess(const StepPlan& plan);
  // A row of the plan was committed: of its `num_drafts`, the first `num_accepted` were right.
  void committed(Sequence& sequence, int num_drafts, int num_accepted);
  // The whole plan was run in `ms`, before it is committed; 0: not measured.
  void ran(const StepPlan& plan, double ms);

  uint64_t num_drafted() const { return num_drafted_; }
  uint64_t num_accepted() const { return num_accepted_; }

 private:
  int wanted(Sequence& sequence, double row_share, int most);

  SpeculationLimits limits_;
  RowCost row_cost_;
  uint64_t num_drafted_ = 0;
  uint64_t num_accepted_ = 0;
};

}  // namespace turbomind
