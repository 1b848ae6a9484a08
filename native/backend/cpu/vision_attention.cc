// Non-causal attention inside each tile, on the split kernels of attention_kernels.h. A work item
// is a run of query rows of one (tile, head): it packs the head's K and V, then streams its rows
// past them. A row's result depends on its tile alone.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "backend/cpu/kernels/attention_kernels.h"
#include "backend/cpu/kernels/row_norm.h"
#include "backend/cpu/vision_ops.h"

namespace turbomind::cpu {
namespace {

constexpr int kItemsPerThread = 4;
constexpr int kMinRunRows = 4 * kMaxTileRows;  // packing K and V must stay a small share

// Splits of nearly equal size: 1,025 tokens are 2 x 384 and 257, not 2 x 512 and one more.
int split_keys(int tokens) {
  return round_up(ceil_div(tokens, ceil_div(tokens, kSplitKeys)), kChunkKeys);
}

struct Scratch {
  float* keys;    // [chunks, D, kChunkKeys]
  float* values;  // [chunks * kChunkKeys, D]
  float* rows;    // [kLanes, D]: rows to transpose
  float* q;       // [kMaxTileRows, kRowStride]
  float* out;     // [kMaxTileRows, D]
  float* total;   // [kMaxTileRows, D]
  float* scores;  // [kMaxTileRows, kRowStride]
  float* state;   // [4, kMaxTileRows]: max, sum, total max, total sum
  const float** chunk_keys;
  const float** chunk_values;
};

size_t scratch_floats(int tokens, int head_dim) {
  const size_t padded = round_up(tokens, kChunkKeys);
  const size_t pointers = 2 * (padded / kChunkKeys) * sizeof(float*) / sizeof(float);
  const size_t rows = kLanes + 2 * kMaxTileRows;
  return round_up(2 * padded * head_dim + rows * head_dim +
                      size_t{kMaxTileRows} * (2 * kRowStride + 4) + pointers,
                  size_t{16});
}

Scratch scratch_at(float* next, int tokens, int head_dim) {
  const int padded = round_up(tokens, kChunkKeys);
  const auto take = [&next](int64_t floats) {
    float* taken = next;
    next += floats;
    return taken;
  };
  Scratch s{};
  s.keys = take(int64_t{padded} * head_dim);
  s.values = take(int64_t{padded} * head_dim);
  s.rows = take(kLanes * head_dim);
  s.q = take(kMaxTileRows * kRowStride);
  s.out = take(kMaxTileRows * head_dim);
  s.total = take(kMaxTileRows * head_dim);
  s.scores = take(kMaxTileRows * kRowStride);
  s.state = take(4 * kMaxTileRows);
  const int chunks = padded / kChunkKeys;
  s.chunk_keys = reinterpret_cast<const float**>(take(chunks * 2));
  s.chunk_values = reinterpret_cast<const float**>(take(chunks * 2));
  return s;
}

class TileAttention {
 public:
  TileAttention(const VisionAttentionArgs& args, const AttentionKernels& kernels)
      : args_(args),
        kernels_(kernels),
        width_(int64_t{args.num_heads} * args.head_dim),
        scale_(1.0F / std::sqrt(static_cast<float>(args.head_dim))) {}

  // Rows [begin, end) of one head of one tile.
  void run(int tile, int head, int begin, int end, const Scratch& s) const {
    const float* qkv = args_.qkv.as<float>() + int64_t{tile} * args_.tokens_per_tile * 3 * width_ +
                       head * args_.head_dim;
    float* y = args_.y.as<float>() + int64_t{tile} * args_.tokens_per_tile * width_ +
               head * args_.head_dim;
    pack(qkv, s);
    for (int row = begin; row < end; row += kMaxTileRows) {
      attend(qkv, row, std::min(kMaxTileRows, end - row), y, s);
    }
  }

 private:
  void pack(const float* qkv, const Scratch& s) const {
    const int dim = args_.head_dim;
    const int tokens = args_.tokens_per_tile;
    const int64_t stride = 3 * width_;
    for (int t = 0; t < tokens; t += kLanes) {
      // Through a dense copy: rows 3 C apart would all fall into a few cache sets.
      for (int i = 0; i < kLanes; ++i) {
        float* row = s.rows + i * dim;
        if (t + i < tokens) {
          const float* k = qkv + (t + i) * stride + width_;
          std::copy(k, k + dim, row);
          std::copy(k + width_, k + width_ + dim, s.values + (t + i) * dim);
        } else {
          std::fill(row, row + dim, 0.0F);
        }
      }
      kernels_.transpose16(s.rows, dim, dim,
                           s.keys + t / kChunkKeys * kChunkKeys * dim + t % kChunkKeys, kChunkKeys);
    }
    for (int c = 0; c * kChunkKeys < tokens; ++c) {
      s.chunk_keys[c] = s.keys + c * kChunkKeys * dim;
      s.chunk_values[c] = s.values + c * kChunkKeys * dim;
    }
  }

