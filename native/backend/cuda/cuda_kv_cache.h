// The KV cache on the GPU: where layers, blocks and the pieces of a block lie. What a tile holds is
// device/kv_tile.cuh's matter. Engine thread.
#pragma once

#include <memory>
#include <utility>

#include "backend/backend.h"

namespace turbomind::cuda {

class CudaKvCache final : public KvCache {
 public:
  CudaKvCache(const KvCacheSpec& spec, std::unique_ptr<Buffer> buffer)
      : spec_(spec), buffer_(std::move(buffer)) {}
  const KvCacheSpec& spec() const override { return spec_; }
  void* layer(int layer) const;  // [B, Hkv, 2 (K, V)] tiles: device/kv_tile.cuh
  // A block is one piece of each layer: num_layers pieces of `piece_bytes`, `piece_pitch` apart.
  char* block(BlockId block) const;
  size_t piece_bytes() const;
  size_t piece_pitch() const;

 private:
  KvCacheSpec spec_;
  std::unique_ptr<Buffer> buffer_;
};

}  // namespace turbomind::cuda
