// Every op of Backend as the plainest loop that is obviously right: f32 values, dot products in
// double. It judges the real backends in tests and is as slow as it looks. Fresh memory is filled
// with NaN, so that an op which reads what nobody wrote is found.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "quant/weight_format.h"

namespace turbomind::test {

class HostBuffer : public Buffer {
 public:
  explicit HostBuffer(size_t bytes)
      : values_((bytes + sizeof(float) - 1) / sizeof(float),
                std::numeric_limits<float>::quiet_NaN()),
        bytes_(bytes) {}
  void* data() override { return values_.data(); }
  size_t bytes() const override { return bytes_; }

 private:
  std::vector<float> values_;
  size_t bytes_;
};

// [N, K] floats, and [N] biases (zeros where the checkpoint has none).
class ReferenceWeight : public LinearWeight {
 public:
  std::vector<float> matrix;
  std::vector<float> bias;
  int64_t k = 0;
  int64_t n = 0;
  PartOrder order = PartOrder::concatenated;
  int64_t in_features() const override { return k; }
  int64_t out_features() const override { return n; }
  size_t bytes() const override { return (matrix.size() + bias.size()) * sizeof(float); }
  const float* row(int64_t i) const { return matrix.data() + i * k; }
};

class ReferenceKvCache : public KvCache {
 public:
  explicit ReferenceKvCache(const KvCacheSpec& spec) : spec_(spec) {
    const size_t floats = static_cast<size_t>(spec.num_layers) * spec.num_blocks * spec.block_size *
                          spec.num_kv_heads * spec.head_dim;
    keys.assign(floats, std::numeric_limits<float>::quiet_NaN());
    values.assign(floats, std::numeric_limits<float>::quiet_NaN());
  }
  const KvCacheSpec& spec() const override { return spec_; }
  // Start of the [Hkv, D] row of one token in one layer.
  size_t at(int layer, int slot) const {
    TM_CHECK(slot >= 0 && slot < spec_.num_blocks * spec_.block_size, "slot %d", slot);
    const size_t tokens = static_cast<size_t>(spec_.num_blocks) * spec_.block_size;
    return (layer * tokens + slot) * spec_.num_kv_heads * spec_.head_dim;
  }
  std::vector<float> keys;
  std::vector<float> values;

 private:
  KvCacheSpec spec_;
};

class ReferenceBackend : public Backend {
 public:
  DeviceInfo info() const override { return {"reference", "plain loops", 0, 0}; }
  DType activation_dtype() const override { return DType::f32; }

  std::unique_ptr<Buffer> allocate(size_t bytes) override {
    return std::make_unique<HostBuffer>(bytes);
  }
  void upload(TensorView device, const void* host) override {
    std::memcpy(device.data, host, device.bytes());
  }
  void download(void* host, ConstTensorView device) override {
    std::memcpy(host, device.data, device.bytes());
  }
  void synchronize() override {}
  std::unique_ptr<Buffer> allocate_host(size_t bytes) override { return allocate(bytes); }

  size_t weight_bytes(const LinearSource& source, WeightUse) const override {
    const auto n = static_cast<size_t>(source.out_features());
    return n * (static_cast<size_t>(source.in_features) + 1) * sizeof(float);
  }
  size_t allocated_bytes() const override { return 0; }  // not counted

  std::unique_ptr<LinearWeight> load_linear(const LinearSource& source) override {
    auto weight = std::make_unique<ReferenceWeight>();
    weight->k = source.in_features;
    weight->n = source.out_features();
    weight->order = source.order;
    weight->matrix.resize(static_cast<size_t>(weight->n * weight->k));
    dequantize(source, weight->matrix);
    for (const LinearPart& part : source.parts) {
      for (int64_t i = 0; i < part.out_features; ++i) {
        weight->bias.push_back(part.bias ? load_float(part.bias.data, part.bias.dtype, i) : 0.0F);
      }
    }
    return weight;
  }
  std::unique_ptr<LinearWeight> load_embedding(ConstTensorView table) override {
    LinearSource source;
    source.name = "embedding";
    source.in_features = table.dim(1);
    LinearPart part;
    part.out_features = table.dim(0);
    part.weight = table;
    source.parts.push_back(part);
    return load_linear(source);
  }
  std::unique_ptr<LinearWeight> load_head(const LinearSource& source) override {
    return load_linear(source);
  }
  std::unique_ptr<Buffer> load_vector(ConstTensorView source) override {
    auto buffer =
        std::make_unique<HostBuffer>(static_cast<size_t>(source.elements()) * sizeof(float));
    float* out = static_cast<float*>(buffer->data());
    for (int64_t i = 0; i < source.elements(); ++i)
      out[i] = load_float(source.data, source.dtype, i);
    return buffer;
  }

