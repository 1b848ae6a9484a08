// The wgmma form of attention of many rows, chosen by prefill_attention and tile_attention where the
// GPU and the head dimension allow it. Same bits as the mma.sync form.
#pragma once

#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {

bool has_prefill_sm90(int head_dim);
void prefill_attention_sm90(const LaunchContext& context, DType dtype,
                            const PrefillAttentionArgs& args);
void tile_attention_sm90(const LaunchContext& context, DType dtype, const TileAttentionArgs& args);

}  // namespace turbomind::cuda
