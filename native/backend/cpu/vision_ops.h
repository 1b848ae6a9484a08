// The vision tower's own ops on the CPU: patches, class token and positions, attention inside a
// tile, pixel shuffle. Engine thread; rows are shared among the backend's team.
#pragma once

#include "backend/backend.h"
#include "backend/cpu/host_memory.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/thread_pool.h"

namespace turbomind::cpu {

void patchify(const PatchifyArgs& args, ThreadPool& pool);
void vision_embed(const VisionEmbedArgs& args, ThreadPool& pool);
void pixel_shuffle(const PixelShuffleArgs& args, ThreadPool& pool);

// Bytes that vision_attention needs at `scratch`.
size_t vision_attention_scratch_bytes(int tokens_per_tile, int head_dim, int threads);
void vision_attention(const VisionAttentionArgs& args, Isa isa, HostMemory& scratch,
                      ThreadPool& pool);

}  // namespace turbomind::cpu
