// Attention of many query rows: causal over paged keys (prefill), or over all keys of a vision tile;
// by the definition in flash.cuh, on mma.sync. CTA: 4 warps of 16 query rows of one head; KV tiles
// double buffered by cp.async, packed ones unpacked to 16 bits by all warps first.
// Bound: tensor cores (mma.sync) beyond a few hundred tokens.
#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/device/prefill_work.cuh"
#include "backend/cuda/kernels/attention_prefill.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // query rows of a CTA
constexpr int kTokens = kBlockTokens;

template <class T, int kDim, int kBits>
struct Buffers {
  static constexpr int kTile = kTileBytes<kDim, kBits>;
  static constexpr int kStage = 2 * kTile;
  static constexpr int kUnpacked = kBits == 16 ? 0 : 2 * HalfTile<kDim>::kBytes;
  static constexpr int kBytes = 2 * kStage + kUnpacked;
};

// KV tile `tile` of a paged sequence, K then V, as it lies in memory. Rows past the last key hold
// anything: they are zeroed where they might be no numbers.
template <class T, int kDim, int kBits>
__device__ __forceinline__ void load_paged(uint32_t stage, const PrefillParams& p,
                                           const PrefillWork& work, int tile) {
  constexpr int kBytes = Buffers<T, kDim, kBits>::kStage;
  const int64_t block = p.step.block_table[work.sequence * *p.step.block_stride + tile];
  const char* source =
      static_cast<const char*>(p.cache) + (block * p.num_kv_heads + work.kv_head) * kBytes;
  const int valid = work.num_keys - tile * kTokens;
  for (int i = threadIdx.x * 16; i < kBytes; i += kThreads * 16) {
    const bool inside = kBits != 16 || i / HalfTile<kDim>::kRowBytes % kTokens < valid;
    cp_async_16(stage + i, source + i, inside);
  }
}

// The same of rows that lie `ldq` apart.
template <class T, int kDim>
__device__ __forceinline__ void load_rows(uint32_t stage, const PrefillParams& p,
                                          const PrefillWork& work, int tile) {
  constexpr int kPieces = kDim / 8;
  const int64_t first = static_cast<int64_t>(work.sequence) * p.tokens + tile * kTokens;
  const int64_t offset = first * p.ldq + work.kv_head * kDim;
  const int valid = work.num_keys - tile * kTokens;
  for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
    const int token = i / kPieces;
    const int piece = i % kPieces;
    const bool inside = token < valid;
    const int64_t from = offset + (inside ? token * p.ldq : 0) + piece * 8;
    const uint32_t to = stage + HalfTile<kDim>::offset(token, piece * 8);
    cp_async_16(to, static_cast<const T*>(p.k) + from, inside);
    cp_async_16(to + HalfTile<kDim>::kBytes, static_cast<const T*>(p.v) + from, inside);
  }
}

