// A tile of query rows over splits of keys: keys and values read in place or gathered, splits computed by the
// kernels and joined in order. The backend's team.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "backend/cpu/attention.h"

namespace turbomind::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

float softmax_scale(const AttentionArgs& args) {
  return args.softmax_scale > 0.0F ? args.softmax_scale
                                   : 1.0F / std::sqrt(static_cast<float>(args.head_dim));
}

}  // namespace

struct PagedAttention::Scratch {
  float* q;       // [kMaxTileRows, kRowStride]
  float* scores;  // [kMaxTileRows, kRowStride]
  float* out;     // [kMaxTileRows, D] of one split
  float* total;   // [kMaxTileRows, D] of the splits so far
  float* max;     // [kMaxTileRows]
  float* sum;
  float* total_max;
  float* total_sum;
  float* gathered;  // [kMaxChunks, 2, D * kChunkKeys] where keys are not read in place
};

PagedAttention::Scratch PagedAttention::scratch_of(int thread, const AttentionArgs& args) const {
  const int head_dim = args.head_dim;
  Scratch s{};
  float* next = scratch_.floats() + thread * scratch_floats(head_dim, gathers(args.cache->spec()));
  const auto take = [&next](int floats) {
    float* taken = next;
    next += floats;
    return taken;
  };
  s.q = take(kMaxTileRows * kRowStride);
  s.out = take(kMaxTileRows * head_dim);
  s.total = take(kMaxTileRows * head_dim);
  s.scores = take(kMaxTileRows * kRowStride);
  s.max = take(kMaxTileRows);
  s.sum = take(kMaxTileRows);
  s.total_max = take(kMaxTileRows);
  s.total_sum = take(kMaxTileRows);
  s.gathered = next;
  return s;
}

// Slot layout: max [rows], sum [rows], out [rows, D] of one (tile, KV head, split).
float* PagedAttention::partial(const AttentionArgs& args, const AttentionTile& tile, int kv_head,
                               int split) const {
  const size_t slot = static_cast<size_t>(tile.partial + split) * args.num_kv_heads + kv_head;
  return partials_.floats() + slot * partial_floats(args.head_dim);
}

// A quantised cache: the split's keys and values as f32, run by run of tokens in one block and one
// chunk.
void PagedAttention::dequantize_chunks(const CpuKvCache& cache, int layer, int kv_head,
                                       const AttentionTile& tile, int first_key, int num_keys,
                                       const Scratch& scratch) const {
  const KvCacheSpec& spec = cache.spec();
  // Whole vectors of tokens would cross a run's end where blocks do not hold them.
  const AttentionKernels& kernels = spec.block_size % kLanes == 0 ? kernels_ : kAttentionReference;
  const auto dequantize = spec.bits == 8 ? kernels.dequantize8 : kernels.dequantize4;
  const int32_t* blocks = &batch_.block_table[int64_t{tile.sequence} * batch_.max_blocks];
  for (int j = 0; j < num_keys;) {
    const int key = first_key + j;
    const int slot = key % spec.block_size;
    const int column = j % kChunkKeys;
    const int run = std::min({num_keys - j, spec.block_size - slot, kChunkKeys - column});
    float* keys = scratch.gathered + j / kChunkKeys * 2 * spec.head_dim * kChunkKeys;
    float* values = keys + spec.head_dim * kChunkKeys;
    dequantize(cache.chunk(layer, blocks[key / spec.block_size], kv_head, slot, run), keys + column,
               values + column * spec.head_dim);
    j += run;
  }
}

// Blocks that do not hold whole chunks: copies the split's keys and values side by side.
void PagedAttention::gather_chunks(const CpuKvCache& cache, int layer, int kv_head,
                                   const AttentionTile& tile, int first_key, int num_keys,
                                   const Scratch& scratch) const {
  const int dim = cache.spec().head_dim;
  const int block_size = cache.spec().block_size;
  const int32_t* blocks = &batch_.block_table[int64_t{tile.sequence} * batch_.max_blocks];
  for (int j = 0; j < num_keys; ++j) {
    const int key = first_key + j;
    const BlockId block = blocks[key / block_size];
    const int offset = key % block_size;
    float* keys = scratch.gathered + j / kChunkKeys * 2 * dim * kChunkKeys;
    float* values = keys + dim * kChunkKeys;
    const float* from = cache.keys(layer, block, kv_head) + offset;
    for (int d = 0; d < dim; ++d) keys[d * kChunkKeys + j % kChunkKeys] = from[d * block_size];
    const float* v = cache.values(layer, block, kv_head) + offset * dim;
    std::copy(v, v + dim, values + j % kChunkKeys * dim);
  }
}

