// Who runs in the next step, and how many tokens each. First come, first served:
//   - decode rows of all running sequences first, then prefill chunks in order of arrival, then
//     sequences from the queue; a step prefills at most max_prefill_token_num tokens, and decode
//     rows come on top of them (at most max_batch_size), so neither can starve the other;
//   - a sequence joins with the blocks of all its tokens. When decoding runs out of blocks, the
//     youngest running sequence gives its own back, returns to the front of the queue and is
//     computed again. The oldest one is never preempted, so every request ends;
//   - prompt + completion never exceeds min(session_len, the pool): max_new_tokens is capped when a
//     request is added, so a lone sequence always fits and ends with `length`.
// Pure logic: knows no model, no device. Engine thread.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/sampling.h"
#include "runtime/block_manager.h"
#include "runtime/draft_planner.h"
#include "runtime/step_plan.h"

namespace turbomind {

struct SchedulerLimits {
  int session_len = 0;              // tokens
  int max_batch_size = 0;           // sequences that hold blocks
  int max_prefill_token_num = 0;    // prefill tokens of a step
  int max_tiles = 1;                // image tiles encoded in a step
  SpeculationLimits speculation{};  // none unless asked for
};

// What a step drew: one result for each sampling row of its plan, in order. A row whose token is -1
// could not be sampled, for the reason in `failure`; it ends with that error, the others go on.
struct StepResults {
  std::span<const SampleResult> rows;  // [R]
  std::optional<Error> failure;
  double ms = 0;  // the step took, planning not counted; 0: not measured
};

enum class Admit : uint8_t { ok, never };

struct [[nodiscard]] Admission {
  Admit admit = Admit::ok;
  ErrorCode code = ErrorCode::internal;  // Admit::never only
  std::string reason;
};

class Scheduler {
 public:
  Scheduler(const SchedulerLimits& limits, BlockManager& blocks);

  // Queues a validated request; `never` if it could not run even alone.
  Admission add(Request request, Clock::time_point submitted = Clock::now());
  // `never` for a prompt that could not run even alone.
  Admission fits(int num_prompt_tokens) const;

  const StepPlan& plan();
  // The plan to commit next.
  const StepPlan& current() const { return plan_; }
  // The step after the current one, before that is committed: one more token of each row, fed by
  // what the current step draws. A row that turns out to have ended is dropped when it is
  // committed. Null where only a plan can tell: rows that prefill or have drafts worth running,
  // rows that need the host between two tokens, too few free blocks, or others that may join.
  const StepPlan* plan_ahead();
  // Appends the drawn tokens and ends what is finished: its blocks are free again. Ends the plan;
  // the one made ahead, if any, is then the current one.
  std::vector<Event> commit(const StepPlan& plan, const StepResults& results);

  // A running or waiting one, or null.
  Sequence* find(RequestId id);
  // The token of a parked sequence, drawn outside of a plan; see commit.
  Event commit_parked(Sequence& sequence, const SampleResult& result,
                      const std::optional<Error>& failure);

  // Each ends sequences early: their blocks are free when it returns.
  std::optional<Event> abort(RequestId id);
  std::vector<Event> abort_all();
  std::vector<Event> fail_planned(const Error& error);  // the sequences of the current plan
  std::vector<Event> fail_all(const Error& error);

  const SchedulerLimits& limits() const { return limits_; }
  bool has(RequestId id) const;
  bool idle() const { return running_.empty() && waiting_.empty(); }
  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  uint64_t num_preemptions() const { return num_preemptions_; }
  uint64_t num_prompt_tokens() const { return num_prompt_tokens_; }
  uint64_t num_completion_tokens() const { return num_completion_tokens_; }
  const DraftPlanner& drafts() const { return drafts_; }
  // Throws unless queue order, limits and block tables are consistent. Linear in everything.
  void check_invariants() const;

 private:
  using Owner = std::unique_ptr<Sequence>;

  bool plan_decode();  // false if a sequence was preempted
  void plan_prefill(StepBudget& budget);
  void admit_waiting(StepBudget& budget);
  void preempt_youngest();
  int growing_sequences() const;
  void forget(const Sequence& sequence);  // it ends; a step on the device may still hold its row
  void forget_plans();
  int max_sequence_tokens() const;
  void drop_finished();
  Event commit_row(Sequence& sequence, std::span<const SampleResult> results,
                   const std::optional<Error>& failure, Clock::time_point now);
  static Event final_event(const Sequence& sequence, FinishReason reason);
  static Event error_event(const Sequence& sequence, const Error& error);

  SchedulerLimits limits_;
  BlockManager& blocks_;
  std::deque<Owner> waiting_;   // in order of arrival, all younger than the running ones
  std::vector<Owner> running_;  // in order of arrival; these hold blocks
  StepPlan plan_;
  StepPlan ahead_;
  bool may_join_ = false;  // something came or went since the last plan()
  int steps_ahead_ = 0;    // since then
  DraftPlanner drafts_;
  uint64_t num_preemptions_ = 0;
  uint64_t num_prompt_tokens_ = 0;
  uint64_t num_completion_tokens_ = 0;
};

}  // namespace turbomind
