// Which KV blocks hold what: finds a computed block by its content and by the blocks before it, so
// that sequences share the blocks of an equal prefix. A chain of full blocks has a name (PrefixId)
// that is never used twice; a block is filed under the name of the chain before it and its own
// tokens. Hashes only find candidates: tokens are always compared, and pictures by the 128-bit hash
// of their content. Who holds a block, and for how long, is the block manager's. Engine thread.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/types.h"

namespace turbomind {

// Image tokens inside a block: of which picture, and which of its tokens.
struct ImageSpan {
  int offset = 0;       // first of them in the block
  int count = 0;        // tokens
  int first_token = 0;  // index within the picture's tokens
  std::array<uint64_t, 2> content_hash{};
  bool operator==(const ImageSpan&) const = default;
};

// The tokens of a block, or of its beginning, and the pictures behind image tokens among them.
struct BlockContent {
  std::span<const TokenId> tokens;    // [1, block_size]
  std::span<const ImageSpan> images;  // ordered by offset
};

// Leading tokens that are equal.
int common_tokens(const BlockContent& a, const BlockContent& b);

// A chain of full blocks from a sequence's first token on.
using PrefixId = uint64_t;
inline constexpr PrefixId kEmptyPrefix = 0;

class PrefixIndex {
 public:
  PrefixIndex(int num_blocks, int block_size);

  // The block that holds exactly `content`, a full block, behind `prefix`; -1 if there is none.
  BlockId find(PrefixId prefix, const BlockContent& content) const;

  struct Partial {
    BlockId block = -1;
    int num_tokens = 0;
  };
  // The block behind `prefix` that begins like `content`, as long as possible, and at least
  // min_common() tokens. Looks at the newest kMaxCandidates of those that begin alike.
  Partial longest(PrefixId prefix, const BlockContent& content) const;
  int min_common() const { return min_common_; }  // tokens; fewer are not worth a copy

  // Files a block that is not in the index. Full content must not be filed yet; content of less
  // than min_common() tokens is of no use and refused (TM_CHECK).
  void insert(BlockId block, BlockId parent, const BlockContent& content);
  void erase(BlockId block);  // no full block may be filed behind it
  bool contains(BlockId block) const { return entry(block).num_tokens > 0; }
  int num_tokens(BlockId block) const { return entry(block).num_tokens; }  // 0: not in the index
  bool has_children(BlockId block) const { return entry(block).num_children > 0; }
  // The chain that ends with `block`, a full one in the index; -1: the empty chain.
  PrefixId prefix_of(BlockId block) const;

 private:
  static constexpr int kMaxCandidates = 32;
  struct Entry {
    PrefixId prefix = 0;    // the chain before it
    PrefixId id = 0;        // the chain that ends with it; full blocks only
    BlockId parent = -1;    // last block of the chain before it
    int num_tokens = 0;     // 0: not in the index
    int num_children = 0;   // blocks filed behind it
    uint64_t key = 0;       // of prefix and content; full blocks only
    uint64_t head_key = 0;  // of prefix and the first min_common() tokens
    BlockId newer = -1;     // neighbours among those of the same head_key
    BlockId older = -1;
    std::vector<ImageSpan> images;
  };

  const Entry& entry(BlockId block) const;
  BlockContent content(BlockId block) const;
  uint64_t key_of(PrefixId prefix, const BlockContent& content, int num_tokens) const;

  int block_size_;
  int min_common_;
  PrefixId last_id_ = kEmptyPrefix;
  std::vector<Entry> entries_;         // [B]
  std::unique_ptr<TokenId[]> tokens_;  // [B, block_size]; untouched where no block was filed
  std::unordered_multimap<uint64_t, BlockId> full_;  // by key
  std::unordered_map<uint64_t, BlockId> newest_;     // by head_key
};

}  // namespace turbomind
