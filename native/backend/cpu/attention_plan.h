// Cuts a step's attention into work items: tiles of query rows, and runs of key splits where one
// tile is a large share of the step. Pure logic on the engine thread; no result depends on how the
// work is cut.
#pragma once

#include <cstddef>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/kernels/attention_kernels.h"

namespace turbomind::cpu {

inline int num_splits(int keys) { return ceil_div(keys, kSplitKeys); }

struct AttentionTile {
  int sequence;
  int row_begin;  // in units of (token of the step) * G + head of its group, G heads a KV head
  int rows;       // <= kMaxTileRows
  int num_keys;   // keys the last row sees
  int partial;    // slot of split 0's partial result; -1: one thread does all splits
};

struct AttentionItem {
  int tile;
  int split_begin;
  int split_end;
};

class AttentionPlan {
 public:
  // Room for steps of these sizes without allocation.
  void reserve(int max_tokens, int max_sequences, int max_heads, int max_kv_len, int threads);
  // Partial results that such steps need at most, each for one KV head.
  static size_t max_partials(int max_kv_len, int threads);

  void build(const StepBatch& batch, int group, int num_kv_heads, int threads);

  const std::vector<AttentionTile>& tiles() const { return tiles_; }
  const std::vector<AttentionItem>& items() const { return items_; }    // longest first
  const std::vector<int>& split_tiles() const { return split_tiles_; }  // tiles in several items
  int num_partials() const { return num_partials_; }                    // slots of one KV head

 private:
  void add_items(int tile, int splits, int64_t splits_an_item);

  std::vector<AttentionTile> tiles_;
  std::vector<AttentionItem> items_;
  std::vector<int> split_tiles_;
  int num_partials_ = 0;
};

}  // namespace turbomind::cpu
