// Causal attention over the paged KV cache: plans a step's work once, runs it for every layer.
//
// A query row sees its sequence's keys in splits of kSplitKeys tokens, counted from position 0;
// each split is computed on its own and splits are joined in order. That definition does not know
// of batches, chunks or threads, so prefill and decode give the same bits for the same token.
// Engine thread; the work is shared with the backend's team.
#pragma once

#include <atomic>

#include "backend/backend.h"
#include "backend/cpu/attention_plan.h"
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
  int block_size = kChunkKeys;  // tokens of a KV block
  bool quantized = false;       // a cache of 8 or 4 bits
};

class PagedAttention {
 public:
  PagedAttention(Isa isa, ThreadPool& pool);
  // Bytes of all scratch for steps within these limits.
  size_t scratch_bytes(const AttentionLimits& limits) const;
  // Takes them. Steps beyond these limits still run, but allocate.
  void reserve(const AttentionLimits& limits);
  size_t reserved_bytes() const {
    return rope_table_.bytes() + scratch_.bytes() + partials_.bytes();
  }
  void begin_step(const StepBatch& batch);
  void run(const AttentionArgs& args);

 private:
  struct Scratch;  // one thread's view of scratch_
  struct ScratchBytes {
    size_t rope_table, scratch, partials;
  };

  // Whether keys and values are copied together before they are read: blocks that do not hold whole
  // chunks, and quantised ones.
  static bool gathers(int block_size, bool quantized) {
    return quantized || block_size % kChunkKeys != 0;
  }
  static bool gathers(const KvCacheSpec& spec) { return gathers(spec.block_size, spec.bits != 16); }
  ScratchBytes sizes(const AttentionLimits& limits) const;
  void check(const AttentionArgs& args) const;
  void make_rope_table(const AttentionArgs& args);
  void rotate_and_store(const AttentionArgs& args, int token) const;
  void plan(int num_heads, int num_kv_heads);
  Scratch scratch_of(int thread, const AttentionArgs& args) const;
  size_t scratch_floats(int head_dim, bool gathers) const;
  size_t partial_floats(int head_dim) const;
  float* partial(const AttentionArgs& args, const AttentionTile& tile, int kv_head,
                 int split) const;
  void run_item(const AttentionArgs& args, const AttentionItem& item, int kv_head, int thread);
  void compute_split(const AttentionArgs& args, const AttentionTile& tile, int kv_head, int split,
                     const Scratch& scratch, float* max, float* sum, float* out) const;
  void dequantize_chunks(const CpuKvCache& cache, int layer, int kv_head, const AttentionTile& tile,
                         int first_key, int num_keys, const Scratch& scratch) const;
  void gather_chunks(const CpuKvCache& cache, int layer, int kv_head, const AttentionTile& tile,
                     int first_key, int num_keys, const Scratch& scratch) const;
  void finish(const AttentionArgs& args, const AttentionTile& tile, int kv_head,
              const Scratch& s) const;
  void merge_partials(const AttentionArgs& args, const AttentionTile& tile, int kv_head,
                      int thread);
  template <class Body>
  void for_each(int64_t count, Body&& body);

  Isa isa_;
  const AttentionKernels& kernels_;
  ThreadPool& pool_;
  StepBatch batch_;
  AttentionPlan plan_;
  int planned_heads_ = 0;  // 0: this step is not planned yet
  int planned_kv_heads_ = 0;
  const void* rope_source_ = nullptr;  // inv_freq the table was made from; null: not yet
  float rope_scaling_ = 1.0F;
  HostMemory rope_table_;  // [T, 2, D / 2] cos, sin
  HostMemory scratch_;     // [threads, scratch_floats]
  HostMemory partials_;    // [partial slot, Hkv, partial_floats]
};

}  // namespace turbomind::cpu
