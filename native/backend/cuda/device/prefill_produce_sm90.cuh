// Prefill attention on wgmma, the producer warpgroup: a CTA's queries, and a ring of KV tiles in the layouts
// that wgmma reads. 16-bit tiles come by bulk copies, rows of vision tiles through tensor maps, 8 and
// 4-bit tiles are unpacked: keys as [token][dim], values transposed, [dim][token], which is how a lane's
// packed words lie, and their scales and zeros as pairs of f32. Device only, sm_90a only.
#pragma once

#include "backend/cuda/device/hopper.cuh"
#include "backend/cuda/device/prefill_ring_sm90.cuh"

namespace turbomind::cuda {

// Blocks of a sequence, looked up by a warp, 32 at once and 32 tiles ahead.
struct BlockIds {
  const int32_t* row;
  int tiles;
  int lane;
  int now = 0;
  int next = 0;
  __device__ __forceinline__ BlockIds(const PrefillParams& p, const PrefillWork& work, int lane)
      : row(p.step.block_table + work.sequence * *p.step.block_stride),
        tiles(work.tiles),
        lane(lane) {
    next = load(0);
  }
  __device__ __forceinline__ int load(int first) const {
    return first + lane < tiles ? row[first + lane] : 0;
  }
  // Tiles in order, by all lanes.
  __device__ __forceinline__ int64_t block(int tile) {
    if (tile % 32 == 0) {
      now = next;
      next = load(tile + 32);
    }
    return __shfl_sync(~0U, now, tile % 32);
  }
};

template <class C>
__device__ __forceinline__ const char* prefill_tile(const PrefillParams& p, const PrefillWork& work,
                                                    int64_t block) {
  return static_cast<const char*>(p.cache) +
         (block * p.num_kv_heads + work.kv_head) * (2 * static_cast<int64_t>(C::kTile));
}

// Where the producer stands, in all its items.
struct ProducerPlace {
  RingPlace ring{.parity = 1};
  uint32_t query = 1;  // parity of query_empty
  int packed = 0;      // packed tiles; of 16 bits: tiles that were not whole
};

// By one thread. Where CTAs stay, it tells the consumers what to do next, or that nothing is left
// (work.sequence < 0), once they have taken the queries before.
template <class C>
__device__ __forceinline__ void load_queries(const PrefillRing& ring, const void* map,
                                             const PrefillWork& work, uint32_t parity) {
  if constexpr (C::kPersistent) {
    mbarrier_wait(ring.query_empty, parity);
    ring.work[parity ^ 1] = work;
    if (work.sequence < 0) {
      mbarrier_arrive(ring.query_full);
      return;
    }
  }
  mbarrier_expect_bytes(ring.query_full, C::kQueryBytes);
  for (int g = 0; g < C::kGroups; ++g) {
    for (int c = 0; c < C::kChunks; ++c) {
      tensor_load_2d(
          ring.query + (g * C::kChunks + c) * C::kChunk, map, work.head * C::kDim + c * 64,
          static_cast<int>(work.row0) + work.first_query + g * C::kGroupRows, ring.query_full);
    }
  }
}

// 16-bit tiles, by one warp: `load(tile, address, barrier)` starts the copies, all lanes call it. What lies
// past the last key may be no numbers: those rows of V are zeroed before the consumers are told.
template <class C, class F>
__device__ __forceinline__ void produce_halves(const PrefillRing& ring, const PrefillWork& work,
                                               ProducerPlace& place, int lane, F&& load) {
  for (int tile = 0; tile < work.tiles; ++tile) {
    mbarrier_wait(ring.empty + place.ring.stage * 8, place.ring.parity);
    const uint32_t to = ring.stages + place.ring.stage * C::kStageBytes;
    const uint32_t full = ring.full + place.ring.stage * 8;
    const int valid = work.num_keys - tile * kBlockTokens;
    const bool whole = valid >= kBlockTokens;
    const uint32_t barrier = whole ? full : ring.packed_full;
    if (lane == 0) mbarrier_expect_bytes(barrier, 2 * C::kHalfBytes);
    load(tile, to, barrier);
    if (!whole) {  // the last tile
      mbarrier_wait(barrier, place.packed++ % 2);
      constexpr int kPieces = C::kDim / 8;
      for (int i = lane; i < (kBlockTokens - valid) * kPieces; i += 32) {
        store_shared_zero16(to + C::kHalfBytes +
                            HalfTile<C::kDim>::offset(valid + i / kPieces, i % kPieces * 8));
      }
      fence_async_shared();
      __syncwarp();
      if (lane < C::kFullArrivals) mbarrier_arrive(full);
    } else if (lane > 0 && lane < C::kFullArrivals) {
      mbarrier_arrive(full);
    }
    place.ring.step(ring.num_stages);
  }
}

template <class C>
__device__ __forceinline__ void produce_paged(const PrefillParams& p, const PrefillRing& ring,
                                              const PrefillWork& work, ProducerPlace& place,
                                              int lane) {
  BlockIds ids(p, work, lane);
  produce_halves<C>(ring, work, place, lane, [&](int tile, uint32_t to, uint32_t barrier) {
    const char* source = prefill_tile<C>(p, work, ids.block(tile));
    if (lane == 0) bulk_load(to, source, 2 * C::kHalfBytes, barrier);
  });
}

template <class C>
__device__ __forceinline__ void produce_rows(const PrefillParams& p, const PrefillRing& ring,
                                             const PrefillWork& work, ProducerPlace& place,
                                             const void* map, int lane) {
  const int columns = p.num_kv_heads * C::kDim;
  produce_halves<C>(ring, work, place, lane, [&](int tile, uint32_t to, uint32_t barrier) {
    if (lane != 0) return;
    const int row = static_cast<int>(work.row0) + tile * kBlockTokens;
    for (int c = 0; c < C::kChunks; ++c) {
      const int column = columns + work.kv_head * C::kDim + c * 64;
      tensor_load_2d(to + c * C::kChunk, map, column, row, barrier);
      tensor_load_2d(to + C::kHalfBytes + c * C::kChunk, map, column + columns, row, barrier);
    }
  });
}

__device__ __forceinline__ void store_pair(uint32_t address, float2 pair) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(address), "f"(pair.x), "f"(pair.y)
               : "memory");
}