  size_t kv_block_bytes(const KvCacheSpec& s) const override {
    return size_t{2} * s.num_layers * s.block_size * s.num_kv_heads * s.head_dim * sizeof(float);
  }
  std::unique_ptr<KvCache> make_kv_cache(const KvCacheSpec& spec) override {
    return std::make_unique<ReferenceKvCache>(spec);
  }
  void copy_blocks(KvCache& cache, std::span<const std::pair<BlockId, BlockId>> from_to) override {
    std::vector<char> bytes(kv_block_bytes(cache.spec()));
    for (const auto& [from, to] : from_to) {
      save_blocks(cache, {&from, 1}, bytes.data());
      load_blocks(cache, {&to, 1}, bytes.data());
    }
  }
  void save_blocks(const KvCache& cache, std::span<const BlockId> blocks, void* host) override {
    const auto& kv = static_cast<const ReferenceKvCache&>(cache);
    auto* to = static_cast<float*>(host);
    each_block_run(kv, blocks, [&](size_t at, size_t count) {
      to = std::copy_n(kv.keys.data() + at, count, to);
      to = std::copy_n(kv.values.data() + at, count, to);
    });
  }
  void load_blocks(KvCache& cache, std::span<const BlockId> blocks, const void* host) override {
    auto& kv = static_cast<ReferenceKvCache&>(cache);
    const auto* from = static_cast<const float*>(host);
    each_block_run(kv, blocks, [&](size_t at, size_t count) {
      std::copy_n(from, count, kv.keys.data() + at);
      std::copy_n(from + count, count, kv.values.data() + at);
      from += 2 * count;
    });
  }
  WorkspaceBytes workspace_bytes(const WorkspaceSpec&) const override { return {}; }
  WorkspaceBytes reserve_workspace(const WorkspaceSpec&) override { return {}; }

  void begin_step(const StepBatch& batch) override { batch_ = batch; }
  void execute(const std::function<void()>& forward) override { forward(); }

  void embed(const EmbedArgs& args) override {
    const auto& table = static_cast<const ReferenceWeight&>(*args.table);
    const int64_t h = args.x.dim(1);
    float* x = args.x.as<float>();
    for (int t = 0; t < batch_.num_tokens(); ++t) {
      const TokenId id = batch_.token_ids[t];
      TM_CHECK(id >= 0 && id < table.n, "token id %d of a vocabulary of %lld", id,
               static_cast<long long>(table.n));
      std::copy_n(table.row(id), h, x + t * h);
    }
    for (const EmbeddingOverride& image : args.overrides) {
      TM_CHECK(image.row >= 0 && image.row + image.embeddings.dim(0) <= batch_.num_tokens(),
               "override rows");
      std::copy_n(image.embeddings.as<float>(), image.embeddings.elements(), x + image.row * h);
    }
  }

  void norm(const Norm& norm, ConstTensorView x, TensorView y) override {
    for (int64_t t = 0; t < x.dim(0); ++t) {
      norm_row(norm, x.as<float>() + t * x.dim(1), x.dim(1), y.as<float>() + t * x.dim(1));
    }
  }

