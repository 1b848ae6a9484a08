// The CPU backend's paged KV cache: one pool, laid out [block][layer][kv head], each entry in f32
//   K [D, block_size] (transposed: scores of neighbouring tokens are one vector) then
//   V [block_size, D],
// or quantised (KvCacheSpec::bits 8 or 4): the codes of K and of V laid out alike (see
// QuantizedChunk), then f16 [4, block_size]: K scale, K zero, V scale, V zero.
// Block-major, so that a block is one run of memory in which huge pages fit, and a block that no
// sequence ever used is never touched and costs no RAM. Engine thread writes, its team reads.
#pragma once

#include "backend/backend.h"
#include "backend/cpu/host_memory.h"
#include "backend/cpu/kernels/attention_kernels.h"

namespace turbomind::cpu {

class CpuKvCache : public KvCache {
 public:
  // Throws Error{invalid_config | invalid_argument | out_of_memory}.
  explicit CpuKvCache(const KvCacheSpec& spec, MemoryMeter meter = nullptr);
  static size_t block_bytes(const KvCacheSpec& spec);

  const KvCacheSpec& spec() const override { return spec_; }
  bool quantized() const { return spec_.bits != 16; }
  // All of one block: block_bytes(spec) bytes.
  char* block(BlockId block) const;
  // Not quantised: [D, block_size].
  float* keys(int layer, BlockId block, int kv_head) const {
    return reinterpret_cast<float*>(entry(layer, block, kv_head));
  }
  // Not quantised: [block_size, D].
  float* values(int layer, BlockId block, int kv_head) const {
    return reinterpret_cast<float*>(entry(layer, block, kv_head) + entry_ / 2);
  }
  // Quantised: `tokens` tokens of a block from slot `first` on.
  QuantizedChunk chunk(int layer, BlockId block, int kv_head, int first, int tokens) const;
  // Quantised: one token's key and value.
  void store(int layer, BlockId block, int kv_head, int slot, const QuantizedVector& key,
             const QuantizedVector& value) const;

 private:
  char* entry(int layer, BlockId block, int kv_head) const {
    return static_cast<char*>(memory_.data()) +
           ((static_cast<size_t>(block) * spec_.num_layers + layer) * spec_.num_kv_heads +
            kv_head) *
               entry_;
  }
  // Bytes of the codes of K, or of V, in an entry.
  size_t code_bytes() const {
    return static_cast<size_t>(spec_.head_dim) * spec_.block_size * spec_.bits / 8;
  }

  KvCacheSpec spec_;
  size_t entry_ = 0;  // bytes of one (block, layer, kv head)
  HostMemory memory_;
  Metered metered_;
};

}  // namespace turbomind::cpu
