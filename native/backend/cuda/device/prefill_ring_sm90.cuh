// Prefill attention on wgmma: what its producer and its consumers agree on. The configuration of a kernel,
// the ring of KV tiles in shared memory with its barriers, and which query rows a CTA takes. Device,
// and the counts for the host.
#pragma once

#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/device/prefill_work.cuh"

namespace turbomind::cuda {

template <class TYPE, int DIM, int BITS, bool PAGED>
struct PrefillConfig {
  using T = TYPE;
  using Product = ProductType<TYPE, BITS>;
  static constexpr int kDim = DIM;
  static constexpr int kBits = BITS;
  static constexpr bool kPaged = PAGED;
  static constexpr bool kPacked = kBits != 16;
  // CTAs of the vision tower take several items in turn: theirs are short and alike, so that the start of
  // one lies under the end of another. Causal ones differ, and gain nothing.
  static constexpr bool kPersistent = !kPaged;
  static constexpr int kGroups = !kPaged && kDim == 64 ? 3 : 2;  // consumer warpgroups
  static constexpr int kGroupRows = 64;
  static constexpr int kRows = kGroups * kGroupRows;
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kChunk = kBlockTokens * 128;  // 64 rows of 64 dims
  static constexpr int kChunks = kDim / 64;
  static constexpr int kQueryBytes = kGroups * kChunks * kChunk;
  static constexpr int kHalfBytes = HalfTile<kDim>::kBytes;
  static constexpr int kMetaBytes = kPacked ? kBlockTokens * 8 : 0;  // of K, and of V
  static constexpr int kStageBytes = 2 * kHalfBytes + 2 * kMetaBytes;
  static constexpr int kTile = kTileBytes<kDim, kBits>;
  static constexpr int kPackedSlot = kPacked ? (2 * kTile + 127) / 128 * 128 : 0;
  static constexpr int kPackedSlots = 2;
  static constexpr int kProducers = kPacked ? 4 : 1;  // warps
  static constexpr bool kQueryInRegisters = !kPacked;
  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : kPacked ? 56 : 24;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : kPacked ? 224 : 240;
  // At the barrier of a full stage: one thread of the warp that copies, or of the four that unpack.
  static constexpr int kFullArrivals =
      kPacked && kWarpArrivals > 1 ? 4 * kWarpArrivals : kWarpArrivals;
  static_assert(HalfTile<kDim>::kRowBytes == 128 && kStageBytes % 1024 == 0);
};

inline constexpr int kMaxPrefillStages = 6;

struct PrefillRing {
  uint32_t stages;  // shared address
  uint32_t full;    // barriers
  uint32_t empty;
  uint32_t query;       // shared address
  uint32_t query_full;  // barriers: the queries and `work` have come, are no longer needed
  uint32_t query_empty;
  uint32_t packed;       // shared address
  uint32_t packed_full;  // barriers; of 16 bits: a tile that is not whole
  PrefillWork* work;     // shared, two in turn; where CTAs stay
  int num_stages;
};

// What a launch for the vision tower works on: for each head and vision tile, rows of kRows.
struct PrefillItems {
  int heads;
  int query_tiles;  // of a vision tile
  int vision_tiles;

  __host__ __device__ int count() const { return heads * query_tiles * vision_tiles; }
  // The CTA's item of a round, every second round backwards, so that those of one CTA are of all kinds. May
  // lie past the last item.
  __device__ __forceinline__ int index(int round) const {
    const int grid = static_cast<int>(gridDim.x);
    const int cta = static_cast<int>(blockIdx.x);
    return round * grid + (round % 2 == 0 ? cta : grid - 1 - cta);
  }
  // Whole query tiles first, one vision tile after the other. A sequence < 0: nothing is left.
  template <class C>
  __device__ __forceinline__ PrefillWork find(const PrefillParams& p, int item) const {
    if (item >= count()) return {.sequence = -1};
    const int row = item / heads;
    const int head = item % heads;
    const int whole = p.tokens / C::kRows;
    const int last = row - whole * vision_tiles;
    if (last >= 0) return find_prefill_work<false, C::kRows>(p, head, whole, last);
    return find_prefill_work<false, C::kRows>(p, head, row % whole, row / whole);
  }
};

// A place in the ring, and the parity of what is awaited there.
struct RingPlace {
  int stage = 0;
  uint32_t parity;
  __device__ __forceinline__ void step(int num_stages) {  // to the next
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace turbomind::cuda