  void linear(const LinearArgs& args) override {
    const auto& w = static_cast<const ReferenceWeight&>(*args.weight);
    const bool gated = args.epilogue == Epilogue::silu_mul;
    TM_CHECK(args.x.dim(1) == w.k && args.y.dim(1) == (gated ? w.n / 2 : w.n), "linear shapes");
    TM_CHECK(gated == (w.order == PartOrder::gate_up), "part order and epilogue");
    std::vector<float> x(static_cast<size_t>(w.k));
    std::vector<float> z(static_cast<size_t>(w.n));
    for (int64_t t = 0; t < args.x.dim(0); ++t) {
      std::copy_n(args.x.as<float>() + t * w.k, w.k, x.data());
      if (args.norm != nullptr) norm_row(*args.norm, x.data(), w.k, x.data());
      for (int64_t n = 0; n < w.n; ++n)
        z[n] = static_cast<float>(dot(w.row(n), x.data(), w.k) + w.bias[n]);
      float* y = args.y.as<float>() + t * args.y.dim(1);
      for (int64_t n = 0; n < args.y.dim(1); ++n) {
        switch (args.epilogue) {
          case Epilogue::none:
            y[n] = z[n];
            break;
          case Epilogue::gelu:
            y[n] = static_cast<float>(0.5 * z[n] * (1 + std::erf(z[n] / std::sqrt(2.0))));
            break;
          case Epilogue::silu_mul:
            y[n] = static_cast<float>(z[n] / (1 + std::exp(-double{z[n]})) * z[n + w.n / 2]);
            break;
          case Epilogue::residual:
            y[n] += (args.scale ? args.scale.as<float>()[n] : 1.0F) * z[n];
            break;
        }
      }
    }
  }

  void attention(const AttentionArgs& a) override {
    auto& cache = static_cast<ReferenceKvCache&>(*a.cache);
    const int d = a.head_dim;
    const int columns = (a.num_heads + 2 * a.num_kv_heads) * d;
    float* qkv = a.qkv.as<float>();
    for (int t = 0; t < batch_.num_tokens(); ++t) {
      float* q = qkv + int64_t{t} * columns;
      float* k = q + a.num_heads * d;
      const float* v = k + a.num_kv_heads * d;
      for (int h = 0; h < a.num_heads; ++h)
        prepare_head(a, a.q_norm, batch_.positions[t], q + h * d);
      for (int h = 0; h < a.num_kv_heads; ++h)
        prepare_head(a, a.k_norm, batch_.positions[t], k + h * d);
      const size_t to = cache.at(a.layer, batch_.slots[t]);
      std::copy_n(k, a.num_kv_heads * d, cache.keys.data() + to);
      std::copy_n(v, a.num_kv_heads * d, cache.values.data() + to);
      for (int h = 0; h < a.num_kv_heads && cache.spec().bits != 16; ++h) {
        round_head(cache.keys.data() + to + h * d, d, cache.spec().bits);
        round_head(cache.values.data() + to + h * d, d, cache.spec().bits);
      }
    }
    const double scale =
        a.softmax_scale != 0 ? a.softmax_scale : 1 / std::sqrt(static_cast<double>(d));
    const int block_size = cache.spec().block_size;
    for (int s = 0; s < batch_.num_sequences(); ++s) {
      for (int t = batch_.query_start[s]; t < batch_.query_start[s + 1]; ++t) {
        const int tokens = batch_.positions[t] + 1;  // causal: this one and all before it
        TM_CHECK(tokens <= batch_.kv_len[s], "position %d of %d tokens", tokens - 1,
                 batch_.kv_len[s]);
        std::vector<size_t> rows(static_cast<size_t>(tokens));
        for (int j = 0; j < tokens; ++j) {
          const int block = batch_.block_table[s * batch_.max_blocks + j / block_size];
          rows[j] = cache.at(a.layer, block * block_size + j % block_size);
        }
        for (int h = 0; h < a.num_heads; ++h) {
          const int kv_head = h / (a.num_heads / a.num_kv_heads);
          attend(
              qkv + int64_t{t} * columns + h * d, d, scale, tokens,
              [&](int j) { return cache.keys.data() + rows[j] + kv_head * d; },
              [&](int j) { return cache.values.data() + rows[j] + kv_head * d; },
              a.y.as<float>() + (int64_t{t} * a.num_heads + h) * d);
        }
      }
    }
  }

