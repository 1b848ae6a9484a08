// The two halves of an RMSNorm that has no kernel of its own (gemm_table.h): z and strip sums where x is
// written, factors of tokens where z is read. Device only.
//
// Sums of squares, all f32: a strip, of 16 or 64 columns, is the binary tree over them in order; a token
// is eight chains of every eighth strip of 64, or four of 16 as (0+1)+(2+3), joined as a tree.
#pragma once

#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/gemm/gemm_table.h"

namespace turbomind::cuda {

// Strips that a kernel may meet; one width where that follows from its tokens (strip_columns).
enum class Strips { narrow, wide, either };

template <Strips kStrips>
__device__ __forceinline__ bool are_wide(int strip_columns) {
  return kStrips == Strips::either ? strip_columns == kWideStrip : kStrips == Strips::wide;
}

// ---- where x is written ------------------------------------------------------------------------------

// Asks for the norm's weights of `rows` outputs from n0 on; before the wait for the kernel before.
__device__ __forceinline__ void prefetch_next_norm(const NextNorm& norm, int n, int n0, int rows,
                                                   int thread) {
  const int column = n0 + thread * 32;  // a line of 128 bytes
  if (norm.weight == nullptr || thread * 32 >= rows || column >= n) return;
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(norm.weight + column));
}

// Outputs n .. n + 7 of token t, as rounded to T for x; eight neighbouring lanes have 64 columns.
template <class T, Strips kStrips>
__device__ __forceinline__ void store_next8(const NextNorm& norm, int columns, int t, int n,
                                            const float (&v)[8]) {
  float x[8];
  unpack8<T>(pack8<T>(v), x);
  float weight[8];
  *reinterpret_cast<float4*>(weight) = *reinterpret_cast<const float4*>(norm.weight + n);
  *reinterpret_cast<float4*>(weight + 4) = *reinterpret_cast<const float4*>(norm.weight + n + 4);
  float sum[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum[i] = x[i] * x[i];
    x[i] = x[i] * (weight[i] * norm.inverse_peak);
  }
  const int64_t row = t;
  *reinterpret_cast<uint4*>(static_cast<T*>(norm.z) + row * columns + n) = pack8<T>(x);
  const int lane = threadIdx.x % 32;
  const uint32_t peers = 0xffU << (lane & 24);
  float strip = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  strip += __shfl_xor_sync(peers, strip, 1);
  if (are_wide<kStrips>(norm.strip_columns)) {
    strip += __shfl_xor_sync(peers, strip, 2);
    strip += __shfl_xor_sync(peers, strip, 4);
    if (lane % 8 == 0) norm.strips[row * (columns / kWideStrip) + n / kWideStrip] = strip;
  } else if (lane % 2 == 0) {
    norm.strips[row * (columns / kNarrowStrip) + n / kNarrowStrip] = strip;
  }
}

// Output n of token t, for few tokens; sixteen neighbouring lanes have the strip.
template <class T>
__device__ __forceinline__ void store_next(const NextNorm& norm, int columns, int t, int n, float v,
                                           float weight) {
  const float x = to_float(from_float<T>(v));
  const int64_t row = t;
  static_cast<T*>(norm.z)[row * columns + n] = from_float<T>(x * (weight * norm.inverse_peak));
  const int lane = threadIdx.x % 32;
  float sum = x * x;
#pragma unroll
  for (int distance = 1; distance < kNarrowStrip; distance *= 2) {
    sum += __shfl_xor_sync(0xffffU << (lane & 16), sum, distance);
  }
  if (lane % 16 == 0) norm.strips[row * (columns / kNarrowStrip) + n / kNarrowStrip] = sum;
}

// ---- where z is read ---------------------------------------------------------------------------------

