// The producer warp of decode attention: keeps the ring of KV tiles full, ahead of the units, and in a
// step without prefill rows completes the tiles that new tokens belong to. Their copies start with all
// others, before the kernel before this one has ended; when it has, the warp rotates K, puts K and V into
// the tiles in shared memory, exactly as the cache will hold them, and once into the cache. A consumer
// sees full tiles only. Device only.
#pragma once

#include "backend/cuda/device/decode_unit.cuh"

namespace turbomind::cuda::decode {

// Arrivals that complete the barrier of a tile.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr int kTileArrivals = kWarpArrivals;
#else
inline constexpr int kTileArrivals = 32;
#endif

// How L2 is to hold tiles: those that one CTA reads, once, make room before all else, among it the parts that
// wait to be folded.
__device__ __forceinline__ uint64_t tile_policy(const Params& p) {
  uint64_t policy;
  if (p.column_blocks == 1) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// One tile into a slot, by the lanes of the producer warp.
template <class C>
__device__ __forceinline__ void load_slot(uint32_t slot, uint32_t barrier, const char* tile,
                                          uint64_t policy, int lane) {
  constexpr int kBytes = kTileBytes<C::kDim, C::kBits>;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (lane == 0) {
    mbarrier_expect_bytes(barrier, kBytes);
    bulk_load(slot, tile, kBytes, barrier, policy);
  } else if (lane < kTileArrivals) {
    mbarrier_arrive(barrier);
  }
#else
  for (int i = lane * 16; i < kBytes; i += 32 * 16) cp_async_16(slot + i, tile + i, true);
  mbarrier_arrive_copies(barrier);
#endif
}

// The new tokens whose keys lie in a tile of a part: [begin, end) of the sequence's rows.
struct NewRows {
  int begin = 0;
  int end = 0;
};
__device__ __forceinline__ NewRows new_rows(const Unit& unit, int tile) {
  const int first_key = (unit.part * kPartTiles + tile) * kBlockTokens;
  return {max(first_key, unit.history) - unit.history,
          min(first_key + kBlockTokens, unit.num_keys) - unit.history};
}
// The first tile of a part with new tokens; unit.tiles: none.
__device__ __forceinline__ int first_new_tile(const Params& p, const Unit& unit) {
  if (!p.rotates() || unit.sequence < 0) return unit.tiles;
  return min(unit.tiles, max(0, unit.history / kBlockTokens - unit.part * kPartTiles));
}

// Tiles on their way that new tokens belong to, of one unit: how many of its keys (low four bits) and of
// its values (the next four).
struct NewTiles {
  Unit unit;
  int first = 0;     // tile
  RingCursor place;  // of its keys; those of its values lie unit.tiles further
  uint32_t issued = 0;
  uint32_t finished = 0;
  uint32_t parities = 0;  // of Barriers::landed, a bit each
};

// Completes what is pending, keys first: new tokens go to the tile's copy in shared memory (other CTAs may
// have one too) and, by the CTA of the first columns, to the cache.
template <class C>
__device__ __forceinline__ void finish_new_tiles(NewTiles& tiles, bool& waited,
                                                 Exchange<C>& exchange, Barriers& barriers,
                                                 const Params& p, char* slots, int lane) {
  const DecodeAttentionArgs& a = p.args;
  const Unit& unit = tiles.unit;
#pragma unroll 1
  while (tiles.finished != tiles.issued) {
    const bool is_v = (tiles.finished & 15) == (tiles.issued & 15);
    const int i = static_cast<int>(tiles.finished >> (is_v ? 4 : 0) & 15);
    tiles.finished += is_v ? 16 : 1;
    const NewRows rows = new_rows(unit, tiles.first + i);
    RingCursor at = tiles.place;
    at.advance(i, p.slots);
    if (is_v) at.advance(unit.tiles, p.slots);
    char* tile = slots + at.slot * C::kSlotBytes;
    const int bit = (is_v ? 2 : 0) + i;
#pragma unroll 1
    for (int row = rows.begin; row < rows.end; ++row) {
      const int position = __ldcg(a.step.positions + unit.row + row);
      const int slot = unit.column0 == 0 ? __ldcg(a.step.slots + unit.row + row) : -1;
      Rotation rotation{};
      if (!is_v) rotation = rotation_at<C::kDim>(a.rope, position, lane);
      if (!waited) grid_dependency_wait();
      waited = true;
      Head head = load_head<typename C::T, C::kDim>(
          qkv_head<C>(a, unit.row + row, a.num_heads + (is_v ? a.num_kv_heads : 0) + unit.kv_head),
          lane);
      if (!is_v) norm_and_rotate<C::kDim>(head, a.rope.k_norm, a.rope.k_norm_eps, rotation, lane);
      char* cached = slot >= 0 ? cache_tile<C::kDim, C::kBits>(a.cache, slot / kBlockTokens,
                                                               a.num_kv_heads, unit.kv_head, is_v)
                               : nullptr;
      mbarrier_wait(smem_address(&barriers.landed[0][0]) + bit * 8, tiles.parities >> bit & 1);
      store_in_tiles<typename C::T, C::kDim, C::kBits>(
          tile, cached, (unit.history + row) % kBlockTokens, is_v, head, exchange.levels, lane);
    }
    tiles.parities ^= 1U << bit;
    fence_async_shared();  // the slot is written by a bulk copy next
    __syncwarp();
    if (lane < kTileArrivals) mbarrier_arrive(smem_address(&barriers.full[at.slot]));
  }
}

template <class C>
__device__ __forceinline__ void produce(Exchange<C>& exchange, Barriers& barriers, const Params& p,
                                        char* slots, const Run& run, int lane) {
  constexpr int64_t kBytes = kTileBytes<C::kDim, C::kBits>;
  const DecodeAttentionArgs& a = p.args;
  bool waited = !p.rotates();
  if (waited) grid_dependency_wait();  // else nothing that is fetched was written in this step
  const auto block_of = [&](const Unit& unit) {
    if (unit.sequence < 0 || lane >= unit.tiles) return 0;
    return __ldcg(a.step.block_table + unit.sequence * __ldcg(a.step.block_stride) +
                  unit.part * kPartTiles + lane);
  };
  const uint64_t policy = tile_policy(p);
  const uint32_t ring = smem_address(slots);
  const uint32_t full = smem_address(barriers.full);
  const uint32_t empty = smem_address(barriers.empty);
  const uint32_t landed = smem_address(&barriers.landed[0][0]);
  RingCursor at{0, 1};  // the first wait for each slot passes at once
  NewTiles tiles;
  Unit unit;  // whose tiles are next: number `i` of its keys, then of its values
  int i = 0;
  Units<C> next;
  next.find(p, run);
  int next_block = block_of(next.unit);
  int block = 0;
  for (;;) {
    bool more = true;
    while (more && (unit.sequence < 0 || i == 2 * unit.tiles)) {
      more = next.any(run);
      if (!more) break;
      // The next unit is looked up before this one waits for room.
      unit = next.unit;
      block = next_block;
      i = 0;
      ++next.done;
      next.find(p, run);
      next_block = block_of(next.unit);
    }
    const bool values = i >= unit.tiles;
    const int tile = values ? i - unit.tiles : i;
    const int first = first_new_tile(p, unit);
    const bool begins = tile == first && !values;
    // Consumers may need what is pending before they make room.
    if (tiles.finished != tiles.issued &&
        (!more || begins || __any_sync(~0U, !mbarrier_test(empty + at.slot * 8, at.parity)))) {
      finish_new_tiles<C>(tiles, waited, exchange, barriers, p, slots, lane);
    }
    if (!more) break;
    const int64_t id = __shfl_sync(~0U, block, tile);
    mbarrier_wait(empty + at.slot * 8, at.parity);
    uint32_t barrier = full + at.slot * 8;
    if (tile >= first) {
      if (begins) {
        tiles.unit = unit;
        tiles.first = first;
        tiles.place = at;
        tiles.issued = tiles.finished = 0;
      }
      barrier = landed + (values * 2 + tile - first) * 8;
      tiles.issued += values ? 16 : 1;
    }
    load_slot<C>(ring + at.slot * C::kSlotBytes, barrier,
                 static_cast<const char*>(a.cache) +
                     ((id * a.num_kv_heads + unit.kv_head) * 2 + (values ? 1 : 0)) * kBytes,
                 policy, lane);
    at.advance(1, p.slots);
    ++i;
  }
}

}  // namespace turbomind::cuda::decode
