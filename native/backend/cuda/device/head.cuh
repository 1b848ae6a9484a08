// One head of one token in the registers of a warp, from the projection to where attention reads it:
// optional RMSNorm, RoPE (half-split pairs (i, i + D / 2), f32), rounding, and its place in a KV tile of
// global or shared memory, quantised where the cache is. rope_kv and the decode kernel both run these
// operations, so a token's K and V are the same bits whoever wrote them. Device only.
#pragma once

#include "backend/cuda/device/kv_tile.cuh"
#include "backend/cuda/device/warp.cuh"

namespace turbomind::cuda {

// A lane holds dims i and i + kDim / 2 for i = lane and lane + 32, where below kDim / 2.
inline constexpr int kHeadPairs = 2;
struct Head {
  float low[kHeadPairs];
  float high[kHeadPairs];
};
struct Rotation {
  float sine[kHeadPairs];
  float cosine[kHeadPairs];
};

template <class T, int kDim>
__device__ __forceinline__ Head load_head(const T* x, int lane) {
  Head head;
#pragma unroll
  for (int p = 0; p < kHeadPairs; ++p) {
    const int i = lane + 32 * p;
    head.low[p] = i < kDim / 2 ? to_float(x[i]) : 0.0F;
    head.high[p] = i < kDim / 2 ? to_float(x[i + kDim / 2]) : 0.0F;
  }
  return head;
}

struct SineCosine {
  float sine, cosine;
};
// Of pair `i` at a position, times the rope's scaling.
__device__ __forceinline__ SineCosine sine_cosine(const RopeArgs& rope, int position, int i) {
  SineCosine angle;
  sincosf(static_cast<float>(position) * rope.inv_freq[i], &angle.sine, &angle.cosine);
  return {angle.sine * rope.attention_scaling, angle.cosine * rope.attention_scaling};
}
template <int kDim>
__device__ __forceinline__ Rotation rotation_at(const RopeArgs& rope, int position, int lane) {
  Rotation rotation;
#pragma unroll
  for (int p = 0; p < kHeadPairs; ++p) {
    const SineCosine angle = sine_cosine(rope, position, min(lane + 32 * p, kDim / 2 - 1));
    rotation.sine[p] = angle.sine;
    rotation.cosine[p] = angle.cosine;
  }
  return rotation;
}

// RMSNorm with `weight` [kDim], or nothing where it is null; then the rotation.
template <int kDim>
__device__ __forceinline__ void norm_and_rotate(Head& head, const float* weight, float eps,
                                                const Rotation& rotation, int lane) {
  if (weight != nullptr) {
    float squares = 0.0F;
#pragma unroll
    for (int p = 0; p < kHeadPairs; ++p) {
      squares += head.low[p] * head.low[p] + head.high[p] * head.high[p];
    }
    const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(kDim) + eps);
#pragma unroll
    for (int p = 0; p < kHeadPairs; ++p) {
      const int i = lane + 32 * p;
      if (i >= kDim / 2) continue;
      head.low[p] = head.low[p] * scale * weight[i];
      head.high[p] = head.high[p] * scale * weight[i + kDim / 2];
    }
  }
#pragma unroll
  for (int p = 0; p < kHeadPairs; ++p) {
    const float rotated = head.low[p] * rotation.cosine[p] - head.high[p] * rotation.sine[p];
    head.high[p] = head.high[p] * rotation.cosine[p] + head.low[p] * rotation.sine[p];
    head.low[p] = rotated;
  }
}

// To a row of T.
template <class T, int kDim>
__device__ __forceinline__ void store_head(T* row, const Head& head, int lane) {
#pragma unroll
  for (int p = 0; p < kHeadPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= kDim / 2) continue;
    row[i] = from_float<T>(head.low[p]);
    row[i + kDim / 2] = from_float<T>(head.high[p]);
  }
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0U, value, offset));
  }
  return value;
}