  void sample(const SampleArgs& args) override {
    const auto& w = static_cast<const ReferenceWeight&>(*args.head);
    for (size_t r = 0; r < args.rows.size(); ++r) {
      std::vector<float> row(static_cast<size_t>(w.n));
      const ConstTensorView x = args.x.rows(batch_.sample_rows[r], 1);
      this->logits({.head = args.head, .norm = args.norm, .x = x}, row);
      args.results[r] = choose(args.rows[r], row);
    }
  }

  void logits(const LogitsArgs& args, std::span<float> out) override {
    const auto& w = static_cast<const ReferenceWeight&>(*args.head);
    std::vector<float> x(static_cast<size_t>(w.k));
    for (int64_t r = 0; r < args.x.dim(0); ++r) {
      norm_row(*args.norm, args.x.as<float>() + r * w.k, w.k, x.data());
      for (int64_t n = 0; n < w.n; ++n)
        out[r * w.n + n] = static_cast<float>(dot(w.row(n), x.data(), w.k) + w.bias[n]);
    }
  }

  void patchify(const PatchifyArgs& a) override {
    const int64_t size = a.tiles.dim(1);
    const int64_t p = a.patch_size;
    const int64_t grid = size / p;
    float* out = a.patches.as<float>();
    for (int64_t tile = 0; tile < a.tiles.dim(0); ++tile) {
      for (int64_t r = 0; r < grid; ++r) {
        for (int64_t c = 0; c < grid; ++c) {
          for (int channel = 0; channel < 3; ++channel) {
            for (int64_t y = 0; y < p; ++y) {
              for (int64_t x = 0; x < p; ++x) {
                const int64_t pixel = ((tile * size + r * p + y) * size + c * p + x) * 3 + channel;
                *out++ = (a.tiles.as<uint8_t>()[pixel] / 255.0F - a.mean[channel]) / a.std[channel];
              }
            }
          }
        }
      }
    }
  }

  void vision_embed(const VisionEmbedArgs& a) override {
    const int64_t c = a.x.dim(1);
    const int64_t tokens = a.positions.dim(0);
    for (int64_t t = 0; t < a.num_tiles; ++t) {
      for (int64_t i = 0; i < tokens; ++i) {
        const float* from =
            i == 0 ? a.cls.as<float>() : a.patches.as<float>() + (t * (tokens - 1) + i - 1) * c;
        for (int64_t j = 0; j < c; ++j) {
          a.x.as<float>()[(t * tokens + i) * c + j] = from[j] + a.positions.as<float>()[i * c + j];
        }
      }
    }
  }

  void vision_attention(const VisionAttentionArgs& a) override {
    const int64_t c = int64_t{a.num_heads} * a.head_dim;
    float* qkv = a.qkv.as<float>();
    const double scale = 1 / std::sqrt(static_cast<double>(a.head_dim));
    for (int64_t row = 0; row < a.qkv.dim(0); ++row) {
      if (a.q_norm != nullptr) norm_row(*a.q_norm, qkv + row * 3 * c, c, qkv + row * 3 * c);
      if (a.k_norm != nullptr) norm_row(*a.k_norm, qkv + row * 3 * c + c, c, qkv + row * 3 * c + c);
    }
    for (int64_t row = 0; row < a.qkv.dim(0); ++row) {
      const int64_t first = row / a.tokens_per_tile * a.tokens_per_tile;
      for (int h = 0; h < a.num_heads; ++h) {
        const float* base = qkv + first * 3 * c + h * a.head_dim;
        attend(
            qkv + row * 3 * c + h * a.head_dim, a.head_dim, scale, a.tokens_per_tile,
            [&](int j) { return base + j * 3 * c + c; },
            [&](int j) { return base + j * 3 * c + 2 * c; },
            a.y.as<float>() + row * c + h * a.head_dim);
      }
    }
  }

