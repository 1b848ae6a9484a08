#include "runtime/step_plan.h"

#include <algorithm>

namespace turbomind {

void StepPlan::clear() {
  tiles.clear();
  rows.clear();
  num_tokens = num_prefill_tokens = num_samples = 0;
}

void StepPlan::add_decode(Sequence& sequence) {
  rows.push_back({.sequence = &sequence, .num_tokens = 1, .num_samples = 1});
  ++num_tokens;
  ++num_samples;
}

void StepPlan::add_ahead(Sequence& sequence, int fed_from) {
  // Its place in the text, so that what points there stays valid when the token is appended.
  constexpr TokenId kUnknown[] = {-1};
  sequence.set_drafts(kUnknown);
  rows.push_back(
      {.sequence = &sequence, .num_tokens = 1, .num_samples = 1, .ahead = 1, .fed_from = fed_from});
  ++num_tokens;
  ++num_samples;
}

void StepPlan::forget(const Sequence& sequence) {
  for (ScheduledRow& row : rows) {
    if (row.sequence == &sequence) row.sequence = nullptr;
  }
}

void StepPlan::add_drafts(size_t row, std::span<const TokenId> drafts) {
  const auto count = static_cast<int>(drafts.size());
  rows[row].sequence->set_drafts(drafts);
  rows[row].num_tokens += count;
  rows[row].num_samples += count;
  num_tokens += count;
  num_samples += count;
}

int StepPlan::add_prefill(Sequence& sequence, StepBudget& budget) {
  const int begin = sequence.num_computed();
  int end = begin + std::min(sequence.num_pending(), budget.tokens);
  for (size_t i = 0; i < sequence.images().size(); ++i) {
    const SequenceImage& image = sequence.images()[i];
    if (end <= image.token_offset) break;
    if (begin >= image.token_offset + image.num_tokens()) continue;
    const int encoded = image.num_encoded();
    const int wanted =
        std::min(image.num_tiles(), ceil_div(end - image.token_offset, image.tokens_per_tile));
    const int granted = std::clamp(wanted - encoded, 0, budget.tiles);
    if (granted > 0) tiles.push_back({&sequence, static_cast<int>(i), encoded, granted});
    budget.tiles -= granted;
    if (encoded + granted < wanted) {
      end = image.token_offset + (encoded + granted) * image.tokens_per_tile;
      break;
    }
  }
  const int count = end - begin;
  if (count == 0) return 0;
  const int samples = count == sequence.num_pending() && sequence.max_new_tokens() > 0 ? 1 : 0;
  rows.push_back({.sequence = &sequence, .num_tokens = count, .num_samples = samples});
  num_tokens += count;
  num_prefill_tokens += count;
  num_samples += samples;
  budget.tokens -= count;
  return count;
}

}  // namespace turbomind
