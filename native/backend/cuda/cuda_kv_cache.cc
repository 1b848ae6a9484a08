// Blocks of the KV cache: their bytes, and copies between blocks and to and from host memory.
// Engine thread.
#include <algorithm>

#include "backend/cuda/cuda_backend.h"

namespace turbomind::cuda {

size_t CudaBackend::kv_block_bytes(const KvCacheSpec& spec) const {
  return static_cast<size_t>(spec.num_layers) * 2 * static_cast<size_t>(spec.num_kv_heads) *
         kv_tile_bytes(spec.head_dim, spec.bits);
}

std::unique_ptr<KvCache> CudaBackend::make_kv_cache(const KvCacheSpec& spec) {
  if (spec.block_size != kBlockTokens) {
    throw Error(ErrorCode::invalid_argument,
                format("KV blocks of %d tokens on the GPU; its kernels read blocks of %d",
                       spec.block_size, kBlockTokens));
  }
  return std::make_unique<CudaKvCache>(
      spec, allocate(kv_block_bytes(spec) * static_cast<size_t>(spec.num_blocks)));
}

void* CudaKvCache::layer(int layer) const {
  const size_t bytes = buffer_->bytes() / static_cast<size_t>(spec_.num_layers);
  return static_cast<char*>(buffer_->data()) + static_cast<size_t>(layer) * bytes;
}

char* CudaKvCache::block(BlockId block) const {
  TM_CHECK(block >= 0 && block < spec_.num_blocks, "KV block %d of %d", block, spec_.num_blocks);
  return static_cast<char*>(buffer_->data()) + static_cast<size_t>(block) * piece_bytes();
}

size_t CudaKvCache::piece_bytes() const {
  return piece_pitch() / static_cast<size_t>(spec_.num_blocks);
}

size_t CudaKvCache::piece_pitch() const {
  return buffer_->bytes() / static_cast<size_t>(spec_.num_layers);
}

void CudaBackend::copy_pieces(const CudaKvCache& cache, char* to, size_t to_pitch, const char* from,
                              size_t from_pitch, cudaMemcpyKind kind) {
  const size_t bytes = cache.piece_bytes();
  const auto pieces = static_cast<size_t>(cache.spec().num_layers);
  if (std::max(to_pitch, from_pitch) <= properties_.memPitch) {
    cuda_check(
        cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, pieces, kind, context_.stream),
        "copying a KV block");
    return;
  }
  for (size_t i = 0; i < pieces; ++i) {
    cuda_check(
        cudaMemcpyAsync(to + i * to_pitch, from + i * from_pitch, bytes, kind, context_.stream),
        "copying a KV block");
  }
}

void CudaBackend::copy_blocks(KvCache& cache,
                              std::span<const std::pair<BlockId, BlockId>> from_to) {
  use_device();
  const auto& kv = static_cast<const CudaKvCache&>(cache);
  for (const auto& [from, to] : from_to) {
    TM_CHECK(from != to, "KV block %d copied over itself", from);
    copy_pieces(kv, kv.block(to), kv.piece_pitch(), kv.block(from), kv.piece_pitch(),
                cudaMemcpyDeviceToDevice);
  }
}

void CudaBackend::save_blocks(const KvCache& cache, std::span<const BlockId> blocks, void* host) {
  use_device();
  const auto& kv = static_cast<const CudaKvCache&>(cache);
  auto* to = static_cast<char*>(host);
  for (BlockId block : blocks) {
    copy_pieces(kv, to, kv.piece_bytes(), kv.block(block), kv.piece_pitch(),
                cudaMemcpyDeviceToHost);
    to += kv_block_bytes(kv.spec());
  }
}

void CudaBackend::load_blocks(KvCache& cache, std::span<const BlockId> blocks, const void* host) {
  use_device();
  const auto& kv = static_cast<const CudaKvCache&>(cache);
  const auto* from = static_cast<const char*>(host);
  for (BlockId block : blocks) {
    copy_pieces(kv, kv.block(block), kv.piece_pitch(), from, kv.piece_bytes(),
                cudaMemcpyHostToDevice);
    from += kv_block_bytes(kv.spec());
  }
}

}  // namespace turbomind::cuda
