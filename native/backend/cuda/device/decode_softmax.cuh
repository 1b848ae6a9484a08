// Decode attention's scores and probabilities, one tile of 64 keys a warp, and what the warps tell each other
// of them: the tiles' maxima, the probabilities as operands, their sums. Device only.
#pragma once

#include "backend/cuda/device/decode_query.cuh"

namespace turbomind::cuda::decode {

__device__ __forceinline__ float group_max(float value) {  // over the lanes of equal lane % 4
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0U, value, offset));
  }
  return value;
}
__device__ __forceinline__ float group_sum(float value) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) value += __shfl_xor_sync(~0U, value, offset);
  return value;
}

// Scores of the 64 keys of a tile: register i of [m][n] is key 16 m + g + 8 (i / 2), column 2c + i % 2.
// Four chains of products side by side, their operands read ahead of them.
template <class C>
__device__ __forceinline__ void tile_scores(float (&score)[4][C::kN][4],
                                            const Exchange<C>& exchange, uint32_t tile, int warp,
                                            int lane) {
  using Fragments = KeyFragments<C::kDim, C::kBits>;
  uint32_t q[C::kN][4];
#pragma unroll
  for (int step = 0; step < C::kSteps; step += Fragments::kGroup) {
    typename Fragments::Words words[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) Fragments::load_words(words[m], tile, m * 16, step, lane);
#pragma unroll
    for (int e = 0; e < Fragments::kGroup; ++e) {
      const int odd = (step + e) % 2;
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
        if (odd == 0) load_columns<C>(q[n], exchange, n, step + e, lane);
      }
      uint32_t a[4][4];
#pragma unroll
      for (int m = 0; m < 4; ++m) Fragments::unpack(a[m], words[m], e);
#pragma unroll
      for (int n = 0; n < C::kN; ++n) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma_16816<typename C::Product>(score[m][n], a[m], q[n][2 * odd], q[n][2 * odd + 1]);
        }
      }
    }
  }
  if constexpr (C::kBits != 16) {
    float2 query_sum[C::kN];
#pragma unroll
    for (int n = 0; n < C::kN; ++n) {
      query_sum[n] =
          *reinterpret_cast<const float2*>(&exchange.query_sums[warp][n * 8 + lane % 4 * 2]);
    }
    const uint32_t meta = tile + PackedTile<C::kDim, C::kBits>::kDataBytes;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t word[4];
        load_shared<4>(word, meta + (m * 16 + r * 8 + lane / 4) * 4);
        const float2 scale_zero = unpack_scale_zero<C::kBits>(word[0]);
#pragma unroll
        for (int n = 0; n < C::kN; ++n) {
          score[m][n][2 * r] = packed_score(score[m][n][2 * r], scale_zero, query_sum[n].x);
          score[m][n][2 * r + 1] = packed_score(score[m][n][2 * r + 1], scale_zero, query_sum[n].y);
        }
      }
    }
  }
}

// Hides what a column must not see, unless all columns see the whole tile (kWhole); the tile's maxima to
// the exchange. Warp `tile` of the CTA has the tile, which begins with key `first_key`.
template <class C, bool kWhole>
__device__ __forceinline__ void mask_and_maximum(float (&score)[4][C::kN][4], Exchange<C>& exchange,
                                                 const Params& p, int first_key, int tile,
                                                 int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    float largest[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      int limit = kBlockTokens;
      if constexpr (!kWhole) {
        const Unit& unit = exchange.unit[tile];
        const int column = min(n * 8 + lane % 4 * 2 + h, unit.columns - 1);
        limit = keys_seen(p, unit, column) - first_key - lane / 4;
      }
      float most = -INFINITY;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& value = score[m][n][2 * r + h];
          if (!kWhole && m * 16 + r * 8 >= limit) value = -INFINITY;
          most = fmaxf(most, value);
        }
      }
      largest[h] = group_max(most);
    }
    if (lane < 4) {
      *reinterpret_cast<float2*>(&exchange.tile_max[tile][n * 8 + lane * 2]) = {largest[0],
                                                                                largest[1]};
    }
  }
}

// A tile that the part does not have changes neither maxima nor, once all know them, sums.
template <class C>
__device__ __forceinline__ void absent_maximum(Exchange<C>& exchange, int tile, int lane) {
  if (lane < C::kColumns) exchange.tile_max[tile][lane] = -INFINITY;
}
template <class C>
__device__ __forceinline__ void absent_sums(Exchange<C>& exchange, int tile, int lane) {
  for (int i = lane; i < 8 * C::kColumns; i += 32) {
    exchange.sums[tile][i] = 0.0F;
    if constexpr (C::kBits != 16) exchange.zeros[tile][i] = 0.0F;
  }
}

