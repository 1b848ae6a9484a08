#include "runtime/step_plan.h"

#include <algorithm>

namespace turbomind {

void StepPlan::clear() {
  for (const ScheduledTiles& run : tiles) run.image->unschedule();
  saves.clear();
  loads.clear();
  copies.clear();
  tiles.clear();
  rows.clear();
  num_decode = num_tokens = num_prefill_tokens = num_samples = 0;
}

void StepPlan::add_decode(Sequence& sequence) {
  ScheduledRow row{.sequence = &sequence, .num_tokens = 1, .num_samples = 1};
  rows.insert(rows.begin() + num_decode, row);
  ++num_decode;
  ++num_tokens;
  ++num_samples;
}

void StepPlan::add_ahead(Sequence& sequence, int fed_from) {
  // Its place in the text, so that what points there stays valid when the token is appended.
  constexpr TokenId kUnknown[] = {-1};
  sequence.set_drafts(kUnknown);
  rows.push_back(
      {.sequence = &sequence, .num_tokens = 1, .num_samples = 1, .ahead = 1, .fed_from = fed_from});
  ++num_decode;
  ++num_tokens;
  ++num_samples;
}

void StepPlan::forget(const Sequence& sequence) {
  for (ScheduledRow& row : rows) {
    if (row.sequence == &sequence) row.sequence = nullptr;
  }
  for (ScheduledTiles& run : tiles) {
    if (run.sequence == &sequence) run.sequence = nullptr;
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
  if (budget.tokens <= 0) return 0;
  const int begin = sequence.num_computed();
  int end = begin + std::min(sequence.num_pending(), budget.tokens);
  for (size_t i = 0; i < sequence.images().size(); ++i) {
    const SequenceImage& image = sequence.images()[i];
    if (end <= image.token_offset) break;
    if (begin >= image.end()) continue;
    const int wanted = std::min(end, image.end());
    const int granted = grant_tiles(sequence, static_cast<int>(i), begin, wanted, budget);
    end = std::min(end, begin + budget.tokens);  // tiles cost tokens
    if (granted < wanted) {
      end = std::min(end, granted);
      break;
    }
  }
  const int count = end - begin;
  if (count <= 0) return 0;
  const int samples = count == sequence.num_pending() && sequence.max_new_tokens() > 0 ? 1 : 0;
  rows.push_back({.sequence = &sequence, .num_tokens = count, .num_samples = samples});
  num_tokens += count;
  num_prefill_tokens += count;
  num_samples += samples;
  budget.tokens -= count;
  return count;
}

bool StepPlan::can_start(const Sequence& sequence, int num_computed, const StepBudget& budget) {
  if (num_computed + 1 == sequence.num_tokens() && sequence.num_completion_tokens() > 0) {
    return true;  // decoded
  }
  if (budget.tokens <= 0) return false;
  for (const SequenceImage& image : sequence.images()) {
    if (num_computed < image.token_offset || num_computed >= image.end()) continue;
    const int tile = (num_computed - image.token_offset) / image.tokens_per_tile;
    return budget.tiles > 0 || image.encoded->state(tile) != TileState::absent;
  }
  return true;
}

// Schedules what is missing of the image's tiles under tokens [begin, end); answers where the tokens
// end whose tiles are there.
int StepPlan::grant_tiles(Sequence& sequence, int image_idx, int begin, int end,
                          StepBudget& budget) {
  const SequenceImage& image = sequence.images()[static_cast<size_t>(image_idx)];
  const int first = std::max(0, begin - image.token_offset) / image.tokens_per_tile;
  const int last = ceil_div(end - image.token_offset, image.tokens_per_tile);
  for (int tile = first; tile < last; ++tile) {
    if (image.encoded->state(tile) != TileState::absent) continue;
    const int tile_begin = image.token_offset + tile * image.tokens_per_tile;
    if (budget.tiles == 0 || tile_begin >= begin + budget.tokens) return tile_begin;
    --budget.tiles;
    budget.tokens = std::max(1, budget.tokens - budget.tile_tokens);
    const bool follows = !tiles.empty() && tiles.back().image == image.encoded &&
                         tiles.back().first_tile + tiles.back().num_tiles == tile;
    const int behind = follows ? tiles.back().first_slot + tiles.back().num_tiles : -1;
    const int slot = image.encoded->schedule(tile, behind - 1);
    if (follows && slot == behind) {
      ++tiles.back().num_tiles;
    } else {
      tiles.push_back({&sequence, image_idx, tile, 1, slot, image.encoded});
    }
  }
  return end;
}

}  // namespace turbomind
