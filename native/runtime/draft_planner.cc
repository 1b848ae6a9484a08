#include "runtime/draft_planner.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace turbomind {
namespace {

// Tokens of `guess` before the first image token: what stands for an image is not text.
size_t text_length(const Sequence& sequence, std::span<const TokenId> guess) {
  if (sequence.images().empty()) return guess.size();
  const TokenId image =
      sequence.tokens()[static_cast<size_t>(sequence.images().front().token_offset)];
  return static_cast<size_t>(std::find(guess.begin(), guess.end(), image) - guess.begin());
}

}  // namespace

DraftPlanner::DraftPlanner(const SpeculationLimits& limits) : limits_(limits) {
  TM_CHECK(limits.max_drafts >= 0 && limits.max_drafts <= kMaxDrafts && limits.max_rows >= 0,
           "%d drafts a sequence, %d a step", limits.max_drafts, limits.max_rows);
}

// Drafts that `sequence` should try, at most `most`.
int DraftPlanner::wanted(Sequence& sequence, double row_share, int most) {
  if (sequence.request().step_by_step()) return 0;
  sequence.drafter().look_up(sequence.tokens());
  // The last token of a completion is drawn behind its last draft at the latest.
  const int room = sequence.max_new_tokens() - sequence.num_completion_tokens() - 1;
  return sequence.drafter().num_worthwhile(limits_, row_share, std::min(most, room));
}

void DraftPlanner::add_drafts(StepPlan& plan) {
  if (limits_.max_drafts == 0 || plan.num_prefill_tokens > 0 || plan.empty()) return;
  const auto num_sequences = static_cast<int>(plan.rows.size());
  const double row_share = row_cost_.share(num_sequences);
  const bool plain = limits_.measured && row_cost_.wants_plain_step(num_sequences);
  int left = limits_.max_rows;
  std::array<TokenId, kMaxDrafts> drafts{};
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    Sequence& sequence = *plan.rows[i].sequence;
    const int count = wanted(sequence, row_share, left);
    if (plain) continue;
    if (count == 0) continue;
    std::span<TokenId> guess(drafts.data(), static_cast<size_t>(count));
    sequence.drafter().guess(sequence.tokens(), guess);
    guess = guess.first(text_length(sequence, guess));
    while (!guess.empty() &&
           !sequence.blocks().grow_to(sequence.num_tokens() + static_cast<int>(guess.size()))) {
      guess = guess.first(guess.size() - 1);
    }
    if (guess.empty()) continue;
    plan.add_drafts(i, guess);
    left -= static_cast<int>(guess.size());
  }
}

bool DraftPlanner::has_guess(const StepPlan& plan) {
  if (limits_.max_drafts == 0) return false;
  const double row_share = row_cost_.share(static_cast<int>(plan.rows.size()));
  bool any = false;
  for (const ScheduledRow& row : plan.rows) {
    any = wanted(*row.sequence, row_share, limits_.max_rows) > 0 || any;
  }
  return any;
}

void DraftPlanner::committed(Sequence& sequence, int num_drafts, int num_accepted) {
  num_drafted_ += static_cast<uint64_t>(num_drafts);
  num_accepted_ += static_cast<uint64_t>(num_accepted);
  if (sequence.has_drafter()) sequence.drafter().judge(sequence.tokens(), num_drafts);
}

void DraftPlanner::ran(const StepPlan& plan, double ms) {
  if (limits_.max_drafts == 0 || plan.num_prefill_tokens > 0) return;
  const auto num_sequences = static_cast<int>(plan.rows.size());
  row_cost_.observe(num_sequences, plan.num_samples - num_sequences, ms);
}

}  // namespace turbomind
