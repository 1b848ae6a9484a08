// Prefill attention on wgmma, a consumer warpgroup: 64 query rows of one head against the ring's KV tiles,
// by the definition in flash.cuh. Scores of tile j + 1 are issued before the product of tile j with V,
// which runs while the softmax of j + 1 is computed. Device only, sm_90a only.
#pragma once

#include "backend/cuda/device/flash_sm90.cuh"
#include "backend/cuda/device/prefill_produce_sm90.cuh"

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
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {
    const uint32_t offset = (step / 4 * C::kChunk + step % 4 * 32) / 16;
    const uint64_t b = wgmma_descriptor_at(keys + offset);
    if constexpr (C::kQueryInRegisters) {
      Wgmma<typename C::Product, 64>::rs(score, query.words[step], b, step == 0);
    } else {
      Wgmma<typename C::Product, 64>::ss(score, wgmma_descriptor_at(query.low + offset), b,
                                         step == 0);
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
      WgmmaTransposed<typename C::Product, C::kDim>::rs(
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

// A consumer warpgroup between its tiles; arrays are registers of a thread.
template <class C>
struct PrefillConsumer {
  const PrefillRing& ring;
  const PrefillWork& work;
  float scale_log2;
  int group;
  int lane;
  int query0;  // of the lane's first row
  Queries<C, C::kQueryInRegisters> query;
  uint32_t keys;  // low words of the descriptors of stage 0
  uint32_t values;
  float query_sum[2] = {};
  float score[32];
  float out[C::kDim / 2];
  float total[C::kDim / 2] = {};
  uint32_t probabilities[4][4];
  RowState state;
  RowTotal total_state;
  RingPlace place{.parity = 0};

  __device__ __forceinline__ PrefillConsumer(const PrefillRing& ring, const PrefillWork& work,
                                             float scale_log2, int group)
      : ring(ring), work(work), scale_log2(scale_log2), group(group), lane(threadIdx.x % 32) {
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t rows = ring.query + group * C::kChunks * C::kChunk;
    query0 = work.first_query + group * C::kGroupRows + row;
    keys = wgmma_descriptor_low(ring.stages);
    values = C::kPacked ? wgmma_descriptor_low(ring.stages + C::kHalfBytes)
                        : wgmma_transposed_low(ring.stages + C::kHalfBytes, C::kChunk);
    mbarrier_wait(ring.query_full, 0);
    if constexpr (C::kQueryInRegisters) {
      load_query_words<C>(query.words, rows, row, lane);
    } else {
      query.low = wgmma_descriptor_low(rows);
    }
    if constexpr (C::kPacked) {
      uint32_t words[C::kDim / 16][4];
      load_query_words<C>(words, rows, row, lane);
      convert_query_words<C>(words, rows, row, lane);
      if (!__is_same(typename C::T,
                     typename C::Product)) {  // wgmma reads all of the warpgroup's rows
        fence_async_shared();
        group == 0 ? named_barrier<2>(128) : named_barrier<3>(128);
      }
      query_sums<typename C::Product, C::kDim / 16>(query_sum, words);
    }
  }

  __device__ __forceinline__ void await_tile(const RingPlace& at) const {
    mbarrier_wait(ring.full + at.stage * 8, at.parity);
  }
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (lane < kWarpArrivals) mbarrier_arrive(ring.empty + stage * 8);
  }
  __device__ __forceinline__ uint32_t stage_low(uint32_t low, int stage) const {
    return low + stage * (C::kStageBytes / 16);
  }

  template <bool kMasked>
  __device__ __forceinline__ void softmax(float (&factor)[2], int tile) {
    const uint32_t meta = ring.stages + place.stage * C::kStageBytes + 2 * C::kHalfBytes;
    int limit[2] = {};
    if constexpr (kMasked) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int visible = C::kPaged ? work.history + query0 + 8 * r + 1 : work.num_keys;
        limit[r] = min(visible, work.num_keys) - tile * kBlockTokens;
      }
    }
    if constexpr (kMasked || C::kPacked) {
      finish_scores<C, kMasked>(score, query_sum, meta, limit, lane);
    }
    softmax_tile<C>(score, state, factor, meta + C::kMetaBytes, scale_log2, lane);
  }
  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = step * 8 + i / 2 * 4 + i % 2 * 2;
        probabilities[step][i] =
            pack_probabilities<typename C::T, C::kBits>(score[j], score[j + 1]);
      }
    }
  }

  // Probabilities of tile 0.
  __device__ __forceinline__ void begin(int tiles) {
    await_tile(place);
    wgmma_fence();
    issue_scores<C>(score, query, keys);
    wgmma_wait<0>();
    float factor[2];
    softmax<true>(factor, 0);
    pack();
    await_next(0, tiles);
  }
  // Between a tile's softmax and the wait for the product before it: the next tile's arrival. The compiler
  // moves exponentials down past the product's wait, and past a loop too, unless the loop needs them:
  // so the barrier's address takes zero bits of their sums.
  __device__ __forceinline__ void await_next(int tile, int tiles) const {
    RingPlace next = place;
    next.step(ring.num_stages);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= __float_as_uint(state.sum[i / 2][i % 2]);
    const uint32_t none = bits & (static_cast<uint32_t>(ring.num_stages) >> 16);
    if (tile + 1 < tiles) mbarrier_wait(ring.full + next.stage * 8 + none, next.parity);
  }
  // From the probabilities of tile - 1 to those of `tile`, which has arrived. No product is in flight
  // before or after. starts: the tile is the first of a part.
  template <bool kMasked>
  __device__ __forceinline__ void advance(int tile, int tiles, bool starts) {
    const int before = place.stage;
    place.step(ring.num_stages);
    wgmma_fence();
    issue_scores<C>(score, query, stage_low(keys, place.stage));
    issue_values<C>(out, probabilities, stage_low(values, before), (tile - 1) % kPartTiles == 0);
    wgmma_wait<1>();
    PartFold part;
    if (starts) {
      part = fold_sums();
      state = RowState{};
    }
    float factor[2];
    softmax<kMasked>(factor, tile);
    await_next(tile, tiles);
    wgmma_wait<0>();
    release(before);
    if (starts) {
      fold_out(part);
    } else {
#pragma unroll
      for (int i = 0; i < C::kDim / 2; ++i) out[i] *= factor[i % 4 / 2];
    }
    pack();
  }
  template <bool kMasked>
  __device__ __forceinline__ void advance(int first, int end, int tiles) {
    for (int tile = first; tile < end; ++tile) {
      const bool starts = tile % kPartTiles == 0;
      if constexpr (C::kPacked) {  // in one copy for both, fewer registers are needed
        advance<kMasked>(tile, tiles, starts);
      } else if (starts) {
        advance<kMasked>(tile, tiles, true);
      } else {
        advance<kMasked>(tile, tiles, false);
      }
    }
  }
  // A finished part's sums into the total; its output follows with fold_out.
  __device__ __forceinline__ PartFold fold_sums() {
    PartFold part;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(state.sum[r][0] + state.sum[r][1]);
      part.factors[r] = fold_factors(total_state.row_max[r], state.row_max[r], scale_log2);
      total_state.sum[r] = fold(total_state.sum[r], sum, part.factors[r]);
      part.zero[r] = C::kPacked ? quad_sum(state.zero[r][0] + state.zero[r][1]) : 0.0F;
    }
    return part;
  }
  __device__ __forceinline__ void fold_out(const PartFold& part) {
#pragma unroll
    for (int i = 0; i < C::kDim / 2; ++i) {
      const int r = i % 4 / 2;
      total[i] = fold(total[i], C::kPacked ? out[i] + part.zero[r] : out[i], part.factors[r]);
    }
  }
  // The last product.
  __device__ __forceinline__ void finish(int tiles) {
    wgmma_fence();
    issue_values<C>(out, probabilities, stage_low(values, place.stage),
                    (tiles - 1) % kPartTiles == 0);
    const PartFold part = fold_sums();
    wgmma_wait<0>();
    release(place.stage);
    place.step(ring.num_stages);
    fold_out(part);
  }
  // Tiles that other warpgroups alone see.
  __device__ __forceinline__ void pass_over(int first) {
    for (int tile = first; tile < work.tiles; ++tile) {
      await_tile(place);
      release(place.stage);
      place.step(ring.num_stages);
    }
  }

  __device__ __forceinline__ void run() {
    const int first_query = work.first_query + group * C::kGroupRows;
    const int last_query = min(first_query + C::kGroupRows, work.num_queries) - 1;
    int tiles = work.tiles;  // that this warpgroup's rows see
    if (last_query < first_query) {
      tiles = 0;
    } else if (C::kPaged) {
      tiles = (work.history + last_query + kBlockTokens) / kBlockTokens;
    }
    if (tiles > 0) {
      const int whole = min(  // tiles that all rows see whole
          tiles, (C::kPaged ? work.history + first_query + 1 : work.num_keys) / kBlockTokens);
      begin(tiles);
      advance<false>(1, whole, tiles);
      advance<true>(max(1, whole), tiles, tiles);
      finish(tiles);
    }
    pass_over(tiles);
  }

  __device__ __forceinline__ void store(const PrefillParams& p) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = total_state.sum[r] > 0.0F ? 1.0F / total_state.sum[r] : 0.0F;
      if (query0 + 8 * r >= work.num_queries) continue;
      auto* y = static_cast<typename C::T*>(p.y) + (work.row0 + query0 + 8 * r) * p.ldy +
                blockIdx.x * C::kDim + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < C::kDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(y + j * 8) = pack_pair<typename C::T>(
            total[j * 4 + 2 * r] * inverse, total[j * 4 + 2 * r + 1] * inverse);
      }
    }
  }
};

}  // namespace turbomind::cuda
