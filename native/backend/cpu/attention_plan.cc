// See attention_plan.h.
#include "backend/cpu/attention_plan.h"

#include <algorithm>
#include <limits>

namespace turbomind::cpu {
namespace {

constexpr int kItemsPerThread = 4;  // so that a thread that loses its core is made up for

}  // namespace

// At most kItemsPerThread * threads (tile, KV head) pairs are so large a share of a step that their
// splits go to several threads; in a step of few splits every one may be an item of its own.
size_t AttentionPlan::max_partials(int max_kv_len, int threads) {
  return threads == 1
             ? 0
             : static_cast<size_t>(kItemsPerThread) * threads * std::max(2, num_splits(max_kv_len));
}

void AttentionPlan::reserve(int max_tokens, int max_sequences, int max_heads, int max_kv_len,
                            int threads) {
  // A tile ends at its sequence's last row.
  const size_t tiles = static_cast<size_t>(max_tokens) * max_heads / kMaxTileRows + max_sequences;
  tiles_.reserve(tiles);
  items_.reserve(tiles + max_partials(max_kv_len, threads));
  split_tiles_.reserve(static_cast<size_t>(2 * kItemsPerThread) * threads);
}

void AttentionPlan::build(const StepBatch& batch, int group, int num_kv_heads, int threads) {
  tiles_.clear();
  items_.clear();
  split_tiles_.clear();
  num_partials_ = 0;
  int64_t total = 0;
  for (int s = 0; s < batch.num_sequences(); ++s) {
    const int end = batch.query_start[s + 1] * group;
    for (int row = batch.query_start[s] * group; row < end; row += kMaxTileRows) {
      const int rows = std::min(kMaxTileRows, end - row);
      const int keys = batch.positions[(row + rows - 1) / group] + 1;
      TM_CHECK(keys > 0 && keys <= batch.kv_len[s],
               "sequence %d: position %d lies outside its %d tokens", s, keys - 1, batch.kv_len[s]);
      tiles_.push_back({s, row, rows, keys, -1});
      total += num_splits(keys);
    }
  }
  const int64_t items = int64_t{kItemsPerThread} * threads;
  const int64_t share = threads == 1 ? std::numeric_limits<int64_t>::max()
                                     : std::max<int64_t>(1, total * num_kv_heads / items);
  for (int i = 0; i < static_cast<int>(tiles_.size()); ++i) {
    add_items(i, num_splits(tiles_[i].num_keys), share);
  }
  // Longest first, so that no thread begins a long item at the end.
  const auto cost = [this](const AttentionItem& item) {
    return int64_t{item.split_end - item.split_begin} * tiles_[item.tile].rows;
  };
  std::sort(items_.begin(), items_.end(), [&cost](const AttentionItem& a, const AttentionItem& b) {
    if (cost(a) != cost(b)) return cost(a) > cost(b);
    return a.tile != b.tile ? a.tile < b.tile : a.split_begin < b.split_begin;
  });
}

void AttentionPlan::add_items(int tile, int splits, int64_t splits_an_item) {
  if (splits <= splits_an_item) {
    items_.push_back({tile, 0, splits});
    return;
  }
  tiles_[tile].partial = num_partials_;
  num_partials_ += splits;
  split_tiles_.push_back(tile);
  const int step = static_cast<int>(splits_an_item);
  for (int begin = 0; begin < splits; begin += step) {
    items_.push_back({tile, begin, std::min(begin + step, splits)});
  }
}

}  // namespace turbomind::cpu