// Running maxima over the tiles of a part, of two columns.
template <class C>
struct Maxima {
  float2 factor[kPartTiles][C::kN];  // of what the tiles before have summed
  float2 last[C::kN];
  float2 own[C::kN];  // after this warp's tile
};

template <class C>
__device__ __forceinline__ void running_maxima(Maxima<C>& maxima, const Exchange<C>& exchange,
                                               int own, float scale_log2, int lane) {
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    float2 tile[kPartTiles];
#pragma unroll
    for (int t = 0; t < kPartTiles; ++t) {
      tile[t] = *reinterpret_cast<const float2*>(&exchange.tile_max[t][n * 8 + lane % 4 * 2]);
    }
    float2 largest{-INFINITY, -INFINITY};
#pragma unroll
    for (int t = 0; t < kPartTiles; ++t) {
      const float2 after{fmaxf(largest.x, tile[t].x), fmaxf(largest.y, tile[t].y)};
      maxima.factor[t][n] = {
          rescale_factor(largest.x, max_offset(after.x, scale_log2), scale_log2),
          rescale_factor(largest.y, max_offset(after.y, scale_log2), scale_log2)};
      largest = after;
      if (t == own) maxima.own[n] = after;
    }
    maxima.last[n] = largest;
  }
}

// Scores → probabilities, as fragments of the n8 operand, and their sums, in the exchange. kWhole: the tile
// has 64 keys; else `valid`.
template <class C, bool kWhole>
__device__ __forceinline__ void share_probabilities(float (&score)[4][C::kN][4],
                                                    Exchange<C>& exchange, const Maxima<C>& maxima,
                                                    uint32_t value_tile, int valid, int tile,
                                                    float scale_log2, int lane) {
  constexpr float kShift = kProbabilityShift<typename C::T, C::kBits>;
  float2 scale_zero[4][2];
  if constexpr (C::kBits != 16) {
    const uint32_t meta = value_tile + PackedTile<C::kDim, C::kBits>::kDataBytes;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int token = m * 16 + r * 8 + lane / 4;
        uint32_t word[4];
        load_shared<4>(word, meta + token * 4);
        scale_zero[m][r] =
            kWhole || token < valid ? unpack_scale_zero<C::kBits>(word[0]) : float2{0.0F, 0.0F};
      }
    }
  }
#pragma unroll
  for (int n = 0; n < C::kN; ++n) {
    const float offset[2] = {max_offset(maxima.own[n].x, scale_log2),
                             max_offset(maxima.own[n].y, scale_log2)};
    float sum[2] = {};
    float zero[2] = {};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = fast_exp2(fmaf(score[m][n][i], scale_log2, kShift - offset[i % 2]));
        sum[i % 2] += x;
        score[m][n][i] = x;
        if constexpr (C::kBits != 16) {
          zero[i % 2] = fmaf(x, scale_zero[m][i / 2].y, zero[i % 2]);
          score[m][n][i] = __fmul_rn(x, scale_zero[m][i / 2].x);
        }
      }
      exchange.probabilities[n][tile * 4 + m][lane] = {
          transpose_8x8(
              pack_probabilities<typename C::T, C::kBits>(score[m][n][0], score[m][n][1])),
          transpose_8x8(
              pack_probabilities<typename C::T, C::kBits>(score[m][n][2], score[m][n][3]))};
    }
    const int place = lane / 4 * C::kColumns + n * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(&exchange.sums[tile][place]) = {sum[0], sum[1]};
    if constexpr (C::kBits != 16) {
      *reinterpret_cast<float2*>(&exchange.zeros[tile][place]) = {zero[0], zero[1]};
    }
  }
}

// A chain of sums over the tiles, then over the eight residues: of columns 2c and 2c + 1.
template <class C>
__device__ __forceinline__ float2 part_sum(const float (&sums)[kPartTiles][8 * C::kColumns],
                                           const Maxima<C>& maxima, int n, int lane) {
  float2 sum[kPartTiles];
#pragma unroll
  for (int t = 0; t < kPartTiles; ++t) {
    sum[t] =
        *reinterpret_cast<const float2*>(&sums[t][lane / 4 * C::kColumns + n * 8 + lane % 4 * 2]);
  }
  float2 total = sum[0];
#pragma unroll
  for (int t = 1; t < kPartTiles; ++t) {
    total = {fmaf(total.x, maxima.factor[t][n].x, sum[t].x),
             fmaf(total.y, maxima.factor[t][n].y, sum[t].y)};
  }
  return {group_sum(total.x), group_sum(total.y)};
}

}  // namespace turbomind::cuda::decode
