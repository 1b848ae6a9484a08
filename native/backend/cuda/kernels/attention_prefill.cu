// Attention of many query rows: causal over paged keys (prefill), or over all keys of a vision tile.
// CTA: 4 warps of 16 query rows of one head; keys in kernel tiles of 64 (a KV block), double
// buffered by cp.async. A row's result depends only on its own keys: not on the chunk it came in.
// Bound: tensor cores (mma.sync) beyond a few hundred tokens.
#include "backend/cuda/device/flash.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = kBlockTokens;

struct Params {
  const void* q;  // row 0, head 0
  const void* k;  // paged: [B, Hkv, 64, D]; contiguous: row 0, head 0
  const void* v;
  void* y;
  int64_t ldq;
  int64_t ldy;
  int group;  // query heads a KV head
  int num_kv_heads;
  int tokens;  // contiguous: keys and queries of a tile
  float scale_log2;
  StepArrays step;
};

// One kernel tile of keys or values: row stride in elements.
template <class T>
struct KeyTile {
  const T* base;
  int64_t stride;
};

template <class T, int kDim, bool kPaged>
__device__ __forceinline__ KeyTile<T> key_tile(const Params& p, const void* base, int sequence,
                                               int kv_head, int tile) {
  if constexpr (kPaged) {
    const int64_t block = p.step.block_table[sequence * *p.step.block_stride + tile];
    return {static_cast<const T*>(base) + (block * p.num_kv_heads + kv_head) * kTokens * kDim,
            kDim};
  } else {
    const int64_t row = static_cast<int64_t>(sequence) * p.tokens + tile * kTokens;
    return {static_cast<const T*>(base) + row * p.ldq + kv_head * kDim, p.ldq};
  }
}

template <class T, int kDim>
__device__ __forceinline__ void load_tile(uint32_t destination, const KeyTile<T>& tile, int valid) {
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
    const int token = i / kPieces;
    const int piece = i % kPieces;
    const bool inside = token < valid;
    cp_async_16(destination + token * kFlashRowBytes<kDim> + piece * 16,
                tile.base + (inside ? token * tile.stride : 0) + piece * 8, inside);
  }
}

template <class T, int kDim, bool kPaged>
__global__ void __launch_bounds__(kThreads) prefill_kernel(const Params p) {
  extern __shared__ __align__(128) char shared[];
  constexpr int kTileBytes = kTokens * kFlashRowBytes<kDim>;
  grid_dependency_wait();
  grid_dependency_launch();
  const int lane = threadIdx.x % 32;
  const int head = blockIdx.x;
  const int kv_head = head / p.group;

  // which rows, which keys
  int sequence;
  int first_query;
  int num_queries;
  int num_keys;
  int64_t row0;
  if constexpr (kPaged) {
    const int2 tile = p.step.query_tiles[gridDim.y - 1 - blockIdx.y];  // longest rows first
    sequence = tile.x;
    if (sequence < 0) return;
    first_query = tile.y;
    row0 = p.step.query_start[sequence];
    num_queries = p.step.query_start[sequence + 1] - static_cast<int>(row0);
    num_keys = p.step.kv_len[sequence];
  } else {
    sequence = blockIdx.z;
    first_query = blockIdx.y * kQueryTile;
    row0 = static_cast<int64_t>(sequence) * p.tokens;
    num_queries = p.tokens;
    num_keys = p.tokens;
  }
  const int history = num_keys - num_queries;  // keys before query row 0
  const int last_query = min(first_query + kQueryTile, num_queries) - 1;
  const int keys_end = kPaged ? history + last_query + 1 : num_keys;
  const int tiles = (keys_end + kTokens - 1) / kTokens;

  const int query0 = first_query + threadIdx.x / 32 * 16 + lane / 4;
  const T* q = static_cast<const T*>(p.q) + head * kDim;
  uint32_t query[kDim / 16][4];
  load_query<T, kDim>(query, query0 < num_queries ? q + (row0 + query0) * p.ldq : nullptr,
                      query0 + 8 < num_queries ? q + (row0 + query0 + 8) * p.ldq : nullptr, lane);

  const uint32_t ring = smem_address(shared);
  const auto load = [&](int tile) {
    const uint32_t stage = ring + (tile % 2) * 2 * kTileBytes;
    const int valid = num_keys - tile * kTokens;
    load_tile<T, kDim>(stage, key_tile<T, kDim, kPaged>(p, p.k, sequence, kv_head, tile), valid);
    load_tile<T, kDim>(stage + kTileBytes,
                       key_tile<T, kDim, kPaged>(p, p.v, sequence, kv_head, tile), valid);
    cp_async_commit();
  };

  FlashState<kDim> state;
  load(0);
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tiles) load(tile + 1);
    const int first_key = tile * kTokens;
    int limit[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int visible = kPaged ? history + query0 + 8 * r + 1 : num_keys;
      limit[r] = min(visible, num_keys) - first_key;
    }
    const bool masked =
        kPaged ? first_key + kTokens > history + first_query : first_key + kTokens > num_keys;
    const uint32_t stage = ring + (tile % 2) * 2 * kTileBytes;
    flash_tile<T, kDim, kTokens>(state, query, stage, stage + kTileBytes, limit, masked,
                                 p.scale_log2, lane);
  }

  // epilogue
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.row_sum[r]);
    const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
    if (query0 + 8 * r >= num_queries) continue;
    T* y = static_cast<T*>(p.y) + (row0 + query0 + 8 * r) * p.ldy + head * kDim + (lane % 4) * 2;
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      *reinterpret_cast<uint32_t*>(y + d * 8) =
          pack_pair<T>(state.out[d][2 * r] * inverse, state.out[d][2 * r + 1] * inverse);
    }
  }
}

