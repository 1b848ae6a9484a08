// See kv_cache.h.
#include "backend/cpu/kv_cache.h"

#include <cstdint>
#include <utility>

#include "base/error.h"

namespace turbomind::cpu {
namespace {

void validate(const KvCacheSpec& spec) {
  if (spec.bits != 16) {
    throw Error(
        ErrorCode::invalid_argument,
        format("a KV cache of %d bits; the CPU backend keeps f32 (quantPolicy 0)", spec.bits));
  }
  if (spec.num_layers > 0 && spec.num_kv_heads > 0 && spec.head_dim > 0 && spec.block_size > 0 &&
      spec.num_blocks > 0) {
    return;
  }
  throw Error(
      ErrorCode::invalid_config,
      format("KV cache of %d layers, %d KV heads, head_dim %d, block_size %d and %d "
             "blocks: each must be at least 1",
             spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.num_blocks));
}

}  // namespace

size_t CpuKvCache::block_bytes(const KvCacheSpec& spec) {
  return size_t{2} * sizeof(float) * spec.num_layers * spec.num_kv_heads * spec.head_dim *
         spec.block_size;
}

CpuKvCache::CpuKvCache(const KvCacheSpec& spec, MemoryMeter meter) : spec_(spec) {
  validate(spec);
  entry_ = size_t{2} * spec.head_dim * spec.block_size;
  const size_t per_block = block_bytes(spec);
  if (static_cast<size_t>(spec.num_blocks) > SIZE_MAX / 4 / per_block) {
    throw Error(ErrorCode::out_of_memory,
                format("a KV cache of %d blocks of %zu bytes does not fit any address space; "
                       "lower sessionLen or maxBatchSize",
                       spec.num_blocks, per_block));
  }
  memory_ = HostMemory(per_block * spec.num_blocks, "the KV cache");
  metered_ = Metered(std::move(meter), memory_.bytes());
}

char* CpuKvCache::block(BlockId block) const {
  TM_CHECK(block >= 0 && block < spec_.num_blocks, "KV block %d of %d", block, spec_.num_blocks);
  return static_cast<char*>(memory_.data()) + block_bytes(spec_) * static_cast<size_t>(block);
}

}  // namespace turbomind::cpu
