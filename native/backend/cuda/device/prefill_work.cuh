// What a CTA of prefill attention works on, for both forms of the kernel: query rows of one head,
// causal over paged keys, or over all keys of a vision tile. Device, and the parameters from the host.
#pragma once

#include "backend/cuda/kernels/kernels.h"

namespace turbomind::cuda {

struct PrefillParams {
  const void* q;      // row 0, head 0
  const void* k;      // contiguous: row 0, head 0
  const void* v;      // contiguous
  const void* cache;  // paged
  void* y;
  int64_t ldq;
  int64_t ldy;
  int group;  // query heads a KV head
  int num_kv_heads;
  int tokens;  // contiguous: keys and queries of a tile
  float scale_log2;
  StepArrays step;
};

inline constexpr float kLog2e = 1.4426950408889634F;

inline PrefillParams prefill_params(const PrefillAttentionArgs& args) {
  const int64_t heads = args.num_heads + 2 * args.num_kv_heads;
  return {.q = args.qkv,
          .k = nullptr,
          .v = nullptr,
          .cache = args.cache,
          .y = args.y,
          .ldq = heads * args.head_dim,
          .ldy = static_cast<int64_t>(args.num_heads) * args.head_dim,
          .group = args.num_heads / args.num_kv_heads,
          .num_kv_heads = args.num_kv_heads,
          .tokens = 0,
          .scale_log2 = args.softmax_scale * kLog2e,
          .step = args.step};
}

inline PrefillParams prefill_params(const TileAttentionArgs& args) {
  const int64_t columns = static_cast<int64_t>(args.num_heads) * args.head_dim;
  const char* qkv = static_cast<const char*>(args.qkv);
  return {.q = qkv,
          .k = qkv + columns * 2,
          .v = qkv + columns * 4,
          .cache = nullptr,
          .y = args.y,
          .ldq = 3 * columns,
          .ldy = columns,
          .group = 1,
          .num_kv_heads = args.num_heads,
          .tokens = args.tokens,
          .scale_log2 = args.softmax_scale * kLog2e,
          .step = {}};
}

// Query rows of one head, and their keys.
struct PrefillWork {
  int sequence;  // contiguous: vision tile; negative: padding, nothing else is set
  int head;
  int kv_head;
  int first_query;
  int num_queries;  // of the sequence
  int num_keys;
  int history;  // keys before query row 0
  int tiles;    // KV tiles that any row sees
  int64_t row0;
};

// The kRows rows from kRows * index on, of the step's query tiles or of a vision tile.
template <bool kPaged, int kRows>
__device__ __forceinline__ PrefillWork find_prefill_work(const PrefillParams& p, int head,
                                                         int index, int vision_tile) {
  PrefillWork work;
  work.head = head;
  work.kv_head = head / p.group;
  if constexpr (kPaged) {
    constexpr int kParts = kQueryTile / kRows;
    const int2 tile = p.step.query_tiles[index / kParts];
    work.sequence = tile.x;
    if (tile.x < 0) return work;
    work.first_query = tile.y + index % kParts * kRows;
    work.row0 = p.step.query_start[tile.x];
    work.num_queries = p.step.query_start[tile.x + 1] - static_cast<int>(work.row0);
    work.num_keys = p.step.kv_len[tile.x];
  } else {
    work.sequence = vision_tile;
    work.first_query = index * kRows;
    work.row0 = static_cast<int64_t>(work.sequence) * p.tokens;
    work.num_queries = p.tokens;
    work.num_keys = p.tokens;
  }
  work.history = work.num_keys - work.num_queries;
  const int last_query = min(work.first_query + kRows, work.num_queries) - 1;
  const int keys_end = kPaged ? work.history + last_query + 1 : work.num_keys;
  work.tiles = (keys_end + kBlockTokens - 1) / kBlockTokens;
  return work;
}

}  // namespace turbomind::cuda
