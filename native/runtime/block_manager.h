// The pool of KV blocks: who holds which, how often, and which of those that nobody holds are still
// worth something. Knows numbers and contents only; the bytes belong to the backend's KvCache.
//   - blocks are counted by reference, so that sequences share the blocks of an equal prefix;
//   - a published block (prefix_index.h) that nobody holds any more stays findable. It counts as
//     free: when no untouched block is left, the one unused for longest is taken.
// A sequence that holds a published block holds the chain before it too, and chains are released
// from their ends, so the end of a chain is always taken before what it hangs on. Engine thread.
#pragma once

#include <span>
#include <vector>

#include "base/types.h"
#include "runtime/prefix_index.h"

namespace turbomind {

// Broken invariants (a block released twice, an id outside the pool) throw Error{internal}.
class BlockManager {
 public:
  BlockManager(int num_blocks, int block_size);  // block_size in tokens
  BlockManager(const BlockManager&) = delete;
  BlockManager& operator=(const BlockManager&) = delete;

  int num_blocks() const { return static_cast<int>(reference_counts_.size()); }
  int block_size() const { return block_size_; }
  int num_free() const { return static_cast<int>(free_.size()) + num_cached_; }
  int num_cached() const { return num_cached_; }  // those of the free ones that can still be found
  int num_used() const { return num_blocks() - num_free(); }
  int64_t num_tokens() const { return static_cast<int64_t>(num_blocks()) * block_size_; }
  int blocks_for(int num_tokens) const { return ceil_div(num_tokens, block_size_); }
  int reference_count(BlockId block) const;

  // Appends `count` blocks with one reference each; false, and nothing changed, if fewer are free.
  [[nodiscard]] bool allocate(int count, std::vector<BlockId>& out);
  // One more reference each; a published block that nobody holds may be taken this way.
  void share(std::span<const BlockId> blocks);
  // One less; a block without any is free again. Blocks of a sequence come in token order.
  void release(std::span<const BlockId> blocks);

  // Makes a held, computed block findable behind `parent` (-1: the first one). A shorter content
  // published for it before is replaced.
  void publish(BlockId block, BlockId parent, const BlockContent& content);
  const PrefixIndex& index() const { return index_; }
  void forget_cached();  // the free blocks that can still be found

  // Throws unless free + used = total, free blocks have no reference, no block is free twice and
  // just the published ones are cached.
  void check_invariants() const;

 private:
  struct Links {
    BlockId newer = -1;
    BlockId older = -1;
  };
  void check_id(BlockId block) const;
  Links& links(BlockId block) { return links_[static_cast<size_t>(block)]; }
  void push_cached(BlockId block);
  void remove_cached(BlockId block);
  BlockId take_free();

  int block_size_;
  std::vector<int32_t> reference_counts_;  // [B]
  // A stack whose top is the next block. Last released, first reused: the pool's untouched part
  // stays untouched, so that resident memory follows what was ever of use and not the pool.
  std::vector<BlockId> free_;
  PrefixIndex index_;
  std::vector<Links> links_;  // [B] the cached blocks in order of their last use
  BlockId newest_ = -1;
  BlockId oldest_ = -1;
  int num_cached_ = 0;
};

// The blocks of one sequence in token order: token i lies in block i / block_size. Returns them to
// the manager, which must outlive it, when it dies.
class BlockTable {
 public:
  explicit BlockTable(BlockManager& manager) : manager_(&manager) {}
  ~BlockTable() { clear(); }
  BlockTable(const BlockTable&) = delete;
  BlockTable& operator=(const BlockTable&) = delete;

  // Makes room for the first `num_tokens` tokens; false, and nothing changed, if the pool cannot.
  [[nodiscard]] bool grow_to(int num_tokens);
  // Takes one more reference of `block` as its block `idx`: a new last one, or instead of its own.
  void adopt(int idx, BlockId block);
  void clear();
  // So that later growth allocates no host memory.
  void reserve(int num_tokens);

  std::span<const BlockId> blocks() const { return blocks_; }
  int num_blocks() const { return static_cast<int>(blocks_.size()); }
  int block_size() const { return manager_->block_size(); }
  BlockId block(int idx) const;  // -1: none before the first one
  // Place of a token in the cache; the table must have grown past it.
  int32_t slot(int token_idx) const;

 private:
  BlockManager* manager_;
  std::vector<BlockId> blocks_;
};

}  // namespace turbomind
