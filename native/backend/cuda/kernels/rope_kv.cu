// RoPE on q (in place) and k, optional RMSNorm per head before it, K and V written to their slots,
// quantised where the cache is. One warp a head of one token: heads along y, tokens along x. Rotation
// in f32 from the f32 inverse frequencies; half-split pairs (i, i + D / 2). Bound by launch latency at
// decode.
#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kMaxPairs = 2;  // pairs a lane: head_dim / 2 <= 64

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0U, value, offset));
  }
  return value;
}

// One head of one token → a packed tile: see KvCacheSpec::bits. `integers`: kDim bytes of the warp.
template <int kDim, int kBits>
__device__ __forceinline__ void write_packed(char* tile, int token, bool is_v,
                                             const float (&low)[kMaxPairs],
                                             const float (&high)[kMaxPairs], uint8_t* integers,
                                             int lane) {
  using Tile = PackedTile<kDim, kBits>;
  constexpr float kLevels = (1 << kBits) - 1;
  float largest = -INFINITY;
  float least = INFINITY;
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    if (lane + 32 * p >= kDim / 2) continue;
    largest = fmaxf(largest, fmaxf(low[p], high[p]));
    least = fminf(least, fminf(low[p], high[p]));
  }
  largest = warp_max(largest);
  least = -warp_max(-least);
  const __half scale_bits = __float2half_rn(__fdiv_rn(largest - least, kLevels));
  const __half zero_bits = __float2half_rn(least);
  const float scale = __half2float(scale_bits);
  const float zero = __half2float(zero_bits);
  const auto quantise = [&](float x) {
    if (scale == 0.0F) return uint8_t{0};
    const float level = rintf(__fdiv_rn(x - zero, scale));
    return static_cast<uint8_t>(fminf(fmaxf(level, 0.0F), kLevels));
  };
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= kDim / 2) continue;
    integers[i] = quantise(low[p]);
    integers[i + kDim / 2] = quantise(high[p]);
  }
  __syncwarp();
  if constexpr (kBits == 8) {
    for (int d = lane; d < kDim; d += 32) {
      const int at = is_v ? Tile::value_offset(token, d / 16, d % 16)
                          : Tile::key_offset(token, d / 16, d % 16);
      tile[at] = static_cast<char>(integers[d]);
    }
  } else {
    for (int b = lane; b < kDim / 2; b += 32) {
      const int d = b / 8 * 16 + b % 8;  // with d + 8
      const int at =
          is_v ? Tile::value_offset(token, b / 8, b % 8) : Tile::key_offset(token, b / 8, b % 8);
      tile[at] = static_cast<char>(integers[d] | (integers[d + 8] << 4));
    }
  }
  if (lane == 0) {
    *reinterpret_cast<uint32_t*>(tile + Tile::kDataBytes + token * 4) =
        static_cast<uint32_t>(__half_as_ushort(scale_bits)) |
        (static_cast<uint32_t>(__half_as_ushort(zero_bits)) << 16);
  }
}

template <class T, int kDim, int kBits>
__global__ void __launch_bounds__(kWarps * 32) rope_kv_kernel(const RopeKvArgs args) {
  __shared__ uint8_t integers[kWarps][kBits == 16 ? 1 : kDim];
  grid_dependency_wait();
  grid_dependency_launch();
  constexpr int kHalf = kDim / 2;
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.y * kWarps + threadIdx.x / 32;
  const int total_heads = args.num_heads + 2 * args.num_kv_heads;
  const int token = blockIdx.x;
  const int slot = args.slots[token];
  if (head >= total_heads || slot < 0) return;
  T* row = static_cast<T*>(args.qkv) + (static_cast<int64_t>(token) * total_heads + head) * kDim;
  const bool is_q = head < args.num_heads;
  const bool is_v = head >= args.num_heads + args.num_kv_heads;

  float low[kMaxPairs];
  float high[kMaxPairs];
  float squares = 0.0F;
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    const int i = lane + 32 * p;
    low[p] = i < kHalf ? to_float(row[i]) : 0.0F;
    high[p] = i < kHalf ? to_float(row[i + kHalf]) : 0.0F;
    squares += low[p] * low[p] + high[p] * high[p];
  }
  const float* weight = is_q ? args.q_norm : args.k_norm;
  const bool normed = !is_v && weight != nullptr;
  const float scale = normed ? rsqrtf(warp_sum(squares) / static_cast<float>(kDim) +
                                      (is_q ? args.q_norm_eps : args.k_norm_eps))
                             : 1.0F;
  const float position = static_cast<float>(args.positions[token]);
#pragma unroll
  for (int p = 0; p < kMaxPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= kHalf) continue;
    float a = low[p];
    float b = high[p];
    if (normed) {
      a = a * scale * weight[i];
      b = b * scale * weight[i + kHalf];
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
    low[p] = a;
    high[p] = b;
  }

  if (is_q) {
#pragma unroll
    for (int p = 0; p < kMaxPairs; ++p) {
      const int i = lane + 32 * p;
      if (i >= kHalf) continue;
      row[i] = from_float<T>(low[p]);
      row[i + kHalf] = from_float<T>(high[p]);
    }
    return;
  }
  const int kv_head = (head - args.num_heads) % args.num_kv_heads;
  const int64_t block = slot / kBlockTokens;
  char* tile = static_cast<char*>(args.cache) +
               ((block * args.num_kv_heads + kv_head) * 2 + (is_v ? 1 : 0)) *
                   static_cast<int64_t>(kTileBytes<kDim, kBits>);
  if constexpr (kBits == 16) {
#pragma unroll
    for (int p = 0; p < kMaxPairs; ++p) {
      const int i = lane + 32 * p;
      if (i >= kHalf) continue;
      const int at = slot % kBlockTokens;
      *reinterpret_cast<T*>(tile + HalfTile<kDim>::offset(at, i)) = from_float<T>(low[p]);
      *reinterpret_cast<T*>(tile + HalfTile<kDim>::offset(at, i + kHalf)) = from_float<T>(high[p]);
    }
  } else {
    write_packed<kDim, kBits>(tile, slot % kBlockTokens, is_v, low, high,
                              integers[threadIdx.x / 32], lane);
  }
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
