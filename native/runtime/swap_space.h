// Room for KV blocks in host memory: which of its slots are taken. A preempted sequence may keep
// what it has computed there instead of computing it again. Knows numbers only; the bytes are the
// model's, and the scheduler decides what a copy is worth. Engine thread.
#pragma once

#include <span>
#include <vector>

#include "base/types.h"

namespace turbomind {

// Broken invariants (a slot released twice, a number outside the space) throw Error{internal}.
class SwapSpace {
 public:
  explicit SwapSpace(int num_slots);
  SwapSpace(const SwapSpace&) = delete;
  SwapSpace& operator=(const SwapSpace&) = delete;

  int num_slots() const { return static_cast<int>(taken_.size()); }
  int num_free() const { return static_cast<int>(free_.size()); }

  // Appends `count` slots, neighbours where possible; false, and nothing changed, if fewer are free.
  [[nodiscard]] bool allocate(int count, std::vector<int32_t>& out);
  void release(std::span<const int32_t> slots);

  // Throws unless every slot is either free, once, or taken.
  void check_invariants() const;

 private:
  std::vector<bool> taken_;
  std::vector<int32_t> free_;  // a stack, so that what is untouched stays so
};

// The computed tokens of one preempted sequence: its blocks from `first_block` on lie in the slots.
// Those before were held by others too, and must be found again. The slots are free again when it
// dies; the space must outlive it.
class SwappedBlocks {
 public:
  SwappedBlocks() = default;
  ~SwappedBlocks() { clear(); }
  SwappedBlocks(SwappedBlocks&& other) noexcept { swap(other); }
  SwappedBlocks& operator=(SwappedBlocks&& other) noexcept {
    swap(other);
    return *this;
  }

  // So that later calls of take() allocate no host memory.
  void reserve(int num_blocks) { slots_.reserve(static_cast<size_t>(num_blocks)); }
  // Takes slots for blocks [first_block, end_block) of `num_tokens` computed tokens; false, and
  // nothing changed, if fewer are free. It must be empty.
  [[nodiscard]] bool take(SwapSpace& space, int first_block, int end_block, int num_tokens);
  void clear();

  bool empty() const { return slots_.empty(); }
  int first_block() const { return first_block_; }
  int num_tokens() const { return num_tokens_; }
  int32_t slot(int block_idx) const;
  std::span<const int32_t> slots() const { return slots_; }

 private:
  void swap(SwappedBlocks& other) noexcept;

  SwapSpace* space_ = nullptr;
  int first_block_ = 0;
  int num_tokens_ = 0;
  std::vector<int32_t> slots_;
};

}  // namespace turbomind
