// Online softmax attention of 16 query rows by one warp over one kernel tile of keys, on mma.sync.
// Shared by prefill and decode. Scores and sums in f32; probabilities are rounded to T before they
// multiply V. Masked and empty tiles leave a row's state unchanged, bit for bit. Device only.
#pragma once

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/memory.cuh"
#include "backend/cuda/device/mma.cuh"
#include "backend/cuda/device/warp.cuh"

namespace turbomind::cuda {

// A lane holds rows g = lane / 4 and g + 8.
template <int kDim>
struct FlashState {
  float out[kDim / 8][4] = {};  // unnormalised
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0F, 0.0F};  // this lane's share of the row
};

// Bytes of a row of keys in shared memory: 16 more than the data, so that the eight rows of an
// ldmatrix fall into different banks for all head dims.
template <int kDim>
inline constexpr int kFlashRowBytes = kDim * 2 + 16;

// Rows row0 and row1 (pointers may be null: zeros) of q as A fragments.
template <class T, int kDim>
__device__ __forceinline__ void load_query(uint32_t (&q)[kDim / 16][4], const T* row0,
                                           const T* row1, int lane) {
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* row = i % 2 == 0 ? row0 : row1;
      const int column = step * 16 + (i / 2) * 8 + (lane % 4) * 2;
      q[step][i] = row != nullptr ? *reinterpret_cast<const uint32_t*>(row + column) : 0U;
    }
  }
}

// keys, values: shared addresses of [kTokens][kFlashRowBytes]. Token j of the tile is seen by row
// g + 8 r when j < limit[r]. scale_log2: softmax scale times log2(e).
template <class T, int kDim, int kTokens>
__device__ __forceinline__ void flash_tile(FlashState<kDim>& state,
                                           const uint32_t (&q)[kDim / 16][4], uint32_t keys,
                                           uint32_t values, const int (&limit)[2], bool masked,
                                           float scale_log2, int lane) {
  constexpr int kRow = kFlashRowBytes<kDim>;
  // f16 probabilities are held times 2^15 (their sum too, so it cancels): small ones stay normal
  // numbers, and the exponent that the tensor core gives a zero lies far below any output, so that a
  // masked key cannot cost an output its last bits.
  constexpr float kShift = __is_same(T, __half) ? 15.0F : 0.0F;
  float score[kTokens / 8][4] = {};

  // scores
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      const int token = j * 8 + (lane >> 4) * 8 + (lane & 7);
      uint32_t b[4];
      ldmatrix_x4(b, keys + token * kRow + step * 32 + ((lane >> 3) & 1) * 16);
      mma_16816<T>(score[j], q[step], b[0], b[1]);
      mma_16816<T>(score[j + 1], q[step], b[2], b[3]);
    }
  }
  if (masked) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j * 8 + (lane % 4) * 2 + i % 2 >= limit[i / 2]) score[j][i] = -INFINITY;
      }
    }
  }

  // softmax: new maxima, then probabilities and the factor of the old state
  float offset[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      largest = fmaxf(largest, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
    }
    largest = fmaxf(state.row_max[r], quad_max(largest));
    offset[r] = largest == -INFINITY ? 0.0F : __fmul_rn(largest, scale_log2);
    // Product and difference rounded apart: exactly 1 where the maximum did not move.
    const float factor = fast_exp2(__fmul_rn(state.row_max[r], scale_log2) - offset[r]);
    state.row_max[r] = largest;
    state.row_sum[r] *= factor;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      state.out[d][2 * r] *= factor;
      state.out[d][2 * r + 1] *= factor;
    }
  }
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[j][i] = fast_exp2(fmaf(score[j][i], scale_log2, kShift - offset[i / 2]));
      state.row_sum[i / 2] += score[j][i];
    }
  }

  // out += probabilities * V
#pragma unroll
  for (int step = 0; step < kTokens / 16; ++step) {
    const uint32_t p[4] = {pack_pair<T>(score[2 * step][0], score[2 * step][1]),
                           pack_pair<T>(score[2 * step][2], score[2 * step][3]),
                           pack_pair<T>(score[2 * step + 1][0], score[2 * step + 1][1]),
                           pack_pair<T>(score[2 * step + 1][2], score[2 * step + 1][3])};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      const int token = step * 16 + (lane & 7) + ((lane >> 3) & 1) * 8;
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + token * kRow + d * 32 + (lane >> 4) * 16);
      mma_16816<T>(state.out[2 * d], p, b[0], b[1]);
      mma_16816<T>(state.out[2 * d + 1], p, b[2], b[3]);
    }
  }
}

// Calls f with the head dimension as a compile-time constant.
template <class F>
void visit_head_dim(int head_dim, F&& f) {
  switch (head_dim) {
    case 64:
      return f.template operator()<64>();
    case 80:
      return f.template operator()<80>();
    case 96:
      return f.template operator()<96>();
    case 128:
      return f.template operator()<128>();
    default:
      throw Error(
          ErrorCode::unsupported_model,
          format("attention: head_dim %d on the GPU; expected 64, 80, 96 or 128", head_dim));
  }
}

}  // namespace turbomind::cuda
