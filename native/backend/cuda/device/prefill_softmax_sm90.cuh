// Prefill attention on wgmma: the products of a warpgroup with a KV tile, and the softmax between them, by
// the definition in flash.cuh. Registers and shared memory alone; who waits for what is the consumer's
// (prefill_consume_sm90.cuh). Device only, sm_90a only.
#pragma once

#include "backend/cuda/device/flash_sm90.cuh"
#include "backend/cuda/device/hopper.cuh"
#include "backend/cuda/device/prefill_ring_sm90.cuh"

namespace turbomind::cuda {

// A lane's rows g and g + 8 of its warp's 16, as in FlashPart.
struct RowState {
  float row_max[2] = {-INFINITY, -INFINITY};
  float sum[2][2] = {};
  float zero[2][2] = {};
};

// The rows' sums of all parts so far.
struct RowTotal {
  float row_max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
};

// What a finished part's output is folded with.
struct PartFold {
  FoldFactors factors[2];
  float zero[2];
};

// A warpgroup's queries as wgmma takes them: fragments of a lane's rows, or a descriptor's low word.
template <class C, bool kInRegisters>
struct Queries;
template <class C>
struct Queries<C, true> {
  uint32_t words[C::kDim / 16][4];
};
template <class C>
struct Queries<C, false> {
  uint32_t low;
};

// `keys`: low word of the tile's descriptor.
template <class C>
__device__ __forceinline__ void issue_scores(float (&score)[32],
                                             const Queries<C, C::kQueryInRegisters>& query,
                                             uint32_t keys) {
  uint32_t low = 0;
  if constexpr (!C::kQueryInRegisters) low = kept(query.low);  // else each step's is kept
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {
    const uint32_t offset = (step / 4 * C::kChunk + step % 4 * 32) / 16;
    const uint64_t b = wgmma_descriptor_at(keys + offset);
    if constexpr (C::kQueryInRegisters) {
      Wgmma<typename C::Product, 64>::rs(score, query.words[step], b, step == 0);
    } else {
      Wgmma<typename C::Product, 64>::ss(score, wgmma_descriptor_at(low + offset), b, step == 0);
    }
  }
  wgmma_commit();
}

// `values`: low word of the tile's descriptor.
template <class C>
__device__ __forceinline__ void issue_values(float (&out)[C::kDim / 2], const uint32_t (&p)[4][4],
                                             uint32_t values, bool first) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if constexpr (C::kPacked) {
      Wgmma<typename C::Product, C::kDim>::rs(out, p[step], wgmma_descriptor_at(values + step * 2),
                                              first && step == 0);
    } else {
      Wgmma<typename C::Product, C::kDim>::rs_transposed(
          out, p[step], wgmma_descriptor_at(values + step * 128), first && step == 0);
    }
  }
  wgmma_commit();
}

// Scales and zeros of the lane's two tokens of columns 8 j, in `meta`.
__device__ __forceinline__ void load_scale_zero(float2 (&pair)[2], uint32_t meta, int j, int lane) {
  uint32_t words[4];
  load_shared<16>(words, meta + (j * 8 + lane % 4 * 2) * 8);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pair[i] = {__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1])};
  }
}

// Scores as the definition has them: of a packed tile's integers, and masked. Row g + 8 r sees the tokens
// below limit[r].
template <class C, bool kMasked>
__device__ __forceinline__ void finish_scores(float (&score)[32], const float (&query_sum)[2],
                                              uint32_t meta, const int (&limit)[2], int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float2 pair[2];
    if constexpr (C::kPacked) load_scale_zero(pair, meta, j, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = score[j * 4 + i];
      if constexpr (C::kPacked) x = packed_score(x, pair[i % 2], query_sum[i / 2]);
      if constexpr (kMasked) {
        if (j * 8 + lane % 4 * 2 + i % 2 >= limit[i / 2]) x = -INFINITY;
      }
    }
  }
}

// Scores → probabilities times V's scale, in place; factor: of what the part has summed so far.
template <class C>
__device__ __forceinline__ void softmax_tile(float (&score)[32], RowState& state,
                                             float (&factor)[2], uint32_t value_meta,
                                             float scale_log2, int lane) {
  constexpr float kShift = kProbabilityShift<typename C::T, C::kBits>;
  float offset[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = fmaxf(score[2 * r], score[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < 8; ++j) {
      largest = fmaxf(largest, fmaxf(score[j * 4 + 2 * r], score[j * 4 + 2 * r + 1]));
    }
    largest = fmaxf(state.row_max[r], quad_max(largest));
    const float at = max_offset(largest, scale_log2);
    factor[r] = rescale_factor(state.row_max[r], at, scale_log2);
    offset[r] = kShift - at;
    state.row_max[r] = largest;
  }
  float sum[4] = {};
  float zero[4] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float2 pair[2];
    if constexpr (C::kPacked) load_scale_zero(pair, value_meta, j, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = fast_exp2(fmaf(score[j * 4 + i], scale_log2, offset[i / 2]));
      sum[i] += x;
      score[j * 4 + i] = x;
      if constexpr (C::kPacked) {
        zero[i] = fmaf(x, pair[i % 2].y, zero[i]);
        score[j * 4 + i] = __fmul_rn(x, pair[i % 2].x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    state.sum[i / 2][i % 2] = fmaf(state.sum[i / 2][i % 2], factor[i / 2], sum[i]);
    if constexpr (C::kPacked) {
      state.zero[i / 2][i % 2] = fmaf(state.zero[i / 2][i % 2], factor[i / 2], zero[i]);
    }
  }
}

// Rows `row` and `row` + 8 of the queries in shared memory, as A fragments.
template <class C>
__device__ __forceinline__ void load_query_words(uint32_t (&words)[C::kDim / 16][4], uint32_t query,
                                                 int row, int lane) {
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t word[4];
      load_shared<4>(word, query + HalfTile<C::kDim>::offset(row + i % 2 * 8,
                                                             step * 16 + i / 2 * 8 + lane % 4 * 2));
      words[step][i] = word[0];
    }
  }
}

// Those words as products take them, here and, unless they stay as they are, in shared memory.
template <class C>
__device__ __forceinline__ void convert_query_words(uint32_t (&words)[C::kDim / 16][4],
                                                    uint32_t query, int row, int lane) {
  if (__is_same(typename C::T, typename C::Product)) return;
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[step][i] = product_pair<typename C::T, C::kBits>(words[step][i]);
      const int dim = step * 16 + i / 2 * 8 + lane % 4 * 2;
      store_shared(query + HalfTile<C::kDim>::offset(row + i % 2 * 8, dim), words[step][i]);
    }
  }
}

}  // namespace turbomind::cuda
