#include "runtime/block_manager.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

BlockManager::BlockManager(int num_blocks, int block_size) : block_size_(block_size) {
  TM_CHECK(num_blocks >= 1 && block_size >= 1, "a pool of %d blocks of %d tokens", num_blocks,
           block_size);
  reference_counts_.assign(static_cast<size_t>(num_blocks), 0);
  free_.reserve(static_cast<size_t>(num_blocks));
  for (BlockId block = num_blocks - 1; block >= 0; --block) free_.push_back(block);
}

void BlockManager::check_id(BlockId block) const {
  TM_CHECK(block >= 0 && block < num_blocks(), "block %d of a pool of %d", block, num_blocks());
}

int BlockManager::reference_count(BlockId block) const {
  check_id(block);
  return reference_counts_[static_cast<size_t>(block)];
}

bool BlockManager::allocate(int count, std::vector<BlockId>& out) {
  TM_CHECK(count >= 0, "allocate of %d blocks", count);
  if (count > num_free()) return false;
  for (int i = 0; i < count; ++i) {
    const BlockId block = free_.back();
    int32_t& references = reference_counts_[static_cast<size_t>(block)];
    TM_CHECK(references == 0, "free block %d has %d references", block, references);
    out.push_back(block);
    free_.pop_back();
    references = 1;
  }
  return true;
}

void BlockManager::share(std::span<const BlockId> blocks) {
  for (BlockId block : blocks) {
    TM_CHECK(reference_count(block) > 0, "share of the free block %d", block);
    ++reference_counts_[static_cast<size_t>(block)];
  }
}

void BlockManager::release(std::span<const BlockId> blocks) {
  // Backwards, so that the same number of blocks allocated next is the same blocks in order.
  for (size_t i = blocks.size(); i-- > 0;) {
    const BlockId block = blocks[i];
    TM_CHECK(reference_count(block) > 0, "release of the free block %d", block);
    if (--reference_counts_[static_cast<size_t>(block)] == 0) free_.push_back(block);
  }
}

void BlockManager::check_invariants() const {
  std::vector<bool> is_free(reference_counts_.size(), false);
  for (BlockId block : free_) {
    TM_CHECK(reference_count(block) == 0, "free block %d has %d references", block,
             reference_count(block));
    TM_CHECK(!is_free[static_cast<size_t>(block)], "block %d is free twice", block);
    is_free[static_cast<size_t>(block)] = true;
  }
  const auto held = std::count_if(reference_counts_.begin(), reference_counts_.end(),
                                  [](int32_t references) { return references > 0; });
  TM_CHECK(held == num_used(), "%d blocks are held but %d are not free", static_cast<int>(held),
           num_used());
}

bool BlockTable::grow_to(int num_tokens) {
  const int missing = manager_->blocks_for(num_tokens) - num_blocks();
  return missing <= 0 || manager_->allocate(missing, blocks_);
}

void BlockTable::clear() {
  manager_->release(blocks_);
  blocks_.clear();
}

void BlockTable::reserve(int num_tokens) {
  blocks_.reserve(static_cast<size_t>(manager_->blocks_for(num_tokens)));
}

int32_t BlockTable::slot(int token_idx) const {
  const int block_size = manager_->block_size();
  TM_CHECK(token_idx >= 0 && token_idx / block_size < num_blocks(),
           "slot of token %d in a table of %d blocks", token_idx, num_blocks());
  return blocks_[static_cast<size_t>(token_idx / block_size)] * block_size + token_idx % block_size;
}

}  // namespace turbomind
