// RoPE on q (in place) and k, optional RMSNorm per head before it, K and V written to their slots.
// One warp a head of one token: heads along y, tokens along x. Rotation in f32 from the f32
// inverse frequencies; half-split pairs (i, i + D / 2). Bound by launch latency at decode.
#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/warp.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxPairs = 2;  // pairs a lane: head_dim / 2 <= 64

template <class T>
__global__ void __launch_bounds__(kWarps * 32) rope_kv_kernel(const RopeKvArgs args) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.y * kWarps + threadIdx.x / 32;
  const int total_heads = args.num_heads + 2 * args.num_kv_heads;
  const int token = blockIdx.x;
  const int slot = args.slots[token];
  if (head >= total_heads || slot < 0) return;
  const int dim = args.head_dim;
  const int half = dim / 2;
  T* row = static_cast<T*>(args.qkv) + (static_cast<int64_t>(token) * total_heads + head) * dim;
  const bool is_q = head < args.num_heads;
  const bool is_v = head >= args.num_heads + args.num_kv_heads;
  const int kv_head = (head - args.num_heads) % args.num_kv_heads;
  const int64_t cache_row =
      ((static_cast<int64_t>(slot / kBlockTokens) * args.num_kv_heads + (is_q ? 0 : kv_head)) *
           kBlockTokens +
       slot % kBlockTokens) *
      dim;

  float low[kMaxPairs];
  float high[kMaxPairs];
  float squares = 0.0F;
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    const int i = lane + 32 * p;
    low[p] = i < half ? to_float(row[i]) : 0.0F;
    high[p] = i < half ? to_float(row[i + half]) : 0.0F;
    squares += low[p] * low[p] + high[p] * high[p];
  }
  const float* weight = is_q ? args.q_norm : args.k_norm;
  const bool normed = !is_v && weight != nullptr;
  const float scale = normed ? rsqrtf(warp_sum(squares) / static_cast<float>(dim) +
                                      (is_q ? args.q_norm_eps : args.k_norm_eps))
                             : 1.0F;
  const float position = static_cast<float>(args.positions[token]);
  T* out = is_q ? row : static_cast<T*>(is_v ? args.v_cache : args.k_cache) + cache_row;
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= half) continue;
    float a = low[p];
    float b = high[p];
    if (normed) {
      a = a * scale * weight[i];
      b = b * scale * weight[i + half];
    }
    if (!is_v) {
      float sine;
      float cosine;
      sincosf(position * args.inv_freq[i], &sine, &cosine);
      sine *= args.attention_scaling;
      cosine *= args.attention_scaling;
      const float rotated = a * cosine - b * sine;
      b = b * cosine + a * sine;
      a = rotated;
    }
    out[i] = from_float<T>(a);
    out[i + half] = from_float<T>(b);
  }
}

}  // namespace

void rope_kv(const LaunchContext& context, DType dtype, const RopeKvArgs& args) {
  TM_CHECK(args.head_dim % 2 == 0 && args.head_dim / 2 <= 32 * kMaxPairs, "head_dim %d",
           args.head_dim);
  if (args.tokens == 0) return;
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  visit_dtype(dtype, [&]<class T>() {
    launch(rope_kv_kernel<T>,
           {.grid = dim3(static_cast<unsigned>(args.tokens),
                         static_cast<unsigned>(ceil_div(heads, kWarps))),
            .threads = kWarps * 32},
           context.stream, context.programmatic, args);
  });
}

}  // namespace turbomind::cuda
