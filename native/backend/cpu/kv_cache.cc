// See kv_cache.h.
#include "backend/cpu/kv_cache.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "base/error.h"

namespace turbomind::cpu {
namespace {

void validate(const KvCacheSpec& spec) {
  if (spec.num_layers <= 0 || spec.num_kv_heads <= 0 || spec.head_dim <= 0 ||
      spec.block_size <= 0 || spec.num_blocks <= 0) {
    throw Error(ErrorCode::invalid_config,
                format("KV cache of %d layers, %d KV heads, head_dim %d, block_size %d and %d "
                       "blocks: each must be at least 1",
                       spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.block_size,
                       spec.num_blocks));
  }
  if (spec.bits != 16 && spec.bits != 8 && spec.bits != 4) {
    throw Error(
        ErrorCode::invalid_argument,
        format("a KV cache of %d bits; expected 16, 8 or 4 (quantPolicy 0, 8 or 4)", spec.bits));
  }
  const int least = spec.bits == 4 ? 2 * kLanes : kLanes;
  if (spec.bits != 16 && (spec.head_dim % kLanes != 0 || spec.head_dim < least)) {
    throw Error(ErrorCode::invalid_argument,
                format("a KV cache of %d bits with head_dim %d; its kernels need a multiple of %d "
                       "from %d on: use quantPolicy 0",
                       spec.bits, spec.head_dim, kLanes, least));
  }
}

size_t entry_bytes(const KvCacheSpec& spec) {
  const auto values = size_t{2} * spec.head_dim * spec.block_size;
  if (spec.bits == 16) return values * sizeof(float);
  return values * spec.bits / 8 + size_t{4} * spec.block_size * sizeof(uint16_t);
}

}  // namespace

size_t CpuKvCache::block_bytes(const KvCacheSpec& spec) {
  return entry_bytes(spec) * spec.num_layers * spec.num_kv_heads;
}

CpuKvCache::CpuKvCache(const KvCacheSpec& spec, MemoryMeter meter) : spec_(spec) {
  validate(spec);
  entry_ = entry_bytes(spec);
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

QuantizedChunk CpuKvCache::chunk(int layer, BlockId block, int kv_head, int first,
                                 int tokens) const {
  const char* base = entry(layer, block, kv_head);
  const size_t codes = code_bytes();
  const size_t row = static_cast<size_t>(spec_.head_dim) * spec_.bits / 8;
  const auto* parameters = reinterpret_cast<const uint16_t*>(base + 2 * codes) + first;
  QuantizedChunk chunk;
  chunk.keys = reinterpret_cast<const uint8_t*>(base) + first;
  chunk.values = reinterpret_cast<const uint8_t*>(base) + codes + static_cast<size_t>(first) * row;
  chunk.key_scale = parameters;
  chunk.key_zero = parameters + spec_.block_size;
  chunk.value_scale = parameters + 2 * spec_.block_size;
  chunk.value_zero = parameters + 3 * spec_.block_size;
  chunk.key_stride = spec_.block_size;
  chunk.tokens = tokens;
  chunk.head_dim = spec_.head_dim;
  return chunk;
}

void CpuKvCache::store(int layer, BlockId block, int kv_head, int slot, const QuantizedVector& key,
                       const QuantizedVector& value) const {
  char* base = entry(layer, block, kv_head);
  const int dim = spec_.head_dim;
  const int stride = spec_.block_size;
  const size_t codes = code_bytes();
  auto* keys = reinterpret_cast<uint8_t*>(base) + slot;
  auto* values =
      reinterpret_cast<uint8_t*>(base) + codes + static_cast<size_t>(slot) * dim * spec_.bits / 8;
  if (spec_.bits == 8) {
    for (int d = 0; d < dim; ++d) keys[static_cast<size_t>(d) * stride] = key.codes[d];
    std::copy_n(value.codes, dim, values);
  } else {
    for (int i = 0; i < dim / 2; ++i) {
      keys[static_cast<size_t>(i) * stride] =
          static_cast<uint8_t>(key.codes[2 * i] | key.codes[2 * i + 1] << 4);
      values[i] = static_cast<uint8_t>(value.codes[i] | value.codes[i + dim / 2] << 4);
    }
  }
  auto* parameters = reinterpret_cast<uint16_t*>(base + 2 * codes) + slot;
  parameters[0] = key.scale;
  parameters[stride] = key.zero;
  parameters[2 * stride] = value.scale;
  parameters[3 * stride] = value.zero;
}

}  // namespace turbomind::cpu