// Packed tiles → integers in f16, by four warps: 16 keys and every fourth 16 dims of V each. A lane's
// words hold two values that lie together: `at` is where its first word of 128-byte row lane / 4 goes
// when it belongs to the first 16 bytes, others are 16 bytes times an exclusive or away (the swizzle).
template <class C>
__device__ __forceinline__ void unpack_prefill_tile(uint32_t to, uint32_t from, int warp,
                                                    int lane) {
  using Keys = KeyFragments<C::kDim, C::kBits>;
  using Values = ValueFragments<C::kDim, C::kBits>;
  constexpr int kSteps = C::kDim / 16;
  const uint32_t at = to + warp * 2048 + lane / 4 * 144 + lane % 4 * 4;
#pragma unroll
  for (int s = 0; s < kSteps; s += Keys::kGroup) {
    typename Keys::Words words;
    Keys::load_words(words, from, warp * 16, s, lane);
#pragma unroll
    for (int e = 0; e < Keys::kGroup; ++e) {
      uint32_t a[4];
      Keys::unpack(a, words, e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // key + 8 (i % 2), dims 16 (s + e) + 8 (i / 2)
        const uint32_t chunk = (s + e) % 4 * 2 + i / 2;
        store_shared((at ^ chunk << 4) + (s + e) / 4 * C::kChunk + i % 2 * 1024, a[i]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kSteps / 4; ++m) {
    typename Values::Words words;
    Values::load_words(words, from + C::kTile, warp + m * 4, lane);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[4];
      Values::unpack(a, words, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // dim + 8 (i % 2), tokens 16 step + 8 (i / 2)
        const uint32_t chunk = step * 2 + i / 2;
        store_shared((at ^ chunk << 4) + C::kHalfBytes + m * 8192 + i % 2 * 1024, a[i]);
      }
    }
  }
}

// One bulk copy ahead of the tile that is unpacked, by four warps.
template <class C>
__device__ __forceinline__ void produce_unpacked(const PrefillParams& p, const PrefillRing& ring,
                                                 const PrefillWork& work, ProducerPlace& place,
                                                 int thread) {
  const int warp = thread / 32;
  const int lane = thread % 32;
  BlockIds ids(p, work, lane);
  const int first = place.packed;
  const auto fetch = [&](int tile) {
    if (warp != 0 || tile >= work.tiles) return;
    const char* source = prefill_tile<C>(p, work, ids.block(tile));
    const int slot = (first + tile) % 2;
    if (lane != 0) return;
    mbarrier_expect_bytes(ring.packed_full + slot * 8, 2 * C::kTile);
    bulk_load(ring.packed + slot * C::kPackedSlot, source, 2 * C::kTile,
              ring.packed_full + slot * 8);
  };
  fetch(0);
  for (int tile = 0; tile < work.tiles; ++tile, ++place.packed) {
    fetch(tile + 1);
    __syncwarp();
    const int slot = place.packed % 2;
    mbarrier_wait(ring.packed_full + slot * 8, place.packed / 2 % 2);
    mbarrier_wait(ring.empty + place.ring.stage * 8, place.ring.parity);
    const uint32_t from = ring.packed + slot * C::kPackedSlot;
    const uint32_t to = ring.stages + place.ring.stage * C::kStageBytes;
    {  // K's scales and zeros, then V's; what lies past the last key is no number
      const int token = thread % kBlockTokens;
      uint32_t word[4];
      load_shared<4>(word, from + (thread / 64 + 1) * C::kTile - kBlockTokens * 4 + token * 4);
      const bool seen = tile * kBlockTokens + token < work.num_keys;
      const float2 pair = seen ? unpack_scale_zero<C::kBits>(word[0]) : float2{0.0F, 0.0F};
      store_pair(to + 2 * C::kHalfBytes + thread * 8, pair);
    }
    unpack_prefill_tile<C>(to, from, warp, lane);
    fence_async_shared();
    named_barrier<1>(128);  // before the slot is filled again, and before the consumers read
    if (thread < C::kFullArrivals) mbarrier_arrive(ring.full + place.ring.stage * 8);
    place.ring.step(ring.num_stages);
  }
}

template <class C>
__device__ __forceinline__ void produce_item(const PrefillParams& p, const PrefillRing& ring,
                                             const PrefillWork& work, ProducerPlace& place,
                                             const void* map, int thread) {
  if (thread == 0) load_queries<C>(ring, map, work, place.query);
  __syncwarp();
  place.query ^= 1;
  if constexpr (!C::kPaged) {
    if (work.sequence >= 0) produce_rows<C>(p, ring, work, place, map, thread);
  } else if constexpr (!C::kPacked) {
    produce_paged<C>(p, ring, work, place, thread);
  } else {
    produce_unpacked<C>(p, ring, work, place, thread);
  }
}

// The producer warpgroup. `only`: the CTA's item where CTAs do not stay.
template <class C>
__device__ __forceinline__ void produce(const PrefillParams& p, const PrefillItems& items,
                                        const PrefillRing& ring, const PrefillWork& only,
                                        const void* map) {
  const int thread = threadIdx.x % 128;
  if (thread / 32 >= C::kProducers) return;
  ProducerPlace place;
  if constexpr (!C::kPersistent) {
    produce_item<C>(p, ring, only, place, map, thread);
  } else {
    for (int round = 0;; ++round) {
      const PrefillWork work = items.find<C>(p, items.index(round));
      produce_item<C>(p, ring, work, place, map, thread);
      if (work.sequence < 0) return;  // none is left
    }
  }
}

}  // namespace turbomind::cuda