  void pixel_shuffle(const PixelShuffleArgs& a) override {
    const int64_t c = a.x.dim(1);
    const int64_t side = a.grid / a.factor;
    float* out = a.y.as<float>();
    for (int64_t tile = 0; tile < a.num_tiles; ++tile) {
      for (int64_t r = 0; r < side; ++r) {
        for (int64_t q = 0; q < side; ++q) {
          for (int64_t dr = 0; dr < a.factor; ++dr) {
            for (int64_t dc = 0; dc < a.factor; ++dc) {
              const int64_t patch = (r * a.factor + dr) * a.grid + q * a.factor + dc;
              const float* from =
                  a.x.as<float>() + (tile * (int64_t{a.grid} * a.grid + 1) + 1 + patch) * c;
              out = std::copy_n(from, c, out);
            }
          }
        }
      }
    }
  }

 private:
  // One layer's rows of each block in turn: first float and count.
  template <class Body>
  static void each_block_run(const ReferenceKvCache& cache, std::span<const BlockId> blocks,
                             Body&& body) {
    const KvCacheSpec& s = cache.spec();
    const size_t count = static_cast<size_t>(s.block_size) * s.num_kv_heads * s.head_dim;
    for (BlockId block : blocks) {
      for (int layer = 0; layer < s.num_layers; ++layer) {
        body(cache.at(layer, block * s.block_size), count);
      }
    }
  }

  static double dot(const float* a, const float* b, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += double{a[i]} * b[i];
    return sum;
  }

  static void norm_row(const Norm& norm, const float* x, int64_t n, float* y) {
    TM_CHECK(norm.weight.elements() == n && norm.weight.dtype == DType::f32, "norm weight");
    const double mean = norm.kind == NormKind::layer ? std::accumulate(x, x + n, 0.0) / n : 0.0;
    double variance = 0;
    for (int64_t i = 0; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean) / n;
    const double scale = 1 / std::sqrt(variance + norm.eps);
    for (int64_t i = 0; i < n; ++i) {
      const double bias = norm.bias ? norm.bias.as<float>()[i] : 0.0;
      y[i] = static_cast<float>((x[i] - mean) * scale * norm.weight.as<float>()[i] + bias);
    }
  }

  // The nearest f16, ties to even; infinity past the largest.
  static double to_f16(double x) {
    if (x == 0 || !std::isfinite(x)) return x;
    int exponent = 0;
    std::frexp(x, &exponent);  // |x| = m * 2^exponent, m in [0.5, 1)
    const double ulp = std::ldexp(1.0, std::max(exponent - 11, -24));
    const double rounded = std::nearbyint(x / ulp) * ulp;
    return std::abs(rounded) > 65504 ? std::copysign(HUGE_VAL, x) : rounded;
  }

  // What a quantised cache gives back for one token and head: KvCacheSpec::bits.
  static void round_head(float* x, int n, int bits) {
    const auto [least, most] = std::minmax_element(x, x + n);
    const float levels = static_cast<float>((1 << bits) - 1);
    const auto zero = static_cast<float>(to_f16(*least));
    const auto scale = static_cast<float>(to_f16((*most - *least) / levels));
    for (int i = 0; i < n; ++i) {
      const float q =
          scale == 0 ? 0.0F : std::clamp(std::nearbyint((x[i] - zero) / scale), 0.0F, levels);
      x[i] = q * scale + zero;
    }
  }

  // Norm, then rotation of the pairs (i, i + D / 2).
  static void prepare_head(const AttentionArgs& a, const Norm* norm, int position, float* head) {
    const int half = a.head_dim / 2;
    if (norm != nullptr) norm_row(*norm, head, a.head_dim, head);
    for (int i = 0; i < half; ++i) {
      // The angle is an f32 product, as in the models' reference implementations.
      const float angle = static_cast<float>(position) * a.rope.inv_freq.as<float>()[i];
      const double cosine = std::cos(double{angle}) * a.rope.attention_scaling;
      const double sine = std::sin(double{angle}) * a.rope.attention_scaling;
      const float low = head[i];
      const float high = head[i + half];
      head[i] = static_cast<float>(low * cosine - high * sine);
      head[i + half] = static_cast<float>(high * cosine + low * sine);
    }
  }

