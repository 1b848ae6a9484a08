#include "runtime/block_manager.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

BlockManager::BlockManager(int num_blocks, int block_size)
    : block_size_(block_size), index_(std::max(0, num_blocks), std::max(1, block_size)) {
  TM_CHECK(num_blocks >= 1 && block_size >= 1, "a pool of %d blocks of %d tokens", num_blocks,
           block_size);
  reference_counts_.assign(static_cast<size_t>(num_blocks), 0);
  links_.resize(static_cast<size_t>(num_blocks));
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
    const BlockId block = take_free();
    int32_t& references = reference_counts_[static_cast<size_t>(block)];
    TM_CHECK(references == 0, "free block %d has %d references", block, references);
    out.push_back(block);
    references = 1;
  }
  return true;
}

BlockId BlockManager::take_free() {
  if (free_.empty()) {
    const BlockId block = oldest_;
    remove_cached(block);
    index_.erase(block);
    return block;
  }
  const BlockId block = free_.back();
  free_.pop_back();
  return block;
}

void BlockManager::push_cached(BlockId block) {
  links(block) = {-1, newest_};
  if (newest_ >= 0) links(newest_).newer = block;
  newest_ = block;
  if (oldest_ < 0) oldest_ = block;
  ++num_cached_;
}

void BlockManager::remove_cached(BlockId block) {
  const Links gone = links(block);
  (gone.newer >= 0 ? links(gone.newer).older : newest_) = gone.older;
  (gone.older >= 0 ? links(gone.older).newer : oldest_) = gone.newer;
  links(block) = {};
  --num_cached_;
}

void BlockManager::share(std::span<const BlockId> blocks) {
  for (BlockId block : blocks) {
    if (reference_count(block) == 0) {
      TM_CHECK(index_.contains(block), "share of the free block %d", block);
      remove_cached(block);
    }
    ++reference_counts_[static_cast<size_t>(block)];
  }
}

void BlockManager::release(std::span<const BlockId> blocks) {
  // Backwards: the same number of blocks allocated next is then the same blocks in order, and the
  // end of a chain is older than what it hangs on.
  for (size_t i = blocks.size(); i-- > 0;) {
    const BlockId block = blocks[i];
    TM_CHECK(reference_count(block) > 0, "release of the free block %d", block);
    if (--reference_counts_[static_cast<size_t>(block)] > 0) continue;
    if (index_.contains(block)) {
      push_cached(block);
    } else {
      free_.push_back(block);
    }
  }
}

void BlockManager::publish(BlockId block, BlockId parent, const BlockContent& content) {
  TM_CHECK(reference_count(block) > 0, "publish of the free block %d", block);
  TM_CHECK(parent < 0 || reference_count(parent) > 0, "publish behind the free block %d", parent);
  if (index_.contains(block)) index_.erase(block);
  index_.insert(block, parent, content);
}

void BlockManager::forget_cached() {
  while (oldest_ >= 0) {
    const BlockId block = oldest_;
    remove_cached(block);
    index_.erase(block);
    free_.push_back(block);
  }
}

void BlockManager::check_invariants() const {
  std::vector<bool> is_free(reference_counts_.size(), false);
  const auto note = [&](BlockId block, bool cached) {
    TM_CHECK(reference_count(block) == 0, "free block %d has %d references", block,
             reference_count(block));
    TM_CHECK(!is_free[static_cast<size_t>(block)], "block %d is free twice", block);
    TM_CHECK(index_.contains(block) == cached, "free block %d: cached is %d", block, cached);
    is_free[static_cast<size_t>(block)] = true;
  };
  for (BlockId block : free_) note(block, false);
  int cached = 0;
  for (BlockId block = newest_; block >= 0; block = links_[static_cast<size_t>(block)].older) {
    note(block, true);
    ++cached;
  }
  TM_CHECK(cached == num_cached_, "%d cached blocks, counted %d", cached, num_cached_);
  const auto held = std::count_if(reference_counts_.begin(), reference_counts_.end(),
                                  [](int32_t references) { return references > 0; });
  TM_CHECK(held == num_used(), "%d blocks are held but %d are not free", static_cast<int>(held),
           num_used());
}

bool BlockTable::grow_to(int num_tokens) {
  const int missing = manager_->blocks_for(num_tokens) - num_blocks();
  return missing <= 0 || manager_->allocate(missing, blocks_);
}

void BlockTable::adopt(int idx, BlockId block) {
  TM_CHECK(idx >= 0 && idx <= num_blocks(), "block %d of a table of %d", idx, num_blocks());
  manager_->share({&block, 1});
  if (idx == num_blocks()) {
    blocks_.push_back(block);
    return;
  }
  BlockId& own = blocks_[static_cast<size_t>(idx)];
  manager_->release({&own, 1});
  own = block;
}

void BlockTable::clear() {
  manager_->release(blocks_);
  blocks_.clear();
}

void BlockTable::reserve(int num_tokens) {
  blocks_.reserve(static_cast<size_t>(manager_->blocks_for(num_tokens)));
}

BlockId BlockTable::block(int idx) const {
  TM_CHECK(idx >= -1 && idx < num_blocks(), "block %d of a table of %d", idx, num_blocks());
  return idx < 0 ? -1 : blocks_[static_cast<size_t>(idx)];
}

int32_t BlockTable::slot(int token_idx) const {
  const int block_size = manager_->block_size();
  TM_CHECK(token_idx >= 0 && token_idx / block_size < num_blocks(),
           "slot of token %d in a table of %d blocks", token_idx, num_blocks());
  return blocks_[static_cast<size_t>(token_idx / block_size)] * block_size + token_idx % block_size;
}

}  // namespace turbomind
