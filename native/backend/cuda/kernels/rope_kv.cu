// RoPE on q (in place) and k, optional RMSNorm per head before it, K and V written to their slots,
// quantised where the cache is (head.cuh). One warp a head of one token: heads along y, tokens along
// x. For steps with prefill rows; decode steps do the same inside attention_decode.cu.
#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/device/head.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kWarps = 8;

template <class T, int kDim, int kBits>
__global__ void __launch_bounds__(kWarps * 32) rope_kv_kernel(const RopeKvArgs args) {
  __shared__ uint8_t levels[kWarps][kBits == 16 ? 1 : kDim];
  grid_dependency_launch();
  grid_dependency_wait();
  const int lane = threadIdx.x % 32;
  const int index = blockIdx.y * kWarps + threadIdx.x / 32;
  const int total_heads = args.num_heads + 2 * args.num_kv_heads;
  const int token = blockIdx.x;
  const int slot = args.slots[token];
  if (index >= total_heads || slot < 0) return;
  T* row = static_cast<T*>(args.qkv) + (static_cast<int64_t>(token) * total_heads + index) * kDim;
  const bool is_q = index < args.num_heads;
  const bool is_v = index >= args.num_heads + args.num_kv_heads;

  Head head = load_head<T, kDim>(row, lane);
  if (!is_v) {
    norm_and_rotate<kDim>(head, is_q ? args.rope.q_norm : args.rope.k_norm,
                          is_q ? args.rope.q_norm_eps : args.rope.k_norm_eps,
                          rotation_at<kDim>(args.rope, args.positions[token], lane), lane);
  }
  if (is_q) {
    store_head<T, kDim>(row, head, lane);
    return;
  }
  const int kv_head = (index - args.num_heads) % args.num_kv_heads;
  char* tile =
      cache_tile<kDim, kBits>(args.cache, slot / kBlockTokens, args.num_kv_heads, kv_head, is_v);
  store_in_tiles<T, kDim, kBits>(tile, nullptr, slot % kBlockTokens, is_v, head,
                                 levels[threadIdx.x / 32], lane);
}

}  // namespace

size_t kv_tile_bytes(int head_dim, int bits) {
  size_t bytes = 0;
  visit_head_dim(head_dim, [&]<int kDim>() {
    visit_kv_bits(bits, [&]<int kBits>() { bytes = kTileBytes<kDim, kBits>; });
  });
  return bytes;
}

void rope_kv(const LaunchContext& context, DType dtype, const RopeKvArgs& args) {
  if (args.tokens == 0) return;
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  visit_dtype(dtype, [&]<class T>() {
    visit_head_dim(args.head_dim, [&]<int kDim>() {
      visit_kv_bits(args.kv_bits, [&]<int kBits>() {
        launch(rope_kv_kernel<T, kDim, kBits>,
               {.grid = dim3(static_cast<unsigned>(args.tokens),
                             static_cast<unsigned>(ceil_div(heads, kWarps))),
                .threads = kWarps * 32},
               context.stream, context.programmatic, args);
      });
    });
  });
}

}  // namespace turbomind::cuda