  void attend(const float* qkv, int first, int rows, float* y, const Scratch& s) const {
    const int dim = args_.head_dim;
    const int tokens = args_.tokens_per_tile;
    const int step = split_keys(tokens);
    for (int r = 0; r < rows; ++r) {
      const float* q = qkv + (first + r) * 3 * width_;
      std::copy(q, q + dim, s.q + r * kRowStride);
    }
    float* total_max = s.state + 2 * kMaxTileRows;
    float* total_sum = s.state + 3 * kMaxTileRows;
    std::fill(total_max, total_max + rows, -std::numeric_limits<float>::infinity());
    for (int key = 0; key < tokens; key += step) {
      compute(key, std::min(step, tokens - key), rows, s);
      for (int r = 0; r < rows; ++r) {
        merge_split(s.state[r], s.state[kMaxTileRows + r], s.out + r * dim, dim, total_max + r,
                    total_sum + r, s.total + r * dim);
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* to = y + (first + r) * width_;
      for (int d = 0; d < dim; ++d) to[d] = s.total[r * dim + d] / total_sum[r];
    }
  }

  void compute(int first_key, int keys, int rows, const Scratch& s) const {
    int limits[kMaxTileRows];
    std::fill(limits, limits + rows, keys);
    SplitTask task;
    task.q = s.q;
    task.rows = rows;
    task.head_dim = args_.head_dim;
    task.keys = s.chunk_keys + first_key / kChunkKeys;
    task.values = s.chunk_values + first_key / kChunkKeys;
    task.key_stride = kChunkKeys;
    task.limits = limits;
    task.num_keys = keys;
    task.scale = scale_;
    task.scores = s.scores;
    task.max = s.state;
    task.sum = s.state + kMaxTileRows;
    task.out = s.out;
    kernels_.split(task);
  }

  const VisionAttentionArgs& args_;
  const AttentionKernels& kernels_;
  int64_t width_;  // C
  float scale_;
};

void check(const VisionAttentionArgs& args) {
  TM_CHECK(args.head_dim > 0 && args.head_dim % kLanes == 0 && args.head_dim <= kSplitKeys &&
               args.num_heads > 0 && args.tokens_per_tile > 0,
           "vision attention with %d heads of %d over %d tokens: the CPU backend needs a head_dim "
           "that is a multiple of %d up to %d",
           args.num_heads, args.head_dim, args.tokens_per_tile, kLanes, kSplitKeys);
  const int64_t values =
      int64_t{args.num_tiles} * args.tokens_per_tile * args.num_heads * args.head_dim;
  TM_CHECK(args.qkv.dtype == DType::f32 && args.y.dtype == DType::f32 &&
               args.qkv.elements() == 3 * values && args.y.elements() == values,
           "vision attention over %lld and %lld values; expected %lld and %lld",
           static_cast<long long>(args.qkv.elements()), static_cast<long long>(args.y.elements()),
           static_cast<long long>(3 * values), static_cast<long long>(values));
}

void normalize_queries_and_keys(const VisionAttentionArgs& args, Isa isa, ThreadPool& pool) {
  const int64_t width = int64_t{args.num_heads} * args.head_dim;
  const int64_t rows = int64_t{args.num_tiles} * args.tokens_per_tile;
  const auto apply = [&](const Norm* norm, int64_t part) {
    if (norm == nullptr) return;
    const RowNorm row = row_norm_of(*norm, width);
    pool.parallel_for(rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* x = args.qkv.as<float>() + (3 * r + part) * width;
        row_norm(row, x, x, width, isa);
      }
    });
  };
  apply(args.q_norm, 0);
  apply(args.k_norm, 1);
}

}  // namespace

size_t vision_attention_scratch_bytes(int tokens_per_tile, int head_dim, int threads) {
  return scratch_floats(tokens_per_tile, head_dim) * sizeof(float) * threads;
}

void vision_attention(const VisionAttentionArgs& args, Isa isa, HostMemory& scratch,
                      ThreadPool& pool) {
  check(args);
  normalize_queries_and_keys(args, isa, pool);
  scratch.reserve(vision_attention_scratch_bytes(args.tokens_per_tile, args.head_dim, pool.size()),
                  "vision attention scratch");
  const TileAttention attention(args, attention_kernels(isa));
  const int pairs = args.num_tiles * args.num_heads;
  if (pairs == 0) return;
  const int tokens = args.tokens_per_tile;
  const int wanted_runs = ceil_div(kItemsPerThread * pool.size(), pairs);
  const int run_rows = std::min(
      tokens, std::max(kMinRunRows, round_up(ceil_div(tokens, wanted_runs), kMaxTileRows)));
  const int runs = ceil_div(tokens, run_rows);
  std::atomic<int> next{0};
  pool.run([&](int thread) {
    const Scratch s = scratch_at(scratch.floats() + thread * scratch_floats(tokens, args.head_dim),
                                 tokens, args.head_dim);
    for (int i = next.fetch_add(1); i < pairs * runs; i = next.fetch_add(1)) {
      const int pair = i / runs;
      const int begin = i % runs * run_rows;
      attention.run(pair / args.num_heads, pair % args.num_heads, begin,
                    std::min(begin + run_rows, tokens), s);
    }
  });
}

}  // namespace turbomind::cpu