template <class T, int kDim, int kBits, bool kPaged>
__global__ void __launch_bounds__(kThreads) prefill_kernel(const PrefillParams p) {
  extern __shared__ __align__(1024) char shared[];
  using Memory = Buffers<T, kDim, kBits>;
  grid_dependency_wait();
  grid_dependency_launch();
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const PrefillWork work = find_prefill_work<kPaged, kRows>(
      p, blockIdx.x, kPaged ? gridDim.y - 1 - blockIdx.y : blockIdx.y,
      blockIdx.z);  // longest rows first
  if (work.sequence < 0 || work.first_query >= work.num_queries) return;

  const int query0 = work.first_query + warp * 16 + lane / 4;
  const T* q = static_cast<const T*>(p.q) + work.head * kDim;
  uint32_t query[kDim / 16][4];
  load_query<T, kDim>(
      query, query0 < work.num_queries ? q + (work.row0 + query0) * p.ldq : nullptr,
      query0 + 8 < work.num_queries ? q + (work.row0 + query0 + 8) * p.ldq : nullptr, lane);
  float query_sum[2] = {};
  if constexpr (kBits != 16) {
#pragma unroll
    for (auto& step : query) {
#pragma unroll
      for (uint32_t& pair : step) pair = product_pair<T, kBits>(pair);
    }
    query_sums<ProductType<T, kBits>, kDim / 16>(query_sum, query);
  }

  const uint32_t ring = smem_address(shared);
  const uint32_t unpacked = ring + 2 * Memory::kStage;
  const auto load = [&](int tile) {
    const uint32_t stage = ring + (tile % 2) * Memory::kStage;
    if constexpr (kPaged) {
      load_paged<T, kDim, kBits>(stage, p, work, tile);
    } else {
      load_rows<T, kDim>(stage, p, work, tile);
    }
    cp_async_commit();
  };

  FlashPart<kDim> part;
  FlashTotal<kDim> total;
  load(0);
  for (int tile = 0; tile < work.tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < work.tiles) load(tile + 1);
    const int first_key = tile * kTokens;
    int limit[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int visible = kPaged ? work.history + query0 + 8 * r + 1 : work.num_keys;
      limit[r] = min(visible, work.num_keys) - first_key;
    }
    const bool masked = kPaged ? first_key + kTokens > work.history + work.first_query
                               : first_key + kTokens > work.num_keys;
    uint32_t keys = ring + (tile % 2) * Memory::kStage;
    uint32_t values = keys + Memory::kTile;
    const uint32_t key_meta = keys + Memory::kTile - kTokens * 4;
    const uint32_t value_meta = values + Memory::kTile - kTokens * 4;
    if constexpr (kBits != 16) {
      unpack_keys<kDim, kBits>(unpacked, keys, warp, kThreads / 32, lane);
      unpack_values<kDim, kBits>(unpacked + HalfTile<kDim>::kBytes, values, warp, kThreads / 32,
                                 lane);
      keys = unpacked;
      values = unpacked + HalfTile<kDim>::kBytes;
      __syncthreads();
    }
    flash_tile<T, kDim, kBits>(part, query, query_sum, keys, values, key_meta, value_meta, limit,
                               masked, p.scale_log2, lane);
    if ((tile + 1) % kPartTiles == 0 || tile + 1 == work.tiles) {
      fold_part<kDim, kBits>(total, part, p.scale_log2);
    }
  }

  // epilogue
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float inverse = total.sum[r] > 0.0F ? 1.0F / total.sum[r] : 0.0F;
    if (query0 + 8 * r >= work.num_queries) continue;
    T* y = static_cast<T*>(p.y) + (work.row0 + query0 + 8 * r) * p.ldy + work.head * kDim +
           (lane % 4) * 2;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      *reinterpret_cast<uint32_t*>(y + d * 8) =
          pack_pair<T>(total.out[d][2 * r] * inverse, total.out[d][2 * r + 1] * inverse);
    }
  }
}

template <class T, bool kPaged>
void run(const LaunchContext& context, const PrefillParams& params, int head_dim, int bits,
         dim3 grid) {
  const auto start = [&]<int kDim, int kBits>() {
    launch(prefill_kernel<T, kDim, kBits, kPaged>,
           {.grid = grid, .threads = kThreads, .shared_bytes = Buffers<T, kDim, kBits>::kBytes},
           context.stream, context.programmatic, params);
  };
  visit_head_dim(head_dim, [&]<int kDim>() {
    if constexpr (kPaged) {
      visit_kv_bits(bits, [&]<int kBits>() { start.template operator()<kDim, kBits>(); });
    } else {
      start.template operator()<kDim, 16>();
    }
  });
}

}  // namespace

void prefill_attention(const LaunchContext& context, DType dtype,
                       const PrefillAttentionArgs& args) {
  if (args.num_tiles == 0) return;
#ifdef TURBOMIND_HAS_SM90A
  if (context.sm == 90 && !args.portable && has_prefill_sm90(args.head_dim)) {
    prefill_attention_sm90(context, dtype, args);
    return;
  }
#endif
  visit_dtype(dtype, [&]<class T>() {
    run<T, true>(context, prefill_params(args), args.head_dim, args.kv_bits,
                 dim3(static_cast<unsigned>(args.num_heads),
                      static_cast<unsigned>(args.num_tiles * (kQueryTile / kRows))));
  });
}

void tile_attention(const LaunchContext& context, DType dtype, const TileAttentionArgs& args) {
#ifdef TURBOMIND_HAS_SM90A
  if (context.sm == 90 && !args.portable && has_prefill_sm90(args.head_dim)) {
    tile_attention_sm90(context, dtype, args);
    return;
  }
#endif
  visit_dtype(dtype, [&]<class T>() {
    run<T, false>(context, prefill_params(args), args.head_dim, 16,
                  dim3(static_cast<unsigned>(args.num_heads),
                       static_cast<unsigned>(ceil_div(args.tokens, kRows)),
                       static_cast<unsigned>(args.num_tiles)));
  });
}

}  // namespace turbomind::cuda