// Sums of strips of 64 columns: of each of kTokens tokens, this lane's chain. Past L1, where lines may be
// older than the kernel before this one.
template <int kTokens>
__device__ __forceinline__ void sum_wide_strips(const InputNorm& norm, const int (&t)[kTokens],
                                                float (&sum)[kTokens]) {
  constexpr int kBatch = 10;  // loads of a token in flight
  const int strips = norm.columns / kWideStrip;
  const int lane = threadIdx.x % 8;
  const float* from[kTokens];
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    from[j] = norm.strips + (static_cast<int64_t>(t[j]) * strips + lane);
    asm volatile("" : "+l"(from[j]));  // one address and constants, not sums for every load
    sum[j] = 0.0F;
  }
#pragma unroll 1
  for (int left = strips - lane; left > 0; left -= 8 * kBatch) {
    float v[kTokens][kBatch];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) v[j][i] = 8 * i < left ? __ldcg(from[j] + 8 * i) : 0.0F;
      from[j] += 8 * kBatch;
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) sum[j] += v[j][i];
    }
  }
}
// Likewise of strips of 16 columns of token t, where it is valid. kBatch: loads of four strips in flight.
template <int kBatch>
__device__ __forceinline__ float sum_narrow_strips(const InputNorm& norm, int t, bool valid) {
  const int groups = valid ? norm.columns / kWideStrip : 0;
  const auto* strips = reinterpret_cast<const float4*>(
      norm.strips + static_cast<int64_t>(t) * (norm.columns / kNarrowStrip));
  float sum = 0.0F;
  for (int first = threadIdx.x % 8; first < groups; first += 8 * kBatch) {
    float4 four[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int group = first + 8 * i;
      four[i] = group < groups ? __ldcg(strips + group) : float4{0.0F, 0.0F, 0.0F, 0.0F};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += (four[i].x + four[i].y) + (four[i].z + four[i].w);
  }
  return sum;
}

// The factor of a token whose eight chains eight neighbouring lanes have; whole warps call it.
__device__ __forceinline__ float join_chains(const InputNorm& norm, float sum) {
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
    sum += __shfl_xor_sync(~0U, sum, distance);
  }
  return norm.peak * rsqrtf(sum * norm.inverse_columns + norm.eps);
}

// The factor of token t, where it is valid, for the eight lanes that ask for it; whole warps call it.
template <Strips kStrips = Strips::either, int kBatch = 5>
__device__ __forceinline__ float fold_strips_of(const InputNorm& norm, int t, bool valid) {
  if (!are_wide<kStrips>(norm.strip_columns)) {
    return join_chains(norm, sum_narrow_strips<kBatch>(norm, t, valid));
  }
  const int tokens[1] = {valid ? t : 0};
  float sum[1];
  sum_wide_strips(norm, tokens, sum);
  return join_chains(norm, sum[0]);
}

__host__ __device__ inline bool folds_strips(const InputNorm& norm) {
  return norm.strips != nullptr && norm.scales == nullptr;
}

// Factors of tokens t0 .. t0 + tokens - 1 → scales, folded by `threads` threads, whole warps; the caller makes
// them visible.
template <Strips kStrips, int kBatch = 5>
__device__ __forceinline__ void fold_scales(const InputNorm& norm, int t0, int tokens, int thread,
                                            int threads, float* scales) {
  for (int first = thread / 8; first - thread / 8 % 4 < tokens; first += threads / 8) {
    const bool valid = first < tokens;
    const float scale = fold_strips_of<kStrips, kBatch>(norm, t0 + first, valid);
    if (valid && thread % 8 == 0) scales[first] = scale;
  }
}

// The factors of a tile's tokens that are there already: this thread's token's, which put_scale writes when it
// has arrived. 1 where the norm has none.
__device__ __forceinline__ float begin_scale(const InputNorm& norm, int t0, int tokens,
                                             int thread) {
  return norm.scales != nullptr && thread < tokens ? __ldcg(norm.scales + t0 + thread) : 1.0F;
}
__device__ __forceinline__ void put_scale(const InputNorm& norm, float scale, int tile_tokens,
                                          int thread, float* scales) {
  if (!folds_strips(norm) && thread < tile_tokens) scales[thread] = scale;
}

}  // namespace turbomind::cuda
