// Attention of many query rows on wgmma, by the definition in flash.cuh: causal over paged keys, or over
// all keys of a vision tile. CTA: 128 query rows of one head in two consumer warpgroups of 64, and a
// producer warpgroup that keeps a ring of KV tiles full by bulk copies (16 bits), unpacks them to 16
// bits (8, 4), or cuts them from rows by tensor maps (vision). Scores of tile j + 1 are issued before the
// product of tile j with V, which runs while the softmax of j + 1 is computed.
// Bound: tensor cores. Same bits as the mma.sync kernels.
#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/device/flash_sm90.cuh"
#include "backend/cuda/gemm/tensor_map.h"
#include "backend/cuda/kernels/attention_prefill.h"

namespace turbomind::cuda {
namespace {

constexpr int kTokens = kBlockTokens;
constexpr int kGroups = 2;                        // consumer warpgroups
constexpr int kGroupRows = kQueryTile / kGroups;  // 64
constexpr int kThreads = (kGroups + 1) * 128;
constexpr int kMaxStages = 6;

struct Params {
  const void* q;      // row 0, head 0
  const void* cache;  // paged
  void* y;
  int64_t ldq;
  int64_t ldy;
  int group;  // query heads a KV head
  int num_kv_heads;
  int tokens;  // contiguous: keys and queries of a tile
  int stages;
  float scale_log2;
  StepArrays step;
};

template <class TYPE, int DIM, int BITS, bool PAGED>
struct Config {
  using T = TYPE;
  static constexpr int kDim = DIM;
  static constexpr int kBits = BITS;
  static constexpr bool kPaged = PAGED;
  static constexpr int kChunk = kTokens * 128;  // 64 rows of 64 dims
  static constexpr int kChunks = kDim / 64;
  static constexpr int kQueryBytes = kGroups * kChunks * kChunk;
  static constexpr int kHalfBytes = HalfTile<kDim>::kBytes;
  static constexpr int kMetaBytes = kBits == 16 ? 0 : kTokens * 4;
  static constexpr int kStageBytes = 2 * kHalfBytes + (kBits == 16 ? 0 : 1024);
  static constexpr int kPackedBytes = kBits == 16 ? 0 : 2 * kTileBytes<kDim, kBits>;
  static constexpr int kPackedSlot = (kPackedBytes + 127) / 128 * 128;
  static constexpr int kPackedStages = kBits == 16 ? 0 : 2;
  static constexpr int kProducerRegisters = kBits == 16 ? 24 : 56;
  static constexpr int kConsumerRegisters = kBits == 16 ? 240 : 224;
  // At the barrier of a full stage: one thread, of a tensor copy, of the warp that copies or of the four that unpack.
  static constexpr int kFullArrivals =
      !kPaged || kWarpArrivals == 1 ? 1 : (kBits == 16 ? 1 : 4) * kWarpArrivals;
  static_assert(HalfTile<kDim>::kRowBytes == 128);
};

// Query rows and keys of a CTA.
struct Work {
  int sequence;  // contiguous: vision tile
  int kv_head;
  int first_query;
  int num_queries;
  int num_keys;
  int history;  // keys before query row 0
  int tiles;    // KV tiles that any row sees
  int64_t row0;
};

template <class C>
__device__ __forceinline__ Work find_work(const Params& p) {
  Work work;
  work.kv_head = blockIdx.x / p.group;
  if constexpr (C::kPaged) {
    const int2 tile = p.step.query_tiles[gridDim.y - 1 - blockIdx.y];  // longest rows first
    work.sequence = tile.x;
    if (tile.x < 0) return work;
    work.first_query = tile.y;
    work.row0 = p.step.query_start[tile.x];
    work.num_queries = p.step.query_start[tile.x + 1] - static_cast<int>(work.row0);
    work.num_keys = p.step.kv_len[tile.x];
  } else {
    work.sequence = blockIdx.z;
    work.first_query = blockIdx.y * kQueryTile;
    work.row0 = static_cast<int64_t>(work.sequence) * p.tokens;
    work.num_queries = p.tokens;
    work.num_keys = p.tokens;
  }
  work.history = work.num_keys - work.num_queries;
  const int last_query = min(work.first_query + kQueryTile, work.num_queries) - 1;
  const int keys_end = C::kPaged ? work.history + last_query + 1 : work.num_keys;
  work.tiles = (keys_end + kTokens - 1) / kTokens;
  return work;
}

struct Ring {
  uint32_t stages;  // shared address
  uint32_t full;    // barriers
  uint32_t empty;
  uint32_t query;  // shared address
  uint32_t query_full;
  uint32_t packed;  // shared address
  uint32_t packed_full;
};

// ---- producer ------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void load_queries(const Ring& ring, const CUtensorMap* map,
                                             const Work& work, int head) {
  mbarrier_expect_bytes(ring.query_full, C::kQueryBytes);
  for (int g = 0; g < kGroups; ++g) {
    for (int c = 0; c < C::kChunks; ++c) {
      tensor_load_2d(ring.query + (g * C::kChunks + c) * C::kChunk, map, head * C::kDim + c * 64,
                     static_cast<int>(work.row0) + work.first_query + g * kGroupRows,
                     ring.query_full);
    }
  }
}

template <class C>
__device__ __forceinline__ const char* tile_of(const Params& p, const Work& work, int tile) {
  const int64_t block = p.step.block_table[work.sequence * *p.step.block_stride + tile];
  return static_cast<const char*>(p.cache) +
         (block * p.num_kv_heads + work.kv_head) * (2 * kTileBytes<C::kDim, C::kBits>);
}

// 16-bit tiles, by one warp. Rows of V past the last key may be no numbers: they are zeroed before the
// consumers are told.
template <class C>
__device__ __forceinline__ void produce_paged(const Params& p, const Ring& ring, const Work& work,
                                              int lane) {
  int stage = 0;
  uint32_t parity = 1;
  for (int tile = 0; tile < work.tiles; ++tile) {
    const char* source = tile_of<C>(p, work, tile);
    mbarrier_wait(ring.empty + stage * 8, parity);
    const uint32_t to = ring.stages + stage * C::kStageBytes;
    const int valid = work.num_keys - tile * kTokens;
    const bool whole = valid >= kTokens;
    const uint32_t barrier = whole ? ring.full + stage * 8 : ring.packed_full;
    if (lane == 0) {
      mbarrier_expect_bytes(barrier, 2 * C::kHalfBytes);
      bulk_load(to, source, 2 * C::kHalfBytes, barrier);
    }
    if (!whole) {  // the last tile
      mbarrier_wait(barrier, 0);
      constexpr int kPieces = C::kDim / 8;
      for (int i = lane; i < (kTokens - valid) * kPieces; i += 32) {
        store_shared_zero16(to + C::kHalfBytes +
                            HalfTile<C::kDim>::offset(valid + i / kPieces, i % kPieces * 8));
      }
      fence_async_shared();
      __syncwarp();
      if (lane < C::kFullArrivals) mbarrier_arrive(ring.full + stage * 8);
    } else if (lane > 0 && lane < C::kFullArrivals) {
      mbarrier_arrive(barrier);
    }
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// Packed tiles, by four warps: one bulk copy ahead of the tile that is unpacked.
template <class C>
__device__ __forceinline__ void produce_unpacked(const Params& p, const Ring& ring,
                                                 const Work& work, int thread) {
  constexpr int kTile = kTileBytes<C::kDim, C::kBits>;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const auto fetch = [&](int tile) {
    if (thread != 0 || tile >= work.tiles) return;
    const uint32_t barrier = ring.packed_full + tile % 2 * 8;
    mbarrier_expect_bytes(barrier, 2 * kTile);
    bulk_load(ring.packed + tile % 2 * C::kPackedSlot, tile_of<C>(p, work, tile), 2 * kTile,
              barrier);
  };
  fetch(0);
  int stage = 0;
  uint32_t parity = 1;
  for (int tile = 0; tile < work.tiles; ++tile) {
    fetch(tile + 1);
    mbarrier_wait(ring.packed_full + tile % 2 * 8, tile / 2 % 2);
    mbarrier_wait(ring.empty + stage * 8, parity);
    const uint32_t from = ring.packed + tile % 2 * C::kPackedSlot;
    const uint32_t to = ring.stages + stage * C::kStageBytes;
    unpack_keys<typename C::T, C::kDim, C::kBits>(to, from, warp, 4, lane);
    unpack_values<typename C::T, C::kDim, C::kBits>(to + C::kHalfBytes, from + kTile, warp, 4,
                                                    lane);
    {  // scales and zeros: K's words, then V's
      uint32_t word[4];
      load_shared<4>(word, from + (thread / 64 + 1) * kTile - C::kMetaBytes + thread % 64 * 4);
      store_shared(to + 2 * C::kHalfBytes + thread * 4, word[0]);
    }
    fence_async_shared();
    named_barrier<1>(128);
    if (thread < C::kFullArrivals) mbarrier_arrive(ring.full + stage * 8);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// Rows of a vision tile by one thread. What lies past its last row is the next tile's, or zero.
template <class C>
__device__ __forceinline__ void produce_rows(const Params& p, const Ring& ring, const Work& work,
                                             const CUtensorMap* map) {
  const int columns = p.num_kv_heads * C::kDim;
  int stage = 0;
  uint32_t parity = 1;
  for (int tile = 0; tile < work.tiles; ++tile) {
    mbarrier_wait(ring.empty + stage * 8, parity);
    const uint32_t barrier = ring.full + stage * 8;
    const uint32_t to = ring.stages + stage * C::kStageBytes;
    const int row = static_cast<int>(work.row0) + tile * kTokens;
    mbarrier_expect_bytes(barrier, 2 * C::kHalfBytes);
    for (int c = 0; c < C::kChunks; ++c) {
      const int column = columns + work.kv_head * C::kDim + c * 64;
      tensor_load_2d(to + c * C::kChunk, map, column, row, barrier);
      tensor_load_2d(to + C::kHalfBytes + c * C::kChunk, map, column + columns, row, barrier);
    }
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

// ---- consumers -----------------------------------------------------------------------------------

// A lane's rows g and g + 8 of its warp's 16, as in FlashPart.
struct RowState {
  float row_max[2] = {-INFINITY, -INFINITY};
  float sum[2][2] = {};
  float zero[2][2] = {};
};

template <class C>
__device__ __forceinline__ void issue_scores(float (&score)[32], uint32_t query, uint32_t keys) {
#pragma unroll
  for (int step = 0; step < C::kDim / 16; ++step) {
    const int offset = step / 4 * C::kChunk + step % 4 * 32;
    Wgmma<typename C::T, 64>::ss(score, wgmma_descriptor(query + offset),
                                 wgmma_descriptor(keys + offset), step == 0);
  }
  wgmma_commit();
}

template <class C>
__device__ __forceinline__ void issue_values(float (&out)[C::kDim / 2], const uint32_t (&p)[4][4],
                                             uint32_t values, bool first) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    WgmmaTransposed<typename C::T, C::kDim>::rs(
        out, p[step], wgmma_transposed_descriptor(values + step * 2048, C::kChunk),
        first && step == 0);
  }
  wgmma_commit();
}

// Scores → probabilities times V's scale, in place; factor: of what the part has summed so far. It runs
// while a product is in flight, so that nothing in it may branch.
template <class C, bool kMasked>
__device__ __forceinline__ void softmax_tile(float (&score)[32], RowState& state,
                                             float (&factor)[2], const float (&query_sum)[2],
                                             uint32_t meta, const int (&limit)[2], float scale_log2,
                                             int lane) {
  constexpr float kShift = kProbabilityShift<typename C::T, C::kBits>;
  if constexpr (C::kBits != 16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      uint32_t words[4];
      load_shared<8>(words, meta + (j * 8 + lane % 4 * 2) * 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[j * 4 + i] = packed_score(score[j * 4 + i], unpack_scale_zero<C::kBits>(words[i % 2]),
                                        query_sum[i / 2]);
      }
    }
  }
  if constexpr (kMasked) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j * 8 + lane % 4 * 2 + i % 2 >= limit[i / 2]) score[j * 4 + i] = -INFINITY;
      }
    }
  }
  float offset[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      largest = fmaxf(largest, fmaxf(score[j * 4 + 2 * r], score[j * 4 + 2 * r + 1]));
    }
    largest = fmaxf(state.row_max[r], quad_max(largest));
    offset[r] = max_offset(largest, scale_log2);
    factor[r] = rescale_factor(state.row_max[r], offset[r], scale_log2);
    state.row_max[r] = largest;
  }
  float sum[4] = {};
  float zero[4] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float2 scale_zero[2];
    if constexpr (C::kBits != 16) {
      uint32_t words[4];
      load_shared<8>(words, meta + C::kMetaBytes + (j * 8 + lane % 4 * 2) * 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // What lies past the last key is no number.
        const bool seen = !kMasked || j * 8 + lane % 4 * 2 + i < max(limit[0], limit[1]);
        scale_zero[i] = seen ? unpack_scale_zero<C::kBits>(words[i]) : float2{0.0F, 0.0F};
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = fast_exp2(fmaf(score[j * 4 + i], scale_log2, kShift - offset[i / 2]));
      sum[i] += x;
      score[j * 4 + i] = x;
      if constexpr (C::kBits != 16) {
        zero[i] = fmaf(x, scale_zero[i % 2].y, zero[i]);
        score[j * 4 + i] = __fmul_rn(x, scale_zero[i % 2].x);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    state.sum[i / 2][i % 2] = fmaf(state.sum[i / 2][i % 2], factor[i / 2], sum[i]);
    if constexpr (C::kBits != 16) {
      state.zero[i / 2][i % 2] = fmaf(state.zero[i / 2][i % 2], factor[i / 2], zero[i]);
    }
  }
}

// The rows' sums of all parts so far.
struct TotalState {
  float row_max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
};

template <class C>
__device__ __forceinline__ void fold_group(float (&total)[C::kDim / 2], TotalState& total_state,
                                           const float (&out)[C::kDim / 2], const RowState& state,
                                           float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.sum[r][0] + state.sum[r][1]);
    const FoldFactors factors = fold_factors(total_state.row_max[r], state.row_max[r], scale_log2);
    total_state.sum[r] = fold(total_state.sum[r], sum, factors);
    float zero = 0.0F;
    if constexpr (C::kBits != 16) zero = quad_sum(state.zero[r][0] + state.zero[r][1]);
#pragma unroll
    for (int j = 0; j < C::kDim / 8; ++j) {
#pragma unroll
      for (int i = 4 * j + 2 * r; i < 4 * j + 2 * r + 2; ++i) {
        total[i] = fold(total[i], C::kBits == 16 ? out[i] : out[i] + zero, factors);
      }
    }
  }
}

