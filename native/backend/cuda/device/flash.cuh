// The definition of attention on the GPU, and its mma.sync form for 16 query rows a warp.
//
// Keys are cut into parts of 256 and parts into tiles of 64 (KV blocks), by their index in the
// sequence. Within a part, tile by tile: scores (chains of k16 steps over the dims), the running
// maximum, the factor of what was summed before, probabilities (2^x, rounded to T), their f32 sums
// in eight chains (key index mod 8), and the product with V, a chain of k16 steps over the keys. The
// parts, each from zero, are then folded left to right. So a row's bits depend on its own query and
// keys alone: prefill in any chunk, decode and verification of drafts run these same operations in
// this same order, whichever warp or CTA does which. Packed K and V (8, 4 bits): products over the
// exact integers, in f16 whatever T is; score = product * scale + zero * sum(q); probabilities are
// multiplied by V's scale before they are rounded, and zero * probability is summed apart and added at the part's end. Masked
// and absent tiles leave a row unchanged, bit for bit. Device only.
#pragma once

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device/convert.cuh"
#include "backend/cuda/device/kv_tile.cuh"
#include "backend/cuda/device/mma.cuh"
#include "backend/cuda/device/warp.cuh"

namespace turbomind::cuda {

inline constexpr int kPartTiles = kSplitTokens / kBlockTokens;

// f16 probabilities are held times a power of two (their sum too, so it cancels): small ones stay
// normal numbers, and the exponent that the tensor core gives a zero lies far below any output, so
// that a masked key cannot cost an output its last bits. Times V's scale they must stay in range: a token
// whose V spreads over more than 63 * 255 (8 bits; 4: 63 * 15) counts less than it should.
template <class T, int kBits>
inline constexpr float kProbabilityShift = !__is_same(ProductType<T, kBits>, __half) ? 0.0F
                                           : kBits == 16                             ? 15.0F
                                                                                     : 10.0F;

// ---- the arithmetic of one row; scale_log2: softmax scale times log2(e) --------------------------

__device__ __forceinline__ float max_offset(float largest, float scale_log2) {
  return largest == -INFINITY ? 0.0F : __fmul_rn(largest, scale_log2);
}
// Factor of what was summed below the maximum `before`. Product and difference are rounded apart:
// exactly 1 where the maximum did not move.
__device__ __forceinline__ float rescale_factor(float before, float offset, float scale_log2) {
  return fast_exp2(__fmul_rn(before, scale_log2) - offset);
}
__device__ __forceinline__ float packed_score(float product, float2 scale_zero, float query_sum) {
  return fmaf(product, scale_zero.x, __fmul_rn(scale_zero.y, query_sum));
}
// Adds the two values of a word: sum(q) of a lane takes its words in the order of the dims.
template <class T>
__device__ __forceinline__ float add_pair(float sum, uint32_t word) {
  const float2 pair = unpack_pair<T>(word);
  return sum + pair.x + pair.y;
}

struct FoldFactors {
  float before, part;
};
// The next part of a row: `largest` becomes the maximum of both.
__device__ __forceinline__ FoldFactors fold_factors(float& largest, float part_max,
                                                    float scale_log2) {
  const float before = largest;
  largest = fmaxf(before, part_max);
  const float offset = max_offset(largest, scale_log2);
  return {rescale_factor(before, offset, scale_log2), rescale_factor(part_max, offset, scale_log2)};
}
__device__ __forceinline__ float fold(float before, float part, const FoldFactors& factors) {
  return fmaf(part, factors.part, __fmul_rn(before, factors.before));
}

// ---- 16 query rows of a warp; a lane holds rows g = lane / 4 and g + 8 ---------------------------

template <int kDim>
struct FlashPart {
  float out[kDim / 8][4] = {};  // unnormalised
  float row_max[2] = {-INFINITY, -INFINITY};
  float sum[2][2] = {};   // this lane's two chains of each row
  float zero[2][2] = {};  // packed V: sums of zero * probability
};

template <int kDim>
struct FlashTotal {
  float out[kDim / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
};

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

// sum(q) of rows g and g + 8.
template <class T, int kSteps>
__device__ __forceinline__ void query_sums(float (&sums)[2], const uint32_t (&q)[kSteps][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = 0.0F;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      sum = add_pair<T>(add_pair<T>(sum, q[step][r]), q[step][r + 2]);
    }
    sums[r] = quad_sum(sum);
  }
}

// One tile. keys, values: shared addresses of 16-bit tiles; key_meta, value_meta: of the scales and
// zeros of packed ones. Token j of the tile is seen by row g + 8 r when j < limit[r].
template <class T, int kDim, int kBits>
__device__ __forceinline__ void flash_tile(FlashPart<kDim>& state,
                                           const uint32_t (&q)[kDim / 16][4],
                                           const float (&query_sum)[2], uint32_t keys,
                                           uint32_t values, uint32_t key_meta, uint32_t value_meta,
                                           const int (&limit)[2], bool masked, float scale_log2,
                                           int lane) {
  using Tile = HalfTile<kDim>;
  using Product = ProductType<T, kBits>;
  constexpr int kColumns = kBlockTokens / 8;
  constexpr float kShift = kProbabilityShift<T, kBits>;
  float score[kColumns][4] = {};

  // scores
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + Tile::offset(j * 8 + (lane >> 4) * 8 + (lane & 7),
                                         step * 16 + ((lane >> 3) & 1) * 8));
      mma_16816<Product>(score[j], q[step], b[0], b[1]);
      mma_16816<Product>(score[j + 1], q[step], b[2], b[3]);
    }
  }
  if constexpr (kBits != 16) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      uint32_t meta[4];
      load_shared<8>(meta, key_meta + (j * 8 + (lane % 4) * 2) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[j][i] =
            packed_score(score[j][i], unpack_scale_zero<kBits>(meta[i % 2]), query_sum[i / 2]);
      }
    }
  }
  if (masked) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j * 8 + (lane % 4) * 2 + i % 2 >= limit[i / 2]) score[j][i] = -INFINITY;
      }
    }
  }

  // softmax: new maxima, then probabilities and the factor of the part so far
  float offset[2];
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      largest = fmaxf(largest, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
    }
    largest = fmaxf(state.row_max[r], quad_max(largest));
    offset[r] = max_offset(largest, scale_log2);
    factor[r] = rescale_factor(state.row_max[r], offset[r], scale_log2);
    state.row_max[r] = largest;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      state.out[d][2 * r] *= factor[r];
      state.out[d][2 * r + 1] *= factor[r];
    }
  }
  float sum[4] = {};
  float zero[4] = {};
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    float2 scale_zero[2];
    if constexpr (kBits != 16) {
      uint32_t meta[4];
      load_shared<8>(meta, value_meta + (j * 8 + (lane % 4) * 2) * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // What lies past the last key is no number.
        const bool seen = !masked || j * 8 + (lane % 4) * 2 + i < max(limit[0], limit[1]);
        scale_zero[i] = seen ? unpack_scale_zero<kBits>(meta[i]) : float2{0.0F, 0.0F};
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float p = fast_exp2(fmaf(score[j][i], scale_log2, kShift - offset[i / 2]));
      sum[i] += p;
      score[j][i] = p;
      if constexpr (kBits != 16) {
        zero[i] = fmaf(p, scale_zero[i % 2].y, zero[i]);
        score[j][i] = __fmul_rn(p, scale_zero[i % 2].x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    state.sum[i / 2][i % 2] = fmaf(state.sum[i / 2][i % 2], factor[i / 2], sum[i]);
    if constexpr (kBits != 16) {
      state.zero[i / 2][i % 2] = fmaf(state.zero[i / 2][i % 2], factor[i / 2], zero[i]);
    }
  }

  // out += probabilities * V
#pragma unroll
  for (int step = 0; step < kBlockTokens / 16; ++step) {
    const uint32_t p[4] = {
        pack_probabilities<T, kBits>(score[2 * step][0], score[2 * step][1]),
        pack_probabilities<T, kBits>(score[2 * step][2], score[2 * step][3]),
        pack_probabilities<T, kBits>(score[2 * step + 1][0], score[2 * step + 1][1]),
        pack_probabilities<T, kBits>(score[2 * step + 1][2], score[2 * step + 1][3])};
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + Tile::offset(step * 16 + (lane & 7) + ((lane >> 3) & 1) * 8,
                                                 d * 16 + (lane >> 4) * 8));
      mma_16816<Product>(state.out[2 * d], p, b[0], b[1]);
      mma_16816<Product>(state.out[2 * d + 1], p, b[2], b[3]);
    }
  }
}

// Folds a part into the total and empties it.
template <int kDim, int kBits>
__device__ __forceinline__ void fold_part(FlashTotal<kDim>& total, FlashPart<kDim>& part,
                                          float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(part.sum[r][0] + part.sum[r][1]);
    const FoldFactors factors = fold_factors(total.row_max[r], part.row_max[r], scale_log2);
    total.sum[r] = fold(total.sum[r], sum, factors);
    float zero = 0.0F;
    if constexpr (kBits != 16) zero = quad_sum(part.zero[r][0] + part.zero[r][1]);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        const float value = kBits == 16 ? part.out[d][i] : part.out[d][i] + zero;
        total.out[d][i] = fold(total.out[d][i], value, factors);
      }
    }
  }
  part = FlashPart<kDim>{};
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

// The same with the bits of a value in the cache.
template <class F>
void visit_kv_bits(int bits, F&& f) {
  switch (bits) {
    case 16:
      return f.template operator()<16>();
    case 8:
      return f.template operator()<8>();
    case 4:
      return f.template operator()<4>();
    default:
      throw Error(ErrorCode::invalid_argument,
                  format("a KV cache of %d bits on the GPU; expected 16, 8 or 4", bits));
  }
}

}  // namespace turbomind::cuda
