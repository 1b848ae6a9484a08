// Causal attention over the paged KV cache: plans a step's work once, runs it for every layer.
//
// A query row sees its sequence's keys in splits of kSplitKeys tokens, counted from position 0;
// each split is computed on its own and splits are joined in order. That definition does not know
// of batches, chunks or threads, so prefill and decode give the same bits for the same token.
// Engine thread; the work is shared with the backend's team.
#pragma once

#include <atomic>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/host_memory.h"
#include "backend/cpu/kernels/attention_kernels.h"
#include "backend/cpu/kv_cache.h"
#include "backend/cpu/thread_pool.h"

namespace turbomind::cpu {

struct AttentionLimits {
  int max_tokens = 0;     // T
  int max_sequences = 0;  // S
  int max_kv_len = 0;
  int max_heads = 0;
  int max_head_dim = 0;
};

class PagedAttention {
 public:
  PagedAttention(Isa isa, ThreadPool& pool);
  // Sizes all scratch; returns its bytes. Steps beyond these limits still run, but allocate.
  size_t reserve(const AttentionLimits& limits);
  void begin_step(const StepBatch& batch);
  void run(const AttentionArgs& args);

 private:
  struct Tile {
    int sequence;
    int row_begin;   // in units of (token of the step) * G + head of its group
    int rows;
    int num_keys;    // keys the last row sees
    int partial;     // index of split 0's slot in partials_, -1: one thread does all splits
  };
  struct Item {
    int tile;
    int split_begin;
    int split_end;
  };
  struct Scratch;  // one thread's view of scratch_

  void check(const AttentionArgs& args) const;
  void make_rope_table(const AttentionArgs& args);
  void rotate_and_store(const AttentionArgs& args, int token) const;
  void plan(int num_heads, int num_kv_heads);
  void add_items(int tile, int splits, int64_t splits_an_item);
  Scratch scratch_of(int thread, int head_dim, int block_size) const;
  size_t scratch_floats(int head_dim, int block_size) const;
  size_t partial_floats(int head_dim) const;
  float* partial(const AttentionArgs& args, const Tile& tile, int kv_head, int split) const;
  void run_item(const AttentionArgs& args, const Item& item, int kv_head, int thread);
  void compute_split(const AttentionArgs& args, const Tile& tile, int kv_head, int split,
                     const Scratch& scratch, float* max, float* sum, float* out) const;
  void gather_chunks(const CpuKvCache& cache, int layer, int kv_head, const Tile& tile,
                     int first_key, int num_keys, const Scratch& scratch) const;
  void finish(const AttentionArgs& args, const Tile& tile, int kv_head, const Scratch& s) const;
  void merge_partials(const AttentionArgs& args, const Tile& tile, int kv_head, int thread);
  template <class Body>
  void for_each(int64_t count, Body&& body);

  Isa isa_;
  const AttentionKernels& kernels_;
  ThreadPool& pool_;
  StepBatch batch_;
  std::vector<Tile> tiles_;
  std::vector<Item> items_;
  std::vector<int> split_tiles_;  // tiles whose splits several threads share
  int num_partials_ = 0;          // slots of one KV head
  int planned_heads_ = 0;         // 0: this step is not planned yet
  int planned_kv_heads_ = 0;
  const void* rope_source_ = nullptr;  // inv_freq the table was made from; null: not yet
  float rope_scaling_ = 1.0F;
  HostMemory rope_table_;              // [T, 2, D / 2] cos, sin
  HostMemory scratch_;                 // [threads, scratch_floats]
  HostMemory partials_;                // [num_partials, Hkv, partial_floats]
};

}  // namespace turbomind::cpu
