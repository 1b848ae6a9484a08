// Prefill and joining: in the order of rank, with the blocks that are found and those that are free,
// and no more tiles than there is room for.
#include "runtime/scheduler.h"

#include <algorithm>
#include <set>

#include "base/error.h"

namespace turbomind {
namespace {

// Sequences of the queue that may be passed over in a step, because others compute what they need.
constexpr int kMaxPassedOver = 16;

}  // namespace

// Running and waiting sequences in one order.
void Scheduler::plan_prefill(StepBudget& budget, bool admit) {
  prefilling_.clear();
  for (const Owner& s : running_) {
    if (!s->decoding() && !s->parked()) prefilling_.push_back(s.get());
  }
  size_t next = 0;     // of prefilling_
  size_t waiting = 0;  // of waiting_; those before it were passed over
  for (;;) {
    admit = admit && waiting < waiting_.size() && waiting < kMaxPassedOver &&
            num_running() < limits_.max_batch_size;
    Sequence* running = next < prefilling_.size() ? prefilling_[next] : nullptr;
    if (admit && (running == nullptr || waiting_[waiting]->rank() < running->rank())) {
      const Joined joined = try_join(waiting, budget);
      if (joined == Joined::later) ++waiting;
      admit = joined != Joined::full;
    } else if (running != nullptr) {
      continue_prefill(*running, budget);
      ++next;
    } else {
      return;
    }
  }
}

void Scheduler::continue_prefill(Sequence& sequence, StepBudget& budget) {
  const PrefixMatch& match = sharing_.find(sequence);
  if (sharing_.is_computing(computing_, sequence, match)) return;
  take_blocks(sequence, match);
  if (match.tail.block >= 0) {
    hold_tail(match);
    copy_tail(sequence, match);
  }
  add_row(sequence, budget);
}

Scheduler::Joined Scheduler::try_join(size_t waiting_idx, StepBudget& budget) {
  Sequence& sequence = *waiting_[waiting_idx];
  const PrefixMatch& match = sharing_.find(sequence);
  const bool swap = can_swap_in(sequence, match);
  if (!swap && sharing_.is_computing(computing_, sequence, match)) return Joined::later;
  if (!has_room(sequence, match)) return Joined::full;
  open_images(sequence);
  // A copy holds its source for this step: one block more, if nobody else does.
  const bool copy = !swap && match.tail.block >= 0 &&
                    (blocks_.reference_count(match.tail.block) > 0 || has_room(sequence, match, 1));
  const int found =
      swap ? sequence.swapped().num_tokens()
           : match.num_full_tokens(blocks_.block_size()) + (copy ? match.tail.num_tokens : 0);
  if (!plan_.can_start(sequence, found, budget)) return Joined::full;
  if (!sequence.started())
    counters_.prefix_queries += static_cast<uint64_t>(sequence.num_prompt_tokens());
  take_blocks(sequence, match);
  if (copy) hold_tail(match);
  TM_CHECK(sequence.blocks().grow_to(sequence.num_tokens()), "%d tokens with %d blocks free",
           sequence.num_tokens(), blocks_.num_free());
  if (copy) copy_tail(sequence, match);
  if (swap) swap_in(sequence);
  sequence.swapped().clear();  // what could not be used
  add_row(sequence, budget);
  insert_by_rank(running_, std::move(waiting_[waiting_idx]));
  waiting_.erase(waiting_.begin() + static_cast<ptrdiff_t>(waiting_idx));
  return Joined::yes;
}

int Scheduler::growing_sequences() const {
  return static_cast<int>(std::count_if(running_.begin(), running_.end(), [&](const Owner& s) {
    return s->blocks().num_blocks() <
           blocks_.blocks_for(s->num_prompt_tokens() + s->max_new_tokens());
  }));
}

// One block more for each sequence that may grow, or the newcomer would soon be preempted.
bool Scheduler::has_room(const Sequence& sequence, const PrefixMatch& match, int extra) const {
  const int needed = blocks_.blocks_for(sequence.num_tokens()) + extra -
                     static_cast<int>(match.blocks.size()) + match.num_unheld;
  return blocks_.num_free() >= needed + growing_sequences();
}

void Scheduler::take_blocks(Sequence& sequence, const PrefixMatch& match) {
  if (match.blocks.empty()) return;
  for (BlockId block : match.blocks) {
    sequence.blocks().adopt(sequence.num_published(), block);
    sequence.set_published(sequence.num_published() + 1);
  }
  skip(sequence, match.num_full_tokens(blocks_.block_size()));
}

// The source must not be given to another before the copy is made.
void Scheduler::hold_tail(const PrefixMatch& match) {
  blocks_.share({&match.tail.block, 1});
  copied_.push_back(match.tail.block);
}

void Scheduler::copy_tail(Sequence& sequence, const PrefixMatch& match) {
  const BlockId own = sequence.blocks().block(sequence.num_published());
  plan_.copies.emplace_back(match.tail.block, own);
  skip(sequence, match.tail.num_tokens);
}

void Scheduler::skip(Sequence& sequence, int num_tokens) {
  const int before = sequence.num_cached_tokens();
  sequence.skip(num_tokens);
  counters_.prefix_hits += static_cast<uint64_t>(sequence.num_cached_tokens() - before);
}

void Scheduler::add_row(Sequence& sequence, StepBudget& budget) {
  if (sequence.decoding()) {
    plan_.add_decode(sequence);
  } else if (plan_.add_prefill(sequence, budget) > 0) {
    computing_.push_back(&sequence);
  }
}

// Makes room for the embeddings of a step's tiles, and grants no more tiles than there is room for.
void Scheduler::limit_held_tiles(StepBudget& budget) {
  if (images_.num_free() < budget.tiles) drop_tiles();
  budget.tiles = std::min(budget.tiles, images_.num_free());
}

// Keeps only the tiles that a running sequence can go on with: those it needs next, without a gap.
// So whoever keeps tiles can use them up, and there is always room again.
void Scheduler::drop_tiles() {
  std::set<std::pair<const EncodedImage*, int>> needed;
  for (const Owner& s : running_) {
    for (const SequenceImage& image : s->images()) {
      if (s->num_computed() >= image.end()) continue;
      int tile = std::max(0, s->num_computed() - image.token_offset) / image.tokens_per_tile;
      for (; tile < image.num_tiles() && image.encoded->state(tile) != TileState::absent; ++tile) {
        needed.emplace(image.encoded.get(), tile);
      }
      if (tile < image.num_tiles()) break;
    }
  }
  for (const std::shared_ptr<EncodedImage>& image : images_.images()) {
    image->drop_unless([&](int tile) { return needed.contains({image.get(), tile}); });
  }
}

}  // namespace turbomind
