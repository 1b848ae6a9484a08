// The end of a tile that one warpgroup of gemm_sm90.cuh has for itself: finished in registers, rounded, and
// turned by stmatrix into rows of y; the rows that a residual adds come the same way. Half of the shared
// memory that f32 sums take, for the same bits as finish8 gives. Device only.
#pragma once

#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/gemm/consume_sm90.cuh"
#include "backend/cuda/gemm/epilogue.cuh"

namespace turbomind::cuda {

// Whether rows of W before `end` can end so.
template <class C>
__device__ __forceinline__ bool packs(const EpilogueParams& p, int end) {
  if (!C::kPacksResidual && p.kind == Epilogue::residual) return false;
  return !p.y_is_f32 && p.ldy % 8 == 0 && is_aligned16(p.y) && end <= p.n;
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

// What belongs to the two rows of W that a thread holds.
struct RowTerms {
  float bias[2] = {0.0F, 0.0F};
  float scale[2] = {1.0F, 1.0F};

  __device__ __forceinline__ RowTerms(const EpilogueParams& p, int n, bool residual) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.bias != nullptr) bias[i] = p.bias[n + i * 8];
      if (residual && p.scale != nullptr) scale[i] = p.scale[n + i * 8];
    }
  }
};

// Sums of eight tokens (v: of two tokens for row n, and for row n + 8) → outputs. old: what a residual adds
// to, likewise.
template <class C>
__device__ __forceinline__ void finish_block(const EpilogueParams& p, const float* scales,
                                             const RowTerms& terms, const uint32_t* old, float* v) {
  const float factors[2] = {scales[0], scales[1]};
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] *= factors[i % 2];
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] += terms.bias[i / 2];
  }
  if (p.kind == Epilogue::silu_mul) {
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = silu(v[i]) * v[i + 2];
  } else if (p.kind == Epilogue::gelu) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = gelu(v[i]);
  } else if (C::kPacksResidual && p.kind == Epilogue::residual) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack_pair<typename C::T>(old[i]);
      v[2 * i] = fmaf(v[2 * i], terms.scale[i], pair.x);
      v[2 * i + 1] = fmaf(v[2 * i + 1], terms.scale[i], pair.y);
    }
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
  const bool residual = C::kPacksResidual && p.kind == Epilogue::residual;
  const RowTerms terms(p, n0 + row, residual);
  // Rows of 64 or 32 outputs and 16 bytes more: eight of them touch all banks once.
  const int stride = gated ? 80 : 144;
  const uint32_t base = smem_address(slice);
  const uint32_t matrix =
      gated ? base + lane % 16 * stride + thread / 32 * 16
            : base + (lane / 16 * 8 + lane % 8) * stride + thread / 32 * 32 + lane / 8 % 2 * 16;
  const int tokens = min(C::kTileT, p.m - t0);
  const int shift = gated ? 2 : 3;  // 16-byte units of a token
  T* y = static_cast<T*>(p.y) + t0 * p.ldy + (gated ? n0 / 2 : n0);
  // f(i, token, its place in y, its place in the slice) for the units of this thread.
  const auto for_units = [&](int first, auto&& f) {
    const int units = min(kTokens, tokens - first) << shift;
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = i * 128 + thread;
      if (unit >= units) break;
      const int t = unit >> shift;
      const int piece = unit & ((1 << shift) - 1);
      f(i, first + t, piece * 8,
        reinterpret_cast<uint4*>(reinterpret_cast<char*>(slice) + t * stride + piece * 16));
    }
  };
#pragma unroll 1
  for (int first = 0; first < tokens; first += kTokens) {
    uint4 rows[kUnits];
    if (residual) {
      for_units(first, [&](int i, int t, int n, uint4*) {
        rows[i] = *reinterpret_cast<const uint4*>(y + t * p.ldy + n);
      });
    }
    float v[kTokens / 2];
    take_slice<C, 0, C::kTileT, kTokens / 2>(acc, v, first);
    store_sync<C>(group);  // the slice before this one has been read
    if (residual) {
      for_units(first, [&](int i, int, int, uint4* place) { *place = rows[i]; });
      store_sync<C>(group);
    }
#pragma unroll
    for (int pair = 0; pair < kTokens / 16; ++pair) {
      float* two = v + pair * 8;
      const float* factors = scales + first + pair * 16 + lane % 4 * 2;
      const uint32_t at = matrix + pair * 16 * stride;
      uint32_t old[4] = {};
      if (residual) ldmatrix_x4_trans(old, at);
      finish_block<C>(p, factors, terms, old, two);
      finish_block<C>(p, factors + 8, terms, old + 2, two + 4);
      const uint32_t a = pack_pair<T>(two[0], two[1]);
      const uint32_t c = pack_pair<T>(two[4], two[5]);
      if (gated) {
        store_transposed(at, a, c);
      } else {
        store_transposed(at, a, pack_pair<T>(two[2], two[3]), c, pack_pair<T>(two[6], two[7]));
      }
    }
    store_sync<C>(group);
    for_units(first, [&](int, int t, int n, const uint4* place) {
      const uint4 bits = *place;
      *reinterpret_cast<uint4*>(y + t * p.ldy + n) = bits;
      if (residual && p.next_norm.weight != nullptr) {
        float x[8];
        unpack8<T>(bits, x);
        store_next8<T, C::kStrips>(p.next_norm, p.n, t0 + t, n0 + n, x);
      }
    });
    __syncwarp();
  }
}

}  // namespace turbomind::cuda
