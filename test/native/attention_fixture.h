// Sequences with random q, k, v for attention tests: runs any mix of their tokens as one step over
// a paged cache, and gives the same answer in float64.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/isa.h"

namespace turbomind::test {

struct Shape {
  int heads = 2;
  int kv_heads = 1;
  int dim = 64;
  int block_size = 64;
  bool qk_norm = false;
  int bits = 16;
  int row() const { return (heads + 2 * kv_heads) * dim; }
};

// Tokens [first, first + count) of a sequence.
struct Piece {
  int sequence;
  int first;
  int count;
};

inline std::vector<float> random_values(size_t count, uint32_t seed, float spread = 1.0F) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

class AttentionFixture {
 public:
  AttentionFixture(Shape shape, std::vector<int> lengths, cpu::Isa isa = cpu::best_isa(),
                   int threads = 1)
      : shape_(shape), lengths_(std::move(lengths)), pool_(threads), attention_(isa, pool_) {
    for (int s = 0; s < static_cast<int>(lengths_.size()); ++s) {
      qkv_.push_back(random_values(static_cast<size_t>(lengths_[s]) * shape.row(), 100 + s));
      max_blocks_ = std::max(max_blocks_, ceil_div(lengths_[s], shape.block_size));
    }
    const int num_blocks = max_blocks_ * static_cast<int>(lengths_.size());
    cache_ = std::make_unique<cpu::CpuKvCache>(KvCacheSpec{.num_layers = 2,
                                                           .num_kv_heads = shape.kv_heads,
                                                           .head_dim = shape.dim,
                                                           .block_size = shape.block_size,
                                                           .num_blocks = num_blocks,
                                                           .bits = shape.bits});
    std::vector<int> ids(num_blocks);
    for (int i = 0; i < num_blocks; ++i) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), std::mt19937(7));
    block_table_.assign(ids.begin(), ids.end());
    for (int i = 0; i < shape.dim / 2; ++i) {
      inv_freq_.push_back(1.0F / std::pow(10000.0F, 2.0F * i / static_cast<float>(shape.dim)));
    }
    q_weight_ = random_values(shape.dim, 5);
    k_weight_ = random_values(shape.dim, 6);
    attention_.reserve({.max_tokens = 256,
                        .max_sequences = 8,
                        .max_kv_len = 2048,
                        .max_heads = shape.heads,
                        .max_head_dim = shape.dim,
                        .block_size = shape.block_size,
                        .quantized = shape.bits != 16});
  }

  // Rows of y, [tokens of the pieces, heads * dim], for layer 1.
  std::vector<float> run(const std::vector<Piece>& pieces) {
    std::vector<int32_t> ids, positions, slots, starts = {0}, kv_len, table;
    std::vector<float> qkv;
    for (const Piece& piece : pieces) {
      const int32_t* blocks = &block_table_[static_cast<size_t>(piece.sequence) * max_blocks_];
      for (int p = piece.first; p < piece.first + piece.count; ++p) {
        ids.push_back(0);
        positions.push_back(p);
        slots.push_back(blocks[p / shape_.block_size] * shape_.block_size + p % shape_.block_size);
        const float* row = &qkv_[piece.sequence][static_cast<size_t>(p) * shape_.row()];
        qkv.insert(qkv.end(), row, row + shape_.row());
      }
      starts.push_back(static_cast<int32_t>(ids.size()));
      kv_len.push_back(piece.first + piece.count);
      table.insert(table.end(), blocks, blocks + max_blocks_);
    }
    const int tokens = static_cast<int>(ids.size());
    std::vector<float> y(static_cast<size_t>(tokens) * shape_.heads * shape_.dim);
    const Norm q_norm = norm(q_weight_);
    const Norm k_norm = norm(k_weight_);
    attention_.begin_step({.token_ids = ids,
                           .positions = positions,
                           .slots = slots,
                           .query_start = starts,
                           .kv_len = kv_len,
                           .block_table = table,
                           .max_blocks = max_blocks_,
                           .sample_rows = {}});
    AttentionArgs args;
    args.qkv = TensorView(qkv.data(), DType::f32, {tokens, shape_.row()});
    args.y = TensorView(y.data(), DType::f32, {tokens, shape_.heads * shape_.dim});
    args.cache = cache_.get();
    args.layer = 1;
    args.num_heads = shape_.heads;
    args.num_kv_heads = shape_.kv_heads;
    args.head_dim = shape_.dim;
    args.rope.inv_freq = ConstTensorView(inv_freq_.data(), DType::f32, {shape_.dim / 2});
    if (shape_.qk_norm) {
      args.q_norm = &q_norm;
      args.k_norm = &k_norm;
    }
    attention_.run(args);
    return y;
  }

  // One row of y in float64.
  std::vector<double> expected(int sequence, int position) const {
    std::vector<double> y;
    const int group = shape_.heads / shape_.kv_heads;
    for (int h = 0; h < shape_.heads; ++h) {
      const auto q = head(sequence, position, h, &q_weight_);
      std::vector<double> scores;
      for (int j = 0; j <= position; ++j) {
        const auto k = key(sequence, j, shape_.heads + h / group);
        double dot = 0;
        for (int d = 0; d < shape_.dim; ++d) dot += q[d] * k[d];
        scores.push_back(dot / std::sqrt(static_cast<double>(shape_.dim)));
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      std::vector<double> out(shape_.dim);
      for (int j = 0; j <= position; ++j) {
        const double p = std::exp(scores[j] - max);
        sum += p;
        const auto v = value(sequence, j, shape_.heads + shape_.kv_heads + h / group);
        for (int d = 0; d < shape_.dim; ++d) out[d] += p * v[d];
      }
      for (double value : out) y.push_back(value / sum);
    }
    return y;
  }

  // Every float of the cache, as another request might have left it.
  void fill_cache(float value) {
    const KvCacheSpec& spec = cache_->spec();
    const size_t floats = cpu::CpuKvCache::block_bytes(spec) / sizeof(float) * spec.num_blocks;
    std::fill_n(reinterpret_cast<float*>(cache_->block(0)), floats, value);
  }
  // Layer 1's keys and values of a sequence as the cache gives them back, then used in expected().
  void read_back(int sequence) {
    const KvCacheSpec& spec = cache_->spec();
    const int dim = shape_.dim;
    for (int p = 0; p < lengths_[sequence]; ++p) {
      const BlockId block = block_table_[static_cast<size_t>(sequence) * max_blocks_ +
                                         static_cast<size_t>(p / spec.block_size)];
      for (int h = 0; h < shape_.kv_heads; ++h) {
        const auto chunk = cache_->chunk(1, block, h, p % spec.block_size, 1);
        std::vector<float> keys(static_cast<size_t>(dim) * cpu::kChunkKeys);
        std::vector<float> values(dim);
        const auto& kernels = cpu::kAttentionReference;
        (spec.bits == 8 ? kernels.dequantize8 : kernels.dequantize4)(chunk, keys.data(),
                                                                     values.data());
        std::vector<double>& key = stored_[{sequence, p, shape_.heads + h}];
        key.clear();
        for (int d = 0; d < dim; ++d) key.push_back(keys[static_cast<size_t>(d) * cpu::kChunkKeys]);
        stored_[{sequence, p, shape_.heads + shape_.kv_heads + h}].assign(values.begin(),
                                                                          values.end());
      }
    }
  }
  // What was written and what is read back, [0] key and [1] value of one head.
  std::array<std::vector<double>, 2> written(int sequence, int position, int kv_head) const {
    const float* v = raw(sequence, position, shape_.heads + shape_.kv_heads + kv_head);
    return {head(sequence, position, shape_.heads + kv_head, &k_weight_),
            std::vector<double>(v, v + shape_.dim)};
  }
  std::array<std::vector<double>, 2> stored(int sequence, int position, int kv_head) const {
    return {stored_.at({sequence, position, shape_.heads + kv_head}),
            stored_.at({sequence, position, shape_.heads + shape_.kv_heads + kv_head})};
  }
  float* qkv_row(int sequence, int position) {
    return &qkv_[sequence][static_cast<size_t>(position) * shape_.row()];
  }

 private:
  static Norm norm(const std::vector<float>& weight) {
    Norm n;
    n.weight = ConstTensorView(weight.data(), DType::f32, {static_cast<int64_t>(weight.size())});
    return n;
  }
  const float* raw(int sequence, int position, int head) const {
    return &qkv_[sequence][static_cast<size_t>(position) * shape_.row() + head * shape_.dim];
  }
  std::vector<double> key(int sequence, int position, int index) const {
    const auto found = stored_.find({sequence, position, index});
    return found != stored_.end() ? found->second : head(sequence, position, index, &k_weight_);
  }
  std::vector<double> value(int sequence, int position, int index) const {
    const auto found = stored_.find({sequence, position, index});
    if (found != stored_.end()) return found->second;
    const float* v = raw(sequence, position, index);
    return {v, v + shape_.dim};
  }
  // Normed and rotated. The angle is a float32 product by definition; the rest is float64.
  std::vector<double> head(int sequence, int position, int index,
                           const std::vector<float>* weight) const {
    const float* from = raw(sequence, position, index);
    std::vector<double> x(from, from + shape_.dim);
    if (shape_.qk_norm) {
      double square = 0;
      for (double value : x) square += value * value;
      const double scale = 1.0 / std::sqrt(square / shape_.dim + static_cast<double>(1e-6F));
      for (int d = 0; d < shape_.dim; ++d) x[d] *= scale * (*weight)[d];
    }
    const int half = shape_.dim / 2;
    std::vector<double> y(shape_.dim);
    for (int i = 0; i < half; ++i) {
      const double angle = static_cast<float>(position) * inv_freq_[i];
      y[i] = x[i] * std::cos(angle) - x[i + half] * std::sin(angle);
      y[i + half] = x[i + half] * std::cos(angle) + x[i] * std::sin(angle);
    }
    return y;
  }

  Shape shape_;
  std::vector<int> lengths_;
  cpu::ThreadPool pool_;
  cpu::PagedAttention attention_;
  std::unique_ptr<cpu::CpuKvCache> cache_;
  std::vector<std::vector<float>> qkv_;  // per sequence [length, row]
  std::vector<int32_t> block_table_;     // [sequences, max_blocks]
  std::map<std::array<int, 3>, std::vector<double>>
      stored_;  // (sequence, position, head) read back
  int max_blocks_ = 1;
  std::vector<float> inv_freq_, q_weight_, k_weight_;
};

}  // namespace turbomind::test
