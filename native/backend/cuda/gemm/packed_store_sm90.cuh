// The end of a tile that one warpgroup of gemm_sm90.cuh has for itself and whose outputs need no more than its
// sums, bias and factors: finished in registers, rounded, and turned by stmatrix into rows of y. A quarter of
// the shared memory that f32 sums take, for the same bits as finish8 gives. Device only.
#pragma once

#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/gemm/consume_sm90.cuh"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {

// Whether rows of W before `end` can end so.
__device__ __forceinline__ bool packs(const EpilogueParams& p, int end) {
  return p.kind != Epilogue::residual && !p.y_is_f32 && p.ldy % 8 == 0 && end <= p.n;
}

// Two or four 8x8 matrices of 16-bit values, as fragments hold them, transposed to shared memory: lane l has
// the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(address),
               "r"(a), "r"(b)
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b,
                                                 uint32_t c, uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

// Accumulators of the kCount / 2 tokens at `first`, one of [kFirst, kEnd).
template <class C, int kFirst, int kEnd, int kCount>
__device__ __forceinline__ void take_slice(const float (&acc)[C::kAcc], float (&v)[kCount],
                                           int first) {
  if constexpr ((kEnd - kFirst) / 2 <= kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = acc[kFirst / 2 + i];
  } else {
    constexpr int kMiddle = kFirst + (kEnd - kFirst) / 4 / kCount * 2 * kCount;
    if (first < kMiddle) {
      take_slice<C, kFirst, kMiddle, kCount>(acc, v, first);
    } else {
      take_slice<C, kMiddle, kEnd, kCount>(acc, v, first);
    }
  }
}

// Sums of eight tokens (v: of two tokens for row n, and for row n + 8) → outputs.
__device__ __forceinline__ void finish_block(const EpilogueParams& p, const float* scales,
                                             float low_bias, float high_bias, float* v) {
  const float factors[2] = {scales[0], scales[1]};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] *= factors[i % 2];
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] += i < 2 ? low_bias : high_bias;
  }
  if (p.kind == Epilogue::silu_mul) {
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = silu(v[i]) * v[i + 2];
  } else if (p.kind == Epilogue::gelu) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = gelu(v[i]);
  }
}

// slice: of this warpgroup, C::kSliceFloats.
template <class C>
__device__ __forceinline__ void store_packed(const EpilogueParams& p, const float (&acc)[C::kAcc],
                                             float* slice, const float* scales, int group, int n0,
                                             int t0, int thread) {
  using T = typename C::T;
  constexpr int kTokens = C::kPackedSlice;
  constexpr int kUnits = kTokens * 8 / 128;  // of 16 bytes that a thread stores
  const bool gated = p.kind == Epilogue::silu_mul;
  const int lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  float low_bias = 0.0F;
  float high_bias = 0.0F;
  if (p.bias != nullptr) {
    low_bias = p.bias[n0 + row];
    high_bias = p.bias[n0 + row + 8];
  }
  // Rows of 64 or 32 outputs and 16 bytes more: eight of them touch all banks once.
  const int stride = gated ? 80 : 144;
  const uint32_t base = smem_address(slice);
  const uint32_t matrix =
      gated ? base + lane % 16 * stride + thread / 32 * 16
            : base + (lane / 16 * 8 + lane % 8) * stride + thread / 32 * 32 + lane / 8 % 2 * 16;
  const int tokens = min(C::kTileT, p.m - t0);
  const int shift = gated ? 2 : 3;  // 16-byte units of a token
  T* y = static_cast<T*>(p.y) + t0 * p.ldy + (gated ? n0 / 2 : n0);
#pragma unroll 1
  for (int first = 0; first < tokens; first += kTokens) {
    float v[kTokens / 2];
    take_slice<C, 0, C::kTileT, kTokens / 2>(acc, v, first);
    store_sync<C>(group);  // the slice before this one has been read
#pragma unroll
    for (int pair = 0; pair < kTokens / 16; ++pair) {
      float* two = v + pair * 8;
      const float* factors = scales + first + pair * 16 + lane % 4 * 2;
      finish_block(p, factors, low_bias, high_bias, two);
      finish_block(p, factors + 8, low_bias, high_bias, two + 4);
      const uint32_t at = matrix + pair * 16 * stride;
      const uint32_t a = pack_pair<T>(two[0], two[1]);
      const uint32_t c = pack_pair<T>(two[4], two[5]);
      if (gated) {
        store_transposed(at, a, c);
      } else {
        store_transposed(at, a, pack_pair<T>(two[2], two[3]), c, pack_pair<T>(two[6], two[7]));
      }
    }
    store_sync<C>(group);
    const int units = min(kTokens, tokens - first) << shift;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = i * 128 + thread;
      if (unit >= units) break;
      const int t = unit >> shift;
      const int piece = unit & ((1 << shift) - 1);
      const auto* from = reinterpret_cast<const char*>(slice) + t * stride + piece * 16;
      *reinterpret_cast<uint4*>(y + (first + t) * p.ldy + piece * 8) =
          *reinterpret_cast<const uint4*>(from);
    }
    __syncwarp();
  }
}

}  // namespace turbomind::cuda
