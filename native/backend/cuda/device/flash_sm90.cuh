// wgmma for attention: P (registers) times V, whose tiles lie in shared memory as [token][64 dims] in the
// 128-byte swizzle and so are transposed on the way in. Device only, sm_90a only.
#pragma once

#include "backend/cuda/device/wgmma.cuh"

namespace turbomind::cuda {

// Low word of the descriptor of 16 tokens x N dims: eight tokens every 1024 bytes, 64 dims every
// `chunk_bytes`. The high word is that of wgmma_descriptor_at.
__device__ __forceinline__ uint32_t wgmma_transposed_low(uint32_t address, int chunk_bytes) {
  return (address & 0x3ffffU) >> 4 | static_cast<uint32_t>(chunk_bytes >> 4) << 16;
}

}  // namespace turbomind::cuda
