// Giving way: who loses its blocks to whom, and whether they are copied to host memory.
#include "runtime/scheduler.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

// The first of the queue may take the place of running sequences that come after it and have a
// lower priority: the last ones give way, if that makes enough room.
void Scheduler::make_way() {
  if (waiting_.empty() || running_.empty()) return;
  const Sequence& first = *waiting_.front();
  const PrefixMatch& match = sharing_.find(first);
  int slots = limits_.max_batch_size - num_running();
  if (slots > 0 && has_room(first, match)) return;
  computing_.clear();
  for (const Owner& s : running_) {
    if (!s->decoding() && !s->parked()) computing_.push_back(s.get());
  }
  const bool waits = sharing_.is_computing(computing_, first, match);
  computing_.clear();
  if (waits) return;  // room would not help it now
  const int needed = blocks_.blocks_for(first.num_tokens()) + growing_sequences();
  int free = blocks_.num_free();
  size_t kept = running_.size();
  while (kept > 0 && (slots == 0 || free < needed)) {
    const Sequence& last = *running_[kept - 1];
    const bool yields =
        first.rank() < last.rank() && last.request().priority < first.request().priority;
    if (!yields) return;
    for (BlockId block : last.blocks().blocks()) free += blocks_.reference_count(block) == 1;
    ++slots;
    --kept;
  }
  while (running_.size() > kept) preempt_last();
}

void Scheduler::insert_by_rank(std::vector<Owner>& owners, Owner owner) {
  const auto after = [](const Owner& a, const Owner& b) { return a->rank() < b->rank(); };
  owners.insert(std::upper_bound(owners.begin(), owners.end(), owner, after), std::move(owner));
}

void Scheduler::preempt_last() {
  Owner last = std::move(running_.back());
  running_.pop_back();
  sharing_.publish(*last, true);
  ++counters_.preemptions;
  if (swap_out(*last)) ++counters_.swaps_out;
  last->preempt();
  insert_by_rank(waiting_, std::move(last));
}

// Blocks that others hold too stay findable while they run, and are not worth a copy.
bool Scheduler::swap_out(Sequence& sequence) {
  if (limits_.swap.num_blocks == 0) return false;
  const int end = blocks_.blocks_for(sequence.num_computed());
  int first = 0;
  while (first < std::min(end, sequence.num_published()) &&
         blocks_.reference_count(sequence.blocks().block(first)) > 1) {
    ++first;
  }
  if (first == end || !swap_pays(sequence, first, end - first)) return false;
  SwappedBlocks& kept = sequence.swapped();
  if (!kept.take(swap_space_, first, end, sequence.num_computed())) return false;
  for (int i = first; i < end; ++i) {
    plan_.saves.push_back({sequence.blocks().block(i), kept.slot(i)});
  }
  saved_.push_back(&sequence);
  return true;
}

// Two copies against the tokens to compute and the tiles to encode for them. While nothing is known
// about the price of a token, the known price is taken.
bool Scheduler::swap_pays(const Sequence& sequence, int first_block, int num_blocks) const {
  const int first = first_block * blocks_.block_size();
  int tiles = 0;
  for (const SequenceImage& image : sequence.images()) {
    if (image.token_offset >= sequence.num_computed() || image.end() <= first) continue;
    tiles += image.num_tiles() - std::max(0, first - image.token_offset) / image.tokens_per_tile;
  }
  const double recompute_ms =
      (sequence.num_computed() - first) * budgeter_.token_ms() + tiles * budgeter_.tile_ms();
  return recompute_ms == 0 || 2 * num_blocks * limits_.swap.block_ms < recompute_ms;
}

// What was shared must be found again, and what is found must not be more than was kept.
bool Scheduler::can_swap_in(const Sequence& sequence, const PrefixMatch& match) const {
  const SwappedBlocks& kept = sequence.swapped();
  return !kept.empty() && kept.first_block() <= static_cast<int>(match.blocks.size()) &&
         match.num_full_tokens(blocks_.block_size()) < kept.num_tokens();
}

// Behind the blocks that were found, which need no copy. The slots may be free at once: this step's
// saves are planned already, and those of later steps come after its loads.
void Scheduler::swap_in(Sequence& sequence) {
  SwappedBlocks& kept = sequence.swapped();
  const int end = blocks_.blocks_for(kept.num_tokens());
  for (int i = sequence.num_computed() / blocks_.block_size(); i < end; ++i) {
    plan_.loads.push_back({sequence.blocks().block(i), kept.slot(i)});
  }
  sequence.advance(kept.num_tokens() - sequence.num_computed());
  kept.clear();
  ++counters_.swaps_in;
}

}  // namespace turbomind
