// Who runs in the next step, and how many tokens each.
//   - All requests have one order (Rank): first come, first served, with each level of priority
//     worth kPriorityStep of waiting. Decode rows of all running sequences come first, then prefill
//     in that order, of running sequences and of those that wait; a step prefills at most its token
//     budget, and decode rows come on top of it, so neither can starve the other.
//   - What a sequence shares with earlier ones is found, not computed (prefix_sharing.h). One that
//     lacks just what another computes in this step waits for the next step.
//   - A sequence joins with the blocks of all its tokens. When decoding runs out of blocks, the last
//     running sequence in the order gives its own back and returns to the queue. What it has computed
//     is kept in host memory where copying there and back is cheaper than computing, else computed
//     again. The first one is never preempted, so every request ends. A waiting request may take the
//     place of running ones of lower priority that come after it.
//   - prompt + completion never exceeds min(session_len, the pool): max_new_tokens is capped when a
//     request is added, so a lone sequence always fits and ends with `length`.
// Pure logic: knows no model, no device. Engine thread.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/sampling.h"
#include "runtime/block_manager.h"
#include "runtime/draft_planner.h"
#include "runtime/prefix_sharing.h"
#include "runtime/step_budget.h"
#include "runtime/step_plan.h"

namespace turbomind {

// Host memory that preempted sequences may keep their blocks in.
struct SwapLimits {
  int num_blocks = 0;   // 0: none, all is computed again
  double block_ms = 0;  // to copy one block, either way
};

struct SchedulerLimits {
  int session_len = 0;            // tokens
  int max_batch_size = 0;         // sequences that hold blocks
  int max_prefill_token_num = 0;  // prefill tokens of a step
  int max_tiles = 1;              // image tiles encoded in a step
  int max_held_tiles = 0;         // whose embeddings exist at a time; 0: 4 * max_tiles
  int max_queue_size = 0;         // requests that wait for their first step; 0: no limit
  double max_inter_token_ms = 0;  // goal for steps of running streams; 0: none
  bool enable_prefix_caching = true;
  SpeculationLimits speculation{};  // none unless asked for
  SwapLimits swap{};
};

// What a step drew: one result for each sampled token of its plan, in order. A row whose token is -1
// could not be sampled, for the reason in `failure`; it ends with that error, the others go on.
struct StepResults {
  std::span<const SampleResult> rows;  // [R]
  std::optional<Error> failure;
  double ms = 0;  // the step took, planning not counted; 0: not measured
};

enum class Admit : uint8_t { ok, never, refused };  // refused: not now

struct [[nodiscard]] Admission {
  Admit admit = Admit::ok;
  ErrorCode code = ErrorCode::internal;  // unless ok
  std::string reason;
};

struct SchedulerCounters {
  uint64_t preemptions = 0;
  uint64_t swaps_out = 0;      // of these, by saving blocks to host memory
  uint64_t swaps_in = 0;       // of these, that have joined again by loading them
  uint64_t prompt_tokens = 0;  // computed, preempted work counted again
  uint64_t completion_tokens = 0;
  uint64_t prefix_queries = 0;  // prompt tokens of the requests that began
  uint64_t prefix_hits = 0;     // of these, tokens that were found
};

class Scheduler {
 public:
  // How much longer a request of the next priority may have waited, to come at the same time. So a
  // request is overtaken only by those submitted less than (their priority - its own) *
  // kPriorityStep after it.
  static constexpr std::chrono::seconds kPriorityStep{10};

  Scheduler(const SchedulerLimits& limits, BlockManager& blocks);

  // Queues a validated request; `never` if it could not run even alone, `refused` if the
  // queue is full.
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

  // Of a sequence that runs apart from the plans: where its tiles are encoded, and how many may be.
  void open_images(Sequence& sequence);
  void limit_held_tiles(StepBudget& budget);

  // A running or waiting one, or null.
  Sequence* find(RequestId id);
  // The token of a parked sequence, drawn outside of a plan; see commit.
  Event commit_parked(Sequence& sequence, const SampleResult& result,
                      const std::optional<Error>& failure);