void PagedAttention::compute_split(const AttentionArgs& args, const AttentionTile& tile,
                                   int kv_head, int split, const Scratch& scratch, float* max,
                                   float* sum, float* out) const {
  const auto& cache = static_cast<const CpuKvCache&>(*args.cache);
  const int dim = args.head_dim;
  const int block_size = cache.spec().block_size;
  const int group = args.num_heads / args.num_kv_heads;
  const int first_key = split * kSplitKeys;
  const int num_keys = std::min(kSplitKeys, tile.num_keys - first_key);
  std::array<int, kMaxTileRows> limits;
  for (int r = 0; r < tile.rows; ++r) {
    const int seen = batch_.positions[(tile.row_begin + r) / group] + 1 - first_key;
    limits[r] = std::min(seen, num_keys);
  }
  std::array<const float*, kMaxChunks> keys;
  std::array<const float*, kMaxChunks> values;
  const bool in_place = !gathers(cache.spec());
  if (cache.quantized()) {
    dequantize_chunks(cache, args.layer, kv_head, tile, first_key, num_keys, scratch);
  } else if (!in_place) {
    gather_chunks(cache, args.layer, kv_head, tile, first_key, num_keys, scratch);
  }
  const int32_t* blocks = &batch_.block_table[int64_t{tile.sequence} * batch_.max_blocks];
  for (int c = 0; c * kChunkKeys < num_keys; ++c) {
    const int key = first_key + c * kChunkKeys;
    if (in_place) {
      const BlockId block = blocks[key / block_size];
      keys[c] = cache.keys(args.layer, block, kv_head) + key % block_size;
      values[c] = cache.values(args.layer, block, kv_head) + key % block_size * dim;
    } else {
      keys[c] = scratch.gathered + c * 2 * dim * kChunkKeys;
      values[c] = keys[c] + dim * kChunkKeys;
    }
  }
  SplitTask task;
  task.q = scratch.q;
  task.rows = tile.rows;
  task.head_dim = dim;
  task.keys = keys.data();
  task.values = values.data();
  task.key_stride = in_place ? block_size : kChunkKeys;
  task.limits = limits.data();
  task.num_keys = num_keys;
  task.scale = softmax_scale(args);
  task.scores = scratch.scores;
  task.max = max;
  task.sum = sum;
  task.out = out;
  kernels_.split(task);
}

void PagedAttention::run_item(const AttentionArgs& args, const AttentionItem& item, int kv_head,
                              int thread) {
  const AttentionTile& tile = plan_.tiles()[item.tile];
  const int dim = args.head_dim;
  const int group = args.num_heads / args.num_kv_heads;
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  const Scratch s = scratch_of(thread, args);
  for (int r = 0; r < tile.rows; ++r) {
    const int row = tile.row_begin + r;
    const float* q =
        args.qkv.as<float>() + (int64_t{row / group} * heads + kv_head * group + row % group) * dim;
    std::copy(q, q + dim, s.q + r * kRowStride);
  }
  if (tile.partial >= 0) {
    for (int split = item.split_begin; split < item.split_end; ++split) {
      float* slot = partial(args, tile, kv_head, split);
      compute_split(args, tile, kv_head, split, s, slot, slot + kMaxTileRows,
                    slot + 2 * kMaxTileRows);
    }
    return;
  }
  std::fill(s.total_max, s.total_max + tile.rows, kMinusInfinity);
  for (int split = item.split_begin; split < item.split_end; ++split) {
    compute_split(args, tile, kv_head, split, s, s.max, s.sum, s.out);
    for (int r = 0; r < tile.rows; ++r) {
      if (batch_.positions[(tile.row_begin + r) / group] < split * kSplitKeys) continue;
      merge_split(s.max[r], s.sum[r], s.out + r * dim, dim, s.total_max + r, s.total_sum + r,
                  s.total + r * dim);
    }
  }
  finish(args, tile, kv_head, s);
}

void PagedAttention::merge_partials(const AttentionArgs& args, const AttentionTile& tile,
                                    int kv_head, int thread) {
  const int dim = args.head_dim;
  const int group = args.num_heads / args.num_kv_heads;
  const Scratch s = scratch_of(thread, args);
  std::fill(s.total_max, s.total_max + tile.rows, kMinusInfinity);
  for (int split = 0; split < num_splits(tile.num_keys); ++split) {
    const float* slot = partial(args, tile, kv_head, split);
    for (int r = 0; r < tile.rows; ++r) {
      if (batch_.positions[(tile.row_begin + r) / group] < split * kSplitKeys) continue;
      merge_split(slot[r], slot[kMaxTileRows + r], slot + 2 * kMaxTileRows + r * dim, dim,
                  s.total_max + r, s.total_sum + r, s.total + r * dim);
    }
  }
  finish(args, tile, kv_head, s);
}

void PagedAttention::finish(const AttentionArgs& args, const AttentionTile& tile, int kv_head,
                            const Scratch& s) const {
  const int dim = args.head_dim;
  const int group = args.num_heads / args.num_kv_heads;
  for (int r = 0; r < tile.rows; ++r) {
    const int row = tile.row_begin + r;
    float* y = args.y.as<float>() +
               (int64_t{row / group} * args.num_heads + kv_head * group + row % group) * dim;
    const float* total = s.total + r * dim;
    for (int d = 0; d < dim; ++d) y[d] = total[d] / s.total_sum[r];
  }
}

}  // namespace turbomind::cpu
