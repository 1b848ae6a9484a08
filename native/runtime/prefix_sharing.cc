#include "runtime/prefix_sharing.h"

#include <algorithm>
#include <new>

#include "base/error.h"

namespace turbomind {

bool PrefixSharing::at_boundary(const Sequence& sequence) const {
  return enabled_ && sequence.request().share_prefix &&
         sequence.num_computed() == sequence.num_published() * blocks_.block_size();
}

PrefixId PrefixSharing::prefix_of(const Sequence& sequence, int block_idx) const {
  return blocks_.index().prefix_of(sequence.blocks().block(block_idx - 1));
}

const PrefixMatch& PrefixSharing::find(const Sequence& sequence) {
  match_.blocks.clear();
  match_.num_unheld = 0;
  match_.tail = {};
  if (!at_boundary(sequence)) return match_;
  const int block_size = blocks_.block_size();
  const int limit = sequence.num_tokens() - 1;
  int idx = sequence.num_published();
  PrefixId prefix = prefix_of(sequence, idx);
  for (; (idx + 1) * block_size <= limit; ++idx) {
    const BlockId block = blocks_.index().find(prefix, sequence.content(idx, limit, images_));
    if (block < 0) break;
    match_.blocks.push_back(block);
    match_.num_unheld += blocks_.reference_count(block) == 0 ? 1 : 0;
    prefix = blocks_.index().prefix_of(block);
  }
  if (idx * block_size < limit) {
    match_.tail = blocks_.index().longest(prefix, sequence.content(idx, limit, images_));
  }
  return match_;
}

bool PrefixSharing::is_computing(std::span<const Sequence* const> others, const Sequence& sequence,
                                 const PrefixMatch& match) {
  if (!at_boundary(sequence)) return false;
  const int idx = sequence.num_published() + static_cast<int>(match.blocks.size());
  const int limit = sequence.num_tokens() - 1;
  if (idx * blocks_.block_size() >= limit) return false;
  const PrefixId prefix = match.blocks.empty() ? prefix_of(sequence, idx)
                                               : blocks_.index().prefix_of(match.blocks.back());
  const BlockContent wanted = sequence.content(idx, limit, images_);
  const int enough = match.tail.num_tokens + blocks_.index().min_common();
  if (static_cast<int>(wanted.tokens.size()) < enough) return false;
  for (const Sequence* computing : others) {
    const Sequence& other = *computing;
    if (&other == &sequence || !other.request().share_prefix || other.num_published() != idx ||
        prefix_of(other, idx) != prefix) {
      continue;
    }
    // It publishes the block once it is full, or once its prompt ends inside.
    const BlockContent coming = other.content(idx, other.num_tokens(), other_images_);
    if (common_tokens(wanted, coming) >= enough) return true;
  }
  return false;
}

void PrefixSharing::publish(Sequence& sequence, bool ends) {
  if (!enabled_ || !sequence.request().share_prefix) return;
  try {
    publish_computed(sequence, ends);
  } catch (const std::bad_alloc&) {
    // Without memory for the index a block is not found later: it is computed again.
  }
}

void PrefixSharing::publish_computed(Sequence& sequence, bool ends) {
  const int block_size = blocks_.block_size();
  const int num_computed = sequence.num_computed();
  const PrefixIndex& index = blocks_.index();
  int idx = sequence.num_published();
  for (; (idx + 1) * block_size <= num_computed; ++idx) {
    const BlockId own = sequence.blocks().block(idx);
    const BlockContent content = sequence.content(idx, num_computed, images_);
    const BlockId same = index.find(prefix_of(sequence, idx), content);
    if (same >= 0) {
      sequence.blocks().adopt(idx, same);
    } else {
      blocks_.publish(own, sequence.blocks().block(idx - 1), content);
    }
  }
  sequence.set_published(idx);
  const int rest = num_computed - idx * block_size;
  if (!ends || rest < index.min_common()) return;
  const BlockContent content = sequence.content(idx, num_computed, images_);
  if (index.longest(prefix_of(sequence, idx), content).num_tokens == rest) return;
  blocks_.publish(sequence.blocks().block(idx), sequence.blocks().block(idx - 1), content);
}

}  // namespace turbomind
