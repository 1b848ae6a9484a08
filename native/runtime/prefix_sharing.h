// Finds what a sequence need not compute: blocks that another one has computed, or is computing in
// this very step; and publishes what it has computed. Content decides, see prefix_index.h.
// Engine thread.
#pragma once

#include <span>
#include <vector>

#include "runtime/sequence.h"

namespace turbomind {

// What of a sequence's next tokens is in the cache. The last token is never found: its row draws.
struct PrefixMatch {
  std::vector<BlockId> blocks;  // full ones, behind those it has
  int num_unheld = 0;           // of these, blocks that count as free now
  PrefixIndex::Partial tail;    // begins like the block behind them; worth a copy

  int num_full_tokens(int block_size) const { return static_cast<int>(blocks.size()) * block_size; }
};

class PrefixSharing {
 public:
  PrefixSharing(BlockManager& blocks, bool enabled) : blocks_(blocks), enabled_(enabled) {}

  // Looks behind the tokens that `sequence` has computed; valid until the pool changes.
  const PrefixMatch& find(const Sequence& sequence);
  // Whether one of `others`, which are prefilled now, computes tokens that `sequence`, whose match
  // is `match`, lacks next. It will find them once they are published.
  bool is_computing(std::span<const Sequence* const> others, const Sequence& sequence,
                    const PrefixMatch& match);
  // Makes the blocks that `sequence` has computed findable. One whose content is there already is
  // given back for that one. `ends`: also the last, partial one, because nobody will fill it.
  void publish(Sequence& sequence, bool ends);

 private:
  void publish_computed(Sequence& sequence, bool ends);
  // Blocks of `sequence` can be found behind what it has computed.
  bool at_boundary(const Sequence& sequence) const;
  PrefixId prefix_of(const Sequence& sequence, int block_idx) const;

  BlockManager& blocks_;
  bool enabled_;
  PrefixMatch match_;  // reused
  std::vector<ImageSpan> images_, other_images_;
};

}  // namespace turbomind