  // Each ends sequences early: their blocks are free when it returns.
  std::optional<Event> abort(RequestId id);
  std::optional<Event> fail(RequestId id, const Error& error);
  std::vector<Event> abort_all();
  std::vector<Event> fail_planned(const Error& error);  // the sequences of the current plan
  std::vector<Event> fail_all(const Error& error);
  std::vector<Event> expire(Clock::time_point now);  // those that waited too long for their start

  const SchedulerLimits& limits() const { return limits_; }
  bool has(RequestId id) const;
  bool idle() const { return running_.empty() && waiting_.empty(); }
  int num_running() const { return static_cast<int>(running_.size()); }
  int num_waiting() const { return static_cast<int>(waiting_.size()); }
  const SchedulerCounters& counters() const { return counters_; }
  const DraftPlanner& drafts() const { return drafts_; }
  const SwapSpace& swap_space() const { return swap_space_; }
  // Throws unless queue order, limits and block tables are consistent. Linear in everything.
  void check_invariants() const;

 private:
  using Owner = std::unique_ptr<Sequence>;
  enum class Joined : uint8_t { yes, later, full };

  void release_copied();
  void make_way();
  bool plan_decode();  // false if a sequence was preempted
  void plan_prefill(StepBudget& budget, bool admit);
  void continue_prefill(Sequence& sequence, StepBudget& budget);
  Joined try_join(size_t waiting_idx, StepBudget& budget);
  bool has_room(const Sequence& sequence, const PrefixMatch& match, int extra = 0) const;
  void take_blocks(Sequence& sequence, const PrefixMatch& match);
  void hold_tail(const PrefixMatch& match);
  void copy_tail(Sequence& sequence, const PrefixMatch& match);
  void skip(Sequence& sequence, int num_tokens);
  void add_row(Sequence& sequence, StepBudget& budget);
  void drop_tiles();
  void preempt_last();
  bool swap_out(Sequence& sequence);
  bool swap_pays(const Sequence& sequence, int first_block, int num_blocks) const;
  bool can_swap_in(const Sequence& sequence, const PrefixMatch& match) const;
  void swap_in(Sequence& sequence);
  static void insert_by_rank(std::vector<Owner>& owners, Owner owner);
  void count_vision_time();
  void publish(Sequence& sequence, bool prompt_ended);
  void observe_step(Clock::time_point now);
  int growing_sequences() const;
  void forget(const Sequence& sequence);  // it ends; a step on the device may still hold its row
  void remove(const Sequence& sequence);
  void forget_plans();
  int max_sequence_tokens() const;
  void drop_finished();
  Event commit_row(Sequence& sequence, std::span<const SampleResult> results,
                   const std::optional<Error>& failure, Clock::time_point now);
  static Event final_event(const Sequence& sequence, FinishReason reason);
  static Event error_event(const Sequence& sequence, const Error& error);

  SchedulerLimits limits_;
  BlockManager& blocks_;
  SwapSpace swap_space_;  // outlives what lies in it
  PrefixSharing sharing_;
  StepBudgeter budgeter_;
  ImageStore images_;
  std::vector<Owner> waiting_;  // in order of rank
  std::vector<Owner> running_;  // in order of rank; these hold blocks
  StepPlan plan_;
  StepPlan ahead_;
  bool may_join_ = false;  // something came or went since the last plan()
  int steps_ahead_ = 0;    // since then
  DraftPlanner drafts_;
  std::vector<Sequence*> prefilling_;       // while a step is planned
  std::vector<const Sequence*> computing_;  // those with a prefill row in the plan
  std::vector<BlockId> copied_;             // sources of the plan's copies, held until it ends
  std::vector<Sequence*> saved_;            // whose blocks the plan saves
  uint64_t num_added_ = 0;
  Clock::time_point planned_at_;
  Clock::time_point committed_at_;
  SchedulerCounters counters_;
};

}  // namespace turbomind
