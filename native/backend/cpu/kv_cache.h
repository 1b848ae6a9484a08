// The CPU backend's paged KV cache: one f32 pool, laid out [block][layer][kv head], each entry
//   K [D, block_size] (transposed: scores of neighbouring tokens are one vector) then
//   V [block_size, D].
// Block-major, so that a block is one run of memory in which huge pages fit, and a block that no
// sequence ever used is never touched and costs no RAM. Engine thread writes, its team reads.
#pragma once

#include "backend/backend.h"
#include "backend/cpu/host_memory.h"

namespace turbomind::cpu {

class CpuKvCache : public KvCache {
 public:
  // Throws Error{invalid_config | invalid_argument | out_of_memory}.
  explicit CpuKvCache(const KvCacheSpec& spec, MemoryMeter meter = nullptr);
  static size_t block_bytes(const KvCacheSpec& spec);

  const KvCacheSpec& spec() const override { return spec_; }
  // All of one block: block_bytes(spec) bytes.
  char* block(BlockId block) const;
  // [D, block_size]
  float* keys(int layer, BlockId block, int kv_head) const {
    return memory_.floats() + offset(layer, block, kv_head);
  }
  // [block_size, D]
  float* values(int layer, BlockId block, int kv_head) const {
    return memory_.floats() + offset(layer, block, kv_head) + entry_ / 2;
  }

 private:
  size_t offset(int layer, BlockId block, int kv_head) const {
    return ((static_cast<size_t>(block) * spec_.num_layers + layer) * spec_.num_kv_heads +
            kv_head) *
           entry_;
  }

  KvCacheSpec spec_;
  size_t entry_ = 0;  // floats of one (block, layer, kv head)
  HostMemory memory_;
  Metered metered_;
};

}  // namespace turbomind::cpu