// Quantises a head as KvCacheSpec::bits says: levels to `levels` (kDim bytes of shared memory of the
// warp), scale and zero returned as a tile holds them.
template <int kDim, int kBits>
__device__ __forceinline__ uint32_t quantise_head(const Head& head, uint8_t* levels, int lane) {
  constexpr float kLevels = (1 << kBits) - 1;
  float largest = -INFINITY;
  float least = INFINITY;
#pragma unroll
  for (int p = 0; p < kHeadPairs; ++p) {
    if (lane + 32 * p >= kDim / 2) continue;
    largest = fmaxf(largest, fmaxf(head.low[p], head.high[p]));
    least = fminf(least, fminf(head.low[p], head.high[p]));
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
  __syncwarp();  // `levels` may still be read
#pragma unroll
  for (int p = 0; p < kHeadPairs; ++p) {
    const int i = lane + 32 * p;
    if (i >= kDim / 2) continue;
    levels[i] = quantise(head.low[p]);
    levels[i + kDim / 2] = quantise(head.high[p]);
  }
  __syncwarp();
  return static_cast<uint32_t>(__half_as_ushort(scale_bits)) |
         (static_cast<uint32_t>(__half_as_ushort(zero_bits)) << 16);
}

// Row `token` of a tile, in global or shared memory, from what quantise_head left.
template <int kDim, int kBits>
__device__ __forceinline__ void store_levels(char* tile, int token, bool is_v,
                                             const uint8_t* levels, uint32_t scale_zero, int lane) {
  using Tile = PackedTile<kDim, kBits>;
  if constexpr (kBits == 8) {
    for (int d = lane; d < kDim; d += 32) {
      const int at = is_v ? Tile::value_offset(token, d / 16, d % 16)
                          : Tile::key_offset(token, d / 16, d % 16);
      tile[at] = static_cast<char>(levels[d]);
    }
  } else {
    for (int b = lane; b < kDim / 2; b += 32) {
      const int d = b / 8 * 16 + b % 8;  // with d + 8
      const int at =
          is_v ? Tile::value_offset(token, b / 8, b % 8) : Tile::key_offset(token, b / 8, b % 8);
      tile[at] = static_cast<char>(levels[d] | (levels[d + 8] << 4));
    }
  }
  if (lane == 0) *reinterpret_cast<uint32_t*>(tile + Tile::kDataBytes + token * 4) = scale_zero;
}

// A head to row `token` of one or two tiles of K or of V; a null tile is left out. `levels`: kDim
// bytes of shared memory of the warp, where the cache is quantised.
template <class T, int kDim, int kBits>
__device__ __forceinline__ void store_in_tiles(char* first, char* second, int token, bool is_v,
                                               const Head& head, uint8_t* levels, int lane) {
  if constexpr (kBits == 16) {
#pragma unroll
    for (int p = 0; p < kHeadPairs; ++p) {
      const int i = lane + 32 * p;
      if (i >= kDim / 2) continue;
      const int low = HalfTile<kDim>::offset(token, i);
      const int high = HalfTile<kDim>::offset(token, i + kDim / 2);
      for (char* tile : {first, second}) {
        if (tile == nullptr) continue;
        *reinterpret_cast<T*>(tile + low) = from_float<T>(head.low[p]);
        *reinterpret_cast<T*>(tile + high) = from_float<T>(head.high[p]);
      }
    }
  } else {
    const uint32_t scale_zero = quantise_head<kDim, kBits>(head, levels, lane);
    for (char* tile : {first, second}) {
      if (tile == nullptr) continue;
      store_levels<kDim, kBits>(tile, token, is_v, levels, scale_zero, lane);
    }
  }
}

// Keys (is_v: values) of a block and KV head in a layer's cache.
template <int kDim, int kBits>
__device__ __forceinline__ char* cache_tile(void* cache, int64_t block, int kv_heads, int kv_head,
                                            bool is_v) {
  return static_cast<char*>(cache) + ((block * kv_heads + kv_head) * 2 + (is_v ? 1 : 0)) *
                                         static_cast<int64_t>(kTileBytes<kDim, kBits>);
}

}  // namespace turbomind::cuda
