#include "runtime/prefix_index.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {
namespace {

// Any mixing function does: a collision costs a comparison, never a wrong block.
uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15ULL;
  return hash ^ (hash >> 32);
}

}  // namespace

int common_tokens(const BlockContent& a, const BlockContent& b) {
  const size_t most = std::min(a.tokens.size(), b.tokens.size());
  const auto [end, other] = std::mismatch(
      a.tokens.begin(), a.tokens.begin() + static_cast<ptrdiff_t>(most), b.tokens.begin());
  int common = static_cast<int>(end - a.tokens.begin());
  // All image tokens have one id, so spans tell what the ids cannot.
  for (size_t i = 0; i < std::max(a.images.size(), b.images.size()); ++i) {
    const ImageSpan* left = i < a.images.size() ? &a.images[i] : nullptr;
    const ImageSpan* right = i < b.images.size() ? &b.images[i] : nullptr;
    if (left != nullptr && right != nullptr && left->offset == right->offset &&
        left->first_token == right->first_token && left->content_hash == right->content_hash) {
      if (left->count == right->count) continue;
      return std::min(common, left->offset + std::min(left->count, right->count));
    }
    const int left_offset = left != nullptr ? left->offset : common;
    const int right_offset = right != nullptr ? right->offset : common;
    return std::min({common, left_offset, right_offset});
  }
  return common;
}

PrefixIndex::PrefixIndex(int num_blocks, int block_size)
    : block_size_(block_size), min_common_(std::max(1, block_size / 8)) {
  entries_.resize(static_cast<size_t>(num_blocks));
  tokens_ = std::make_unique_for_overwrite<TokenId[]>(static_cast<size_t>(num_blocks) *
                                                      static_cast<size_t>(block_size));
}

const PrefixIndex::Entry& PrefixIndex::entry(BlockId block) const {
  TM_CHECK(block >= 0 && block < static_cast<BlockId>(entries_.size()),
           "block %d of an index of %zu", block, entries_.size());
  return entries_[static_cast<size_t>(block)];
}

BlockContent PrefixIndex::content(BlockId block) const {
  const Entry& found = entry(block);
  const TokenId* tokens = tokens_.get() + static_cast<size_t>(block) * block_size_;
  return {{tokens, static_cast<size_t>(found.num_tokens)}, found.images};
}

uint64_t PrefixIndex::key_of(PrefixId prefix, const BlockContent& content, int num_tokens) const {
  uint64_t hash = mix(static_cast<uint64_t>(num_tokens), prefix);
  for (int i = 0; i < num_tokens; ++i) {
    hash = mix(hash, static_cast<uint32_t>(content.tokens[static_cast<size_t>(i)]));
  }
  for (const ImageSpan& span : content.images) {
    if (span.offset >= num_tokens) break;
    hash = mix(mix(hash, static_cast<uint64_t>(span.first_token)), span.content_hash[0]);
  }
  return hash;
}

PrefixId PrefixIndex::prefix_of(BlockId block) const {
  if (block < 0) return kEmptyPrefix;
  const Entry& found = entry(block);
  TM_CHECK(found.id != 0, "block %d ends no chain", block);
  return found.id;
}

BlockId PrefixIndex::find(PrefixId prefix, const BlockContent& wanted) const {
  const auto [begin, end] = full_.equal_range(key_of(prefix, wanted, block_size_));
  for (auto it = begin; it != end; ++it) {
    if (entry(it->second).prefix == prefix &&
        common_tokens(content(it->second), wanted) == block_size_) {
      return it->second;
    }
  }
  return -1;
}

PrefixIndex::Partial PrefixIndex::longest(PrefixId prefix, const BlockContent& wanted) const {
  Partial best;
  if (static_cast<int>(wanted.tokens.size()) < min_common_) return best;
  const auto found = newest_.find(key_of(prefix, wanted, min_common_));
  if (found == newest_.end()) return best;
  BlockId block = found->second;
  for (int i = 0; i < kMaxCandidates && block >= 0; ++i, block = entry(block).older) {
    if (entry(block).prefix != prefix) continue;
    const int common = common_tokens(content(block), wanted);
    if (common >= min_common_ && common > best.num_tokens) best = {block, common};
  }
  return best;
}

void PrefixIndex::insert(BlockId block, BlockId parent, const BlockContent& content) {
  const int num_tokens = static_cast<int>(content.tokens.size());
  TM_CHECK(!contains(block), "block %d is in the index", block);
  TM_CHECK(num_tokens >= min_common_ && num_tokens <= block_size_, "%d tokens of %d", num_tokens,
           block_size_);
  Entry made;
  made.prefix = prefix_of(parent);
  made.parent = parent;
  made.num_tokens = num_tokens;
  made.images.assign(content.images.begin(), content.images.end());
  made.head_key = key_of(made.prefix, content, min_common_);
  const bool full = num_tokens == block_size_;
  // What may fail comes first, so that the index changes as a whole or not at all.
  const auto [newest, is_first] = newest_.try_emplace(made.head_key, block);
  if (full) {
    made.key = key_of(made.prefix, content, block_size_);
    try {
      full_.emplace(made.key, block);
    } catch (...) {
      if (is_first) newest_.erase(newest);
      throw;
    }
    made.id = ++last_id_;
  }
  std::copy(content.tokens.begin(), content.tokens.end(),
            tokens_.get() + static_cast<size_t>(block) * block_size_);
  if (parent >= 0) ++entries_[static_cast<size_t>(parent)].num_children;
  if (!is_first) {
    made.older = newest->second;
    entries_[static_cast<size_t>(made.older)].newer = block;
    newest->second = block;
  }
  entries_[static_cast<size_t>(block)] = std::move(made);
}

void PrefixIndex::erase(BlockId block) {
  TM_CHECK(contains(block) && !has_children(block), "block %d is not in the index or not its end",
           block);
  Entry& gone = entries_[static_cast<size_t>(block)];
  if (gone.parent >= 0) --entries_[static_cast<size_t>(gone.parent)].num_children;
  if (gone.id != 0) {
    const auto [begin, end] = full_.equal_range(gone.key);
    full_.erase(std::find_if(begin, end, [block](const auto& e) { return e.second == block; }));
  }
  if (gone.older >= 0) entries_[static_cast<size_t>(gone.older)].newer = gone.newer;
  if (gone.newer >= 0) {
    entries_[static_cast<size_t>(gone.newer)].older = gone.older;
  } else if (gone.older >= 0) {
    newest_[gone.head_key] = gone.older;
  } else {
    newest_.erase(gone.head_key);
  }
  gone = Entry{};
}

}  // namespace turbomind