constexpr float kLog2e = 1.4426950408889634F;

template <class T, bool kPaged>
void run(const LaunchContext& context, const Params& params, int head_dim, dim3 grid) {
  visit_head_dim(head_dim, [&]<int kDim>() {
    launch(prefill_kernel<T, kDim, kPaged>,
           {.grid = grid, .threads = kThreads, .shared_bytes = 4 * kTokens * kFlashRowBytes<kDim>},
           context.stream, context.programmatic, params);
  });
}

}  // namespace

void prefill_attention(const LaunchContext& context, DType dtype,
                       const PrefillAttentionArgs& args) {
  if (args.num_tiles == 0) return;
  const int64_t heads = args.num_heads + 2 * args.num_kv_heads;
  visit_dtype(dtype, [&]<class T>() {
    const Params params{.q = args.qkv,
                        .k = args.k_cache,
                        .v = args.v_cache,
                        .y = args.y,
                        .ldq = heads * args.head_dim,
                        .ldy = static_cast<int64_t>(args.num_heads) * args.head_dim,
                        .group = args.num_heads / args.num_kv_heads,
                        .num_kv_heads = args.num_kv_heads,
                        .tokens = 0,
                        .scale_log2 = args.softmax_scale * kLog2e,
                        .step = args.step};
    run<T, true>(
        context, params, args.head_dim,
        dim3(static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.num_tiles)));
  });
}

void tile_attention(const LaunchContext& context, DType dtype, const TileAttentionArgs& args) {
  const int64_t columns = static_cast<int64_t>(args.num_heads) * args.head_dim;
  visit_dtype(dtype, [&]<class T>() {
    const T* qkv = static_cast<const T*>(args.qkv);
    const Params params{.q = qkv,
                        .k = qkv + columns,
                        .v = qkv + 2 * columns,
                        .y = args.y,
                        .ldq = 3 * columns,
                        .ldy = columns,
                        .group = 1,
                        .num_kv_heads = args.num_heads,
                        .tokens = args.tokens,
                        .scale_log2 = args.softmax_scale * kLog2e,
                        .step = {}};
    run<T, false>(context, params, args.head_dim,
                  dim3(static_cast<unsigned>(args.num_heads),
                       static_cast<unsigned>(ceil_div(args.tokens, kQueryTile)),
                       static_cast<unsigned>(args.num_tiles)));
  });
}

}  // namespace turbomind::cuda