  template <class Key, class Value>
  static void attend(const float* q, int d, double scale, int tokens, Key key, Value value,
                     float* y) {
    std::vector<double> weights(static_cast<size_t>(tokens));
    for (int j = 0; j < tokens; ++j) weights[j] = dot(q, key(j), d) * scale;
    const double best = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - best);
    for (int i = 0; i < d; ++i) {
      double total = 0;
      for (int j = 0; j < tokens; ++j) total += weights[j] * value(j)[i];
      y[i] = static_cast<float>(total / sum);
    }
  }

  static SampleResult choose(const SampleRow& row, std::vector<float>& logits) {
    const SamplingParams& params = *row.params;
    const float never = -std::numeric_limits<float>::infinity();
    std::vector<TokenId> seen(row.tokens.begin(), row.tokens.end());
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    for (TokenId id : seen) {
      if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
      logits[id] = logits[id] > 0 ? logits[id] / params.repetition_penalty
                                  : logits[id] * params.repetition_penalty;
    }
    for (TokenId id : row.completion()) logits[id] -= params.frequency_penalty;
    for (TokenId id = 0; id < static_cast<TokenId>(logits.size()); ++id) {
      const auto said = row.completion();
      if (std::find(said.begin(), said.end(), id) != said.end()) {
        logits[id] -= params.presence_penalty;
      }
      const size_t word = static_cast<size_t>(id) / 32;
      const bool allowed = word < row.allowed.size() && (row.allowed[word] >> (id % 32) & 1) != 0;
      if (!row.allowed.empty() && !allowed) logits[id] = never;
    }
    for (const auto& [id, bias] : params.logit_bias) logits[id] += bias;
    for (TokenId id : row.banned) logits[id] = never;
    for (const std::vector<TokenId>& word : params.bad_words) {
      const size_t n = word.size();
      if (n == 0 || row.tokens.size() < n - 1) continue;
      if (std::equal(word.begin(), word.end() - 1, row.tokens.end() - (n - 1)))
        logits[word.back()] = never;
    }
    std::vector<TokenId> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });

    SampleResult result;
    result.token = params.do_sample ? draw(row, logits, order) : order[0];
    if (params.num_logprobs > 0) {
      double sum = 0;
      for (float logit : logits) sum += std::exp(double{logit} - logits[order[0]]);
      const auto logprob = [&](TokenId id) {
        return static_cast<float>(logits[id] - logits[order[0]] - std::log(sum));
      };
      result.logprob = logprob(result.token);
      for (int i = 0; i < params.num_logprobs && i < static_cast<int>(order.size()); ++i) {
        result.top_logprobs.emplace_back(order[i], logprob(order[i]));
      }
    }
    return result;
  }

  // Inverse of the cumulative distribution over what the filters leave, best first.
  static TokenId draw(const SampleRow& row, const std::vector<float>& logits,
                      const std::vector<TokenId>& order) {
    const SamplingParams& params = *row.params;
    std::vector<double> p;
    for (TokenId id : order)
      p.push_back(std::exp((double{logits[id]} - logits[order[0]]) / params.temperature));
    if (params.top_k > 0 && static_cast<size_t>(params.top_k) < p.size()) p.resize(params.top_k);
    double total = std::accumulate(p.begin(), p.end(), 0.0);
    size_t keep = 0;
    for (double sum = 0; keep < p.size() && (keep == 0 || sum < params.top_p * total); ++keep)
      sum += p[keep];
    p.resize(keep);
    while (p.size() > 1 && p.back() < params.min_p * p[0]) p.pop_back();
    total = std::accumulate(p.begin(), p.end(), 0.0);
    uint64_t bits = params.seed + 0x9E3779B97F4A7C15ULL * (row.completion_idx + 1);
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ULL;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBULL;
    double left = static_cast<double>((bits ^ (bits >> 31)) >> 11) * 0x1p-53 * total;
    for (size_t i = 0; i < p.size(); ++i) {
      left -= p[i];
      if (left < 0) return order[i];
    }
    return order[p.size() - 1];
  }

  StepBatch batch_;
};

}  // namespace turbomind::test
