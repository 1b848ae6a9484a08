// The pool of KV blocks: who holds which, and how often. Knows numbers only; the bytes belong to the
// backend's KvCache. Blocks are counted by reference so that sequences can share the full blocks of
// an equal prefix (the index of prefixes comes later). Engine thread.
#pragma once

#include <span>
#include <vector>

#include "base/types.h"

namespace turbomind {

// Broken invariants (a block released twice, an id outside the pool) throw Error{internal}.
class BlockManager {
 public:
  BlockManager(int num_blocks, int block_size);  // block_size in tokens
  BlockManager(const BlockManager&) = delete;
  BlockManager& operator=(const BlockManager&) = delete;

  int num_blocks() const { return static_cast<int>(reference_counts_.size()); }
  int block_size() const { return block_size_; }
  int num_free() const { return static_cast<int>(free_.size()); }
  int num_used() const { return num_blocks() - num_free(); }
  int64_t num_tokens() const { return static_cast<int64_t>(num_blocks()) * block_size_; }
  int blocks_for(int num_tokens) const { return ceil_div(num_tokens, block_size_); }
  int reference_count(BlockId block) const;

  // Appends `count` blocks with one reference each; false, and nothing changed, if fewer are free.
  [[nodiscard]] bool allocate(int count, std::vector<BlockId>& out);
  void share(std::span<const BlockId> blocks);    // one more reference each
  void release(std::span<const BlockId> blocks);  // one less; a block without any is free again

  // Throws unless free + used = total, free blocks have no reference and no block is free twice.
  void check_invariants() const;

 private:
  void check_id(BlockId block) const;

  int block_size_;
  std::vector<int32_t> reference_counts_;  // [B]
  // A stack whose top is the next block. Last released, first reused: the pool's untouched part
  // stays untouched, so that an idle engine's resident memory follows its load and not its pool.
  std::vector<BlockId> free_;
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
  void clear();
  // So that later growth allocates no host memory.
  void reserve(int num_tokens);

  std::span<const BlockId> blocks() const { return blocks_; }
  int num_blocks() const { return static_cast<int>(blocks_.size()); }
  // Place of a token in the cache; the table must have grown past it.
  int32_t slot(int token_idx) const;

 private:
  BlockManager* manager_;
  std::vector<BlockId> blocks_;
};

}  // namespace turbomind
