// The two halves of an RMSNorm that has no kernel of its own (gemm_table.h): z and strip sums where x is
// written, factors of tokens where z is read. Device only.
//
// Sums of squares, all f32: a strip is ((0+1)+(2+3))+((4+5)+(6+7)) of its first eight columns plus the same
// of the others; a token is eight chains of every eighth group of four strips, (0+1)+(2+3) each, joined
// as a tree.
#pragma once

#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/gemm/gemm_table.h"

namespace turbomind::cuda {

// ---- where x is written ------------------------------------------------------------------------------

// Asks for the norm's weights of `rows` outputs from n0 on; before the wait for the kernel before.
__device__ __forceinline__ void prefetch_next_norm(const NextNorm& norm, int n, int n0, int rows,
                                                   int thread) {
  const int column = n0 + thread * 32;  // a line of 128 bytes
  if (norm.weight == nullptr || thread * 32 >= rows || column >= n) return;
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(norm.weight + column));
}

// Outputs n .. n + 7 of token t, as rounded to T for x; the neighbouring lane has the strip's other half.
template <class T>
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
  const float half =
      ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  const int lane = threadIdx.x % 32;
  const float strip = half + __shfl_xor_sync(3U << (lane & 30), half, 1);
  if (lane % 2 == 0) norm.strips[row * (columns / kStripColumns) + n / kStripColumns] = strip;
}

// Output n of token t; sixteen neighbouring lanes have the strip.
template <class T>
__device__ __forceinline__ void store_next(const NextNorm& norm, int columns, int t, int n, float v,
                                           float weight) {
  const float x = to_float(from_float<T>(v));
  const int64_t row = t;
  static_cast<T*>(norm.z)[row * columns + n] = from_float<T>(x * (weight * norm.inverse_peak));
  const int lane = threadIdx.x % 32;
  float sum = x * x;
#pragma unroll
  for (int distance = 1; distance < kStripColumns; distance *= 2) {
    sum += __shfl_xor_sync(0xffffU << (lane & 16), sum, distance);
  }
  if (lane % 16 == 0) norm.strips[row * (columns / kStripColumns) + n / kStripColumns] = sum;
}

// ---- where z is read ---------------------------------------------------------------------------------

// The factor of token t, for the eight lanes that ask for it; whole warps call it. Past L1, where lines may
// be older than the kernel before this one.
__device__ __forceinline__ float fold_strips_of(const InputNorm& norm, int t, bool valid) {
  constexpr int kBatch = 5;  // loads of a lane in flight
  const int groups = valid ? norm.columns / (4 * kStripColumns) : 0;
  const auto* strips = reinterpret_cast<const float4*>(
      norm.strips + static_cast<int64_t>(t) * (norm.columns / kStripColumns));
  const int lane = threadIdx.x % 8;
  float sum = 0.0F;
  for (int first = lane; first < groups; first += 8 * kBatch) {
    float4 four[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int group = first + 8 * i;
      four[i] = group < groups ? __ldcg(strips + group) : float4{0.0F, 0.0F, 0.0F, 0.0F};
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) sum += (four[i].x + four[i].y) + (four[i].z + four[i].w);
  }
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) {
    sum += __shfl_xor_sync(~0U, sum, distance);
  }
  return norm.peak * rsqrtf(sum * norm.inverse_columns + norm.eps);
}

__device__ __forceinline__ bool folds_strips(const InputNorm& norm) {
  return norm.strips != nullptr && norm.scales == nullptr;
}

// Factors of a tile's tokens t0 .. t0 + tokens - 1 → scales, which a barrier of the caller makes visible,
// or, where they are there already, this thread's token's, which put_scale writes when it has arrived.
// `threads`: whole warps.
__device__ __forceinline__ float begin_scales(const InputNorm& norm, int t0, int tokens, int thread,
                                              int threads, float* scales) {
  if (!folds_strips(norm)) {
    return norm.scales != nullptr && thread < tokens ? __ldcg(norm.scales + t0 + thread) : 1.0F;
  }
  for (int first = thread / 8; first - thread / 8 % 4 < tokens; first += threads / 8) {
    const bool valid = first < tokens;
    const float scale = fold_strips_of(norm, t0 + first, valid);
    if (valid && thread % 8 == 0) scales[first] = scale;
  }
  return 1.0F;
}
__device__ __forceinline__ void put_scale(const InputNorm& norm, float scale, int tile_tokens,
                                          int thread, float* scales) {
  if (!folds_strips(norm) && thread < tile_tokens) scales[thread] = scale;
}

}  // namespace turbomind::cuda
