// Prefill attention on wgmma, a consumer warpgroup: 64 query rows of one head against the ring's KV tiles,
// by the definition in flash.cuh. Scores of tile j + 1 are issued before the product of tile j with V,
// which runs while the softmax of j + 1 is computed. Device only, sm_90a only.
#pragma once

#include "backend/cuda/device/prefill_softmax_sm90.cuh"

namespace turbomind::cuda {

// A consumer warpgroup between its tiles; arrays are registers of a thread.
template <class C>
struct PrefillConsumer {
  const PrefillRing& ring;
  const PrefillWork& only;  // the item where CTAs do not stay
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
  float total[C::kDim / 2];
  uint32_t probabilities[4][4];
  RowState state;
  RowTotal total_state;
  RingPlace place{.parity = 0};
  uint32_t query_parity = 0;

  __device__ __forceinline__ PrefillConsumer(const PrefillRing& ring, const PrefillWork& only,
                                             float scale_log2, int group)
      : ring(ring), only(only), scale_log2(scale_log2), group(group), lane(threadIdx.x % 32) {
    keys = wgmma_descriptor_low(ring.stages);
    values = C::kPacked ? wgmma_descriptor_low(ring.stages + C::kHalfBytes)
                        : wgmma_transposed_low(ring.stages + C::kHalfBytes, C::kChunk);
  }

  // The next item, or false where none is left.
  __device__ __forceinline__ bool next() {
    const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const uint32_t rows = ring.query + group * C::kChunks * C::kChunk;
    mbarrier_wait(ring.query_full, query_parity);
    query_parity ^= 1;
    if (C::kPersistent && work().sequence < 0) return false;
    query0 = work().first_query + group * C::kGroupRows + row;
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
    if constexpr (C::kPersistent) {
      static_assert(C::kQueryInRegisters);
      __syncwarp();
      if (lane < kWarpArrivals) mbarrier_arrive(ring.query_empty);
    }
    state = RowState{};
    total_state = RowTotal{};
#pragma unroll
    for (float& x : total) x = 0.0F;
    return true;
  }
  // The item; where CTAs stay, in shared memory until the next but one.
  __device__ __forceinline__ const PrefillWork& work() const {
    if constexpr (!C::kPersistent) return only;
    return ring.work[query_parity ^ 1];
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
        const int visible = C::kPaged ? work().history + query0 + 8 * r + 1 : work().num_keys;
        limit[r] = min(visible, work().num_keys) - tile * kBlockTokens;
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
    issue_scores<C>(score, query, stage_low(keys, place.stage));
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
    for (int tile = first; tile < work().tiles; ++tile) {
      await_tile(place);
      release(place.stage);
      place.step(ring.num_stages);
    }
  }

  __device__ __forceinline__ void run() {
    const int first_query = work().first_query + group * C::kGroupRows;
    const int last_query = min(first_query + C::kGroupRows, work().num_queries) - 1;
    int tiles = work().tiles;  // that this warpgroup's rows see
    if (last_query < first_query) {
      tiles = 0;
    } else if (C::kPaged) {
      tiles = (work().history + last_query + kBlockTokens) / kBlockTokens;
    }
    if (tiles > 0) {
      const int whole = min(  // tiles that all rows see whole
          tiles, (C::kPaged ? work().history + first_query + 1 : work().num_keys) / kBlockTokens);
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
      if (query0 + 8 * r >= work().num_queries) continue;
      auto* y = static_cast<typename C::T*>(p.y) + (work().row0 + query0 + 8 * r) * p.ldy +
                work().head * C::kDim + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < C::kDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(y + j * 8) = pack_pair<typename C::T>(
            total[j * 4 + 2 * r] * inverse, total[j * 4 + 2 * r + 1] * inverse);
      }
    }
  }
};

}  // namespace turbomind::cuda
