#include "runtime/swap_space.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace turbomind {

SwapSpace::SwapSpace(int num_slots) {
  TM_CHECK(num_slots >= 0, "a swap space of %d blocks", num_slots);
  taken_.assign(static_cast<size_t>(num_slots), false);
  free_.reserve(taken_.size());
  for (int32_t slot = num_slots - 1; slot >= 0; --slot) free_.push_back(slot);
}

bool SwapSpace::allocate(int count, std::vector<int32_t>& out) {
  TM_CHECK(count >= 0, "allocate of %d slots", count);
  if (count > num_free()) return false;
  for (int i = 0; i < count; ++i) {
    const int32_t slot = free_.back();
    out.push_back(slot);
    free_.pop_back();
    TM_CHECK(!taken_[static_cast<size_t>(slot)], "the free slot %d is taken", slot);
    taken_[static_cast<size_t>(slot)] = true;
  }
  return true;
}

void SwapSpace::release(std::span<const int32_t> slots) {
  // Backwards, so that the same number of slots taken next comes in the same order.
  for (size_t i = slots.size(); i-- > 0;) {
    const int32_t slot = slots[i];
    TM_CHECK(slot >= 0 && slot < num_slots(), "slot %d of %d", slot, num_slots());
    TM_CHECK(taken_[static_cast<size_t>(slot)], "release of the free slot %d", slot);
    taken_[static_cast<size_t>(slot)] = false;
    free_.push_back(slot);
  }
}

void SwapSpace::check_invariants() const {
  std::vector<bool> is_free(taken_.size(), false);
  for (int32_t slot : free_) {
    TM_CHECK(!taken_[static_cast<size_t>(slot)], "the free slot %d is taken", slot);
    TM_CHECK(!is_free[static_cast<size_t>(slot)], "slot %d is free twice", slot);
    is_free[static_cast<size_t>(slot)] = true;
  }
  const auto taken = std::count(taken_.begin(), taken_.end(), true);
  TM_CHECK(taken + num_free() == num_slots(), "%d slots taken and %d free of %d",
           static_cast<int>(taken), num_free(), num_slots());
}

bool SwappedBlocks::take(SwapSpace& space, int first_block, int end_block, int num_tokens) {
  TM_CHECK(empty() && first_block >= 0 && first_block < end_block,
           "blocks %d to %d are kept beside %zu", first_block, end_block, slots_.size());
  if (!space.allocate(end_block - first_block, slots_)) return false;
  space_ = &space;
  first_block_ = first_block;
  num_tokens_ = num_tokens;
  return true;
}

void SwappedBlocks::clear() {
  if (!slots_.empty()) space_->release(slots_);
  slots_.clear();
}

int32_t SwappedBlocks::slot(int block_idx) const {
  const int i = block_idx - first_block_;
  TM_CHECK(i >= 0 && i < static_cast<int>(slots_.size()), "block %d is not kept", block_idx);
  return slots_[static_cast<size_t>(i)];
}

void SwappedBlocks::swap(SwappedBlocks& other) noexcept {
  std::swap(space_, other.space_);
  std::swap(first_block_, other.first_block_);
  std::swap(num_tokens_, other.num_tokens_);
  slots_.swap(other.slots_);
}

}  // namespace turbomind