// sum(q) of the lane's rows, from the queries in shared memory.
template <class C>
__device__ __forceinline__ void shared_query_sums(float (&sums)[2], uint32_t query, int row,
                                                  int lane) {
  constexpr int kSteps = C::kDim / 16;
  uint32_t q[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t word[4];
      load_shared<4>(word, query + HalfTile<C::kDim>::offset(row + i % 2 * 8,
                                                             step * 16 + i / 2 * 8 + lane % 4 * 2));
      q[step][i] = word[0];
    }
  }
  query_sums<typename C::T, kSteps>(sums, q);
}

template <class C>
__device__ __forceinline__ void consume(const Params& p, const Ring& ring, const Work& work,
                                        int group) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;  // of the warpgroup
  const int group_query = work.first_query + group * kGroupRows;
  const int query0 = group_query + row;
  const uint32_t query = ring.query + group * C::kChunks * C::kChunk;

  // tiles that this warpgroup's rows see
  const int group_last = min(group_query + kGroupRows, work.num_queries) - 1;
  int tiles = work.tiles;
  if (group_last < group_query) {
    tiles = 0;
  } else if (C::kPaged) {
    tiles = (work.history + group_last + kTokens) / kTokens;
  }

  float query_sum[2] = {};
  mbarrier_wait(ring.query_full, 0);
  if constexpr (C::kBits != 16) shared_query_sums<C>(query_sum, query, row, lane);

  float score[32];
  float out[C::kDim / 2];
  float total[C::kDim / 2] = {};
  uint32_t probabilities[4][4];
  RowState state;
  TotalState total_state;
  int stage = 0;
  uint32_t parity = 0;
  const auto limits = [&](int(&limit)[2], int tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int visible = C::kPaged ? work.history + query0 + 8 * r + 1 : work.num_keys;
      limit[r] = min(visible, work.num_keys) - tile * kTokens;
    }
  };
  const auto pack = [&] {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = step * 8 + i / 2 * 4 + i % 2 * 2;
        probabilities[step][i] = pack_pair<typename C::T>(score[j], score[j + 1]);
      }
    }
  };
  // From the probabilities of tile next - 1 to those of tile `next`. No product is in flight before or
  // after.
  const auto advance = [&]<bool kMasked>(int next) {
    const int before = stage;
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
    const uint32_t at = ring.stages + stage * C::kStageBytes;
    const bool starts = next % kPartTiles == 0;
    int limit[2];
    limits(limit, next);
    mbarrier_wait(ring.full + stage * 8, parity);
    wgmma_fence();
    issue_scores<C>(score, query, at);
    issue_values<C>(out, probabilities, ring.stages + before * C::kStageBytes + C::kHalfBytes,
                    (next - 1) % kPartTiles == 0);
    wgmma_wait<1>();
    const RowState finished = state;
    if (starts) state = RowState{};
    float factor[2];
    softmax_tile<C, kMasked>(score, state, factor, query_sum, at + 2 * C::kHalfBytes, limit,
                             p.scale_log2, lane);
    wgmma_wait<0>();
    __syncwarp();
    if (lane < kWarpArrivals) mbarrier_arrive(ring.empty + before * 8);
    if (starts) {
      fold_group<C>(total, total_state, out, finished, p.scale_log2);
    } else if (__any_sync(~0U, factor[0] != 1.0F || factor[1] != 1.0F)) {
#pragma unroll
      for (int i = 0; i < C::kDim / 2; ++i) out[i] *= factor[i % 4 / 2];
    }
    pack();
  };
  if (tiles > 0) {
    mbarrier_wait(ring.full, 0);
    wgmma_fence();
    issue_scores<C>(score, query, ring.stages);
    wgmma_wait<0>();
    int limit[2];
    limits(limit, 0);
    float factor[2];
    softmax_tile<C, true>(score, state, factor, query_sum, ring.stages + 2 * C::kHalfBytes, limit,
                          p.scale_log2, lane);
    pack();
    const int plain = min(  // tiles that all rows see whole
        tiles, (C::kPaged ? work.history + group_query + 1 : work.num_keys) / kTokens);
    int next = 1;
    for (; next < plain; ++next) advance.template operator()<false>(next);
    for (; next < tiles; ++next) advance.template operator()<true>(next);
    wgmma_fence();
    issue_values<C>(out, probabilities, ring.stages + stage * C::kStageBytes + C::kHalfBytes,
                    (tiles - 1) % kPartTiles == 0);
    wgmma_wait<0>();
    __syncwarp();
    if (lane < kWarpArrivals) mbarrier_arrive(ring.empty + stage * 8);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
    fold_group<C>(total, total_state, out, state, p.scale_log2);
  }
  // Tiles that the other warpgroup alone sees.
  for (int tile = tiles; tile < work.tiles; ++tile) {
    mbarrier_wait(ring.full + stage * 8, parity);
    if (lane < kWarpArrivals) mbarrier_arrive(ring.empty + stage * 8);
    if (++stage == p.stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // epilogue
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

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_sm90_kernel(const Params p, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ uint64_t barriers[2 * kMaxStages + 3];
  Ring ring;
  ring.query = smem_address(shared);
  ring.stages = ring.query + C::kQueryBytes;
  ring.packed = ring.stages + p.stages * C::kStageBytes;
  ring.full = smem_address(barriers);
  ring.empty = ring.full + kMaxStages * 8;
  ring.query_full = ring.empty + kMaxStages * 8;
  ring.packed_full = ring.query_full + 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < p.stages; ++i) {
      mbarrier_init(ring.full + i * 8, C::kFullArrivals);
      mbarrier_init(ring.empty + i * 8, kGroups * 4 * kWarpArrivals);  // warps
    }
    for (int i = 0; i < 3; ++i) mbarrier_init(ring.query_full + i * 8, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  grid_dependency_wait();
  grid_dependency_launch();
  const Work work = find_work<C>(p);
  if (work.sequence < 0) return;
  const int group = threadIdx.x / 128;
  if (group == kGroups) {
    give_registers<C::kProducerRegisters>();
    const int thread = threadIdx.x % 128;
    if (thread == 0) load_queries<C>(ring, &map, work, blockIdx.x);
    if constexpr (!C::kPaged) {
      if (thread == 0) produce_rows<C>(p, ring, work, &map);
    } else if constexpr (C::kBits == 16) {
      if (thread < 32) produce_paged<C>(p, ring, work, thread);
    } else {
      produce_unpacked<C>(p, ring, work, thread);
    }
  } else {
    take_registers<C::kConsumerRegisters>();
    consume<C>(p, ring, work, group);
  }
}

template <class C>
void start(const LaunchContext& context, Params params, const CUtensorMap& map, dim3 grid) {
  const int fixed = C::kQueryBytes + C::kPackedStages * C::kPackedSlot;
  params.stages = std::min(kMaxStages, (context.max_shared_bytes - 1024 - fixed) / C::kStageBytes);
  TM_CHECK(params.stages >= 2, "%d bytes of shared memory are too few for prefill attention",
           context.max_shared_bytes);
  launch(
      prefill_sm90_kernel<C>,
      {.grid = grid, .threads = kThreads, .shared_bytes = fixed + params.stages * C::kStageBytes},
      context.stream, context.programmatic, params, map);
}

constexpr float kLog2e = 1.4426950408889634F;

// Calls f with a head dimension that this kernel has.
template <class F>
void visit_wide_dim(int head_dim, F&& f) {
  if (head_dim == 64) return f.template operator()<64>();
  f.template operator()<128>();
}

}  // namespace

bool has_prefill_sm90(int head_dim) { return head_dim == 64 || head_dim == 128; }

void prefill_attention_sm90(const LaunchContext& context, DType dtype,
                            const PrefillAttentionArgs& args) {
  const int64_t columns =
      static_cast<int64_t>(args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  const Params params{.q = args.qkv,
                      .cache = args.cache,
                      .y = args.y,
                      .ldq = columns,
                      .ldy = static_cast<int64_t>(args.num_heads) * args.head_dim,
                      .group = args.num_heads / args.num_kv_heads,
                      .num_kv_heads = args.num_kv_heads,
                      .tokens = 0,
                      .stages = 0,
                      .scale_log2 = args.softmax_scale * kLog2e,
                      .step = args.step};
  const CUtensorMap map =
      make_tensor_map(args.qkv, dtype, args.tokens, columns, columns, kGroupRows, 64);
  const dim3 grid(static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.num_tiles));
  visit_dtype(dtype, [&]<class T>() {
    visit_wide_dim(args.head_dim, [&]<int kDim>() {
      visit_kv_bits(args.kv_bits, [&]<int kBits>() {
        start<Config<T, kDim, kBits, true>>(context, params, map, grid);
      });
    });
  });
}

void tile_attention_sm90(const LaunchContext& context, DType dtype, const TileAttentionArgs& args) {
  const int64_t columns = static_cast<int64_t>(args.num_heads) * args.head_dim;
  const Params params{.q = args.qkv,
                      .cache = nullptr,
                      .y = args.y,
                      .ldq = 3 * columns,
                      .ldy = columns,
                      .group = 1,
                      .num_kv_heads = args.num_heads,
                      .tokens = args.tokens,
                      .stages = 0,
                      .scale_log2 = args.softmax_scale * kLog2e,
                      .step = {}};
  const CUtensorMap map =
      make_tensor_map(args.qkv, dtype, static_cast<int64_t>(args.num_tiles) * args.tokens,
                      3 * columns, 3 * columns, kGroupRows, 64);
  const dim3 grid(static_cast<unsigned>(args.num_heads),
                  static_cast<unsigned>(ceil_div(args.tokens, kQueryTile)),
                  static_cast<unsigned>(args.num_tiles));
  visit_dtype(dtype, [&]<class T>() {
    visit_wide_dim(args.head_dim, [&]<int kDim>() {
      start<Config<T, kDim, 16, false>>(context, params, map, grid);
    });
  });
}

}  // namespace turbomind::cuda
