// The layer loop. Five ops a layer: norms ride on the linear layer they feed, activations and
// residual sums on the one they follow, so a backend can fuse each line into one kernel.
#include "models/decoder.h"

#include <algorithm>
#include <cmath>

#include "base/float_formats.h"

namespace turbomind {
namespace {

int64_t qkv_features(const DecoderSpec& spec) {
  return (static_cast<int64_t>(spec.num_heads) + 2 * static_cast<int64_t>(spec.num_kv_heads)) *
         spec.head_dim;
}

int64_t attention_features(const DecoderSpec& spec) {
  return static_cast<int64_t>(spec.num_heads) * spec.head_dim;
}

// theta^(-2i / D), in float32 step by step as the reference implementations round it.
std::vector<float> inverse_frequencies(const DecoderSpec& spec) {
  std::vector<float> values(static_cast<size_t>(spec.head_dim) / 2);
  for (size_t i = 0; i < values.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(spec.head_dim);
    values[i] = 1.0F / std::pow(spec.rope_theta, exponent);
  }
  return values;
}

}  // namespace

struct Decoder::Layer {
  WeightLoader::Vector input_norm_weight;
  WeightLoader::Vector post_attention_norm_weight;
  WeightLoader::Vector q_norm_weight;  // qk_norm only
  WeightLoader::Vector k_norm_weight;
  Norm input_norm;
  Norm post_attention_norm;
  Norm q_norm;
  Norm k_norm;
  std::unique_ptr<LinearWeight> qkv;
  std::unique_ptr<LinearWeight> o;
  std::unique_ptr<LinearWeight> gate_up;
  std::unique_ptr<LinearWeight> down;

  Layer(WeightLoader& loader, const DecoderSpec& spec, int layer_idx) {
    const std::string prefix = "layers." + std::to_string(layer_idx) + ".";
    const int64_t hidden = spec.hidden_size;
    const int64_t q_features = attention_features(spec);
    const int64_t kv_features = static_cast<int64_t>(spec.num_kv_heads) * spec.head_dim;
    const Bias qkv_bias = spec.qkv_bias ? Bias::required : Bias::none;
    const auto norm = [&](WeightLoader::Vector& weight, const char* name, int64_t size) {
      weight = loader.vector(prefix + name, {size});
      return Norm{NormKind::rms, weight.view, {}, spec.norm_eps};
    };
    input_norm = norm(input_norm_weight, "input_norm.weight", hidden);
    qkv = loader.linear(hidden, {{prefix + "attn.q", q_features, qkv_bias},
                                 {prefix + "attn.k", kv_features, qkv_bias},
                                 {prefix + "attn.v", kv_features, qkv_bias}});
    if (spec.qk_norm) {
      q_norm = norm(q_norm_weight, "attn.q_norm.weight", spec.head_dim);
      k_norm = norm(k_norm_weight, "attn.k_norm.weight", spec.head_dim);
    }
    o = loader.linear(q_features, {{prefix + "attn.o", hidden, Bias::optional}});
    post_attention_norm = norm(post_attention_norm_weight, "post_attention_norm.weight", hidden);
    gate_up = loader.linear(hidden,
                            {{prefix + "mlp.gate", spec.intermediate_size, Bias::optional},
                             {prefix + "mlp.up", spec.intermediate_size, Bias::optional}},
                            PartOrder::gate_up);
    down = loader.linear(spec.intermediate_size, {{prefix + "mlp.down", hidden, Bias::optional}});
  }
};

Decoder::Decoder(WeightLoader& loader, const DecoderSpec& spec, int max_tokens)
    : backend_(loader.backend()), spec_(spec), max_tokens_(max_tokens) {
  TM_CHECK(max_tokens > 0, "max_tokens %d", max_tokens);
  const int64_t hidden = spec.hidden_size;
  embedding_ = loader.embedding("embed_tokens.weight", spec.vocab_size, hidden);
  layers_.reserve(static_cast<size_t>(spec.num_layers));
  for (int i = 0; i < spec.num_layers; ++i) layers_.emplace_back(loader, spec, i);
  final_norm_weight_ = loader.vector("norm.weight", {hidden});
  final_norm_ = Norm{NormKind::rms, final_norm_weight_.view, {}, spec.norm_eps};
  head_ = spec.tied_embeddings
              ? loader.head("embed_tokens.weight", spec.vocab_size, hidden, WeightLoader::Tied::yes)
              : loader.head("lm_head.weight", spec.vocab_size, hidden, WeightLoader::Tied::no);

  const std::vector<float> inv_freq = inverse_frequencies(spec);
  inv_freq_ = backend_.allocate(inv_freq.size() * sizeof(float));
  const TensorView inv_freq_view(inv_freq_->data(), DType::f32,
                                 {static_cast<int64_t>(inv_freq.size())});
  backend_.upload(inv_freq_view, inv_freq.data());
  rope_.inv_freq = inv_freq_view;

  const auto activations = [&](int64_t columns) {
    return backend_.allocate(static_cast<size_t>(max_tokens * columns) *
                             dtype_bytes(backend_.activation_dtype()));
  };
  hidden_ = activations(hidden);
  qkv_ = activations(qkv_features(spec));
  attention_ = activations(attention_features(spec));
  mlp_ = activations(spec.intermediate_size);
}

Decoder::~Decoder() = default;

KvCacheSpec Decoder::kv_cache_spec(const DecoderSpec& spec, int block_size, int num_blocks,
                                   int bits) {
  return {spec.num_layers, spec.num_kv_heads, spec.head_dim, block_size, num_blocks, bits};
}

size_t Decoder::activation_bytes(const DecoderSpec& spec, DType dtype, int max_tokens) {
  const int64_t columns =
      spec.hidden_size + qkv_features(spec) + attention_features(spec) + spec.intermediate_size;
  return static_cast<size_t>(columns * max_tokens) * dtype_bytes(dtype);
}

Backend::WorkspaceSpec Decoder::workspace(const DecoderSpec& spec, int max_tokens,
                                          int max_sequences, int max_rows, int max_kv_len) {
  Backend::WorkspaceSpec workspace;
  workspace.max_tokens = max_tokens;
  workspace.max_sequences = max_sequences;
  workspace.max_rows = max_rows;
  workspace.max_in_features =
      std::max<int64_t>({spec.hidden_size, attention_features(spec), spec.intermediate_size});
  workspace.max_out_features = std::max<int64_t>(
      {spec.hidden_size, qkv_features(spec), 2 * static_cast<int64_t>(spec.intermediate_size)});
  workspace.vocab_size = spec.vocab_size;
  workspace.max_kv_len = max_kv_len;
  workspace.max_heads = spec.num_heads;
  workspace.max_head_dim = spec.head_dim;
  workspace.hidden_size = spec.hidden_size;
  return workspace;
}

TensorView Decoder::rows(Buffer& buffer, int64_t num_rows, int64_t columns) const {
  return TensorView(buffer.data(), backend_.activation_dtype(), {num_rows, columns});
}

void Decoder::forward(const StepBatch& batch, KvCache& cache,
                      std::span<const EmbeddingOverride> overrides) {
  TM_CHECK(batch.num_tokens() >= 1 && batch.num_tokens() <= max_tokens_,
           "a step of %d tokens; the decoder was made for 1 to %d", batch.num_tokens(),
           max_tokens_);
  num_tokens_ = batch.num_tokens();
  num_rows_ = static_cast<int>(batch.sample_rows.size());
  backend_.begin_step(batch);
  backend_.execute([&] {
    const TensorView x = rows(*hidden_, num_tokens_, spec_.hidden_size);
    backend_.embed({.table = embedding_.get(), .x = x, .overrides = overrides});
    for (int i = 0; i < spec_.num_layers; ++i) {
      run_layer(i, num_tokens_, cache);
    }
    if (num_rows_ > 0) {
      backend_.start_sample({.head = head_.get(), .norm = &final_norm_, .x = x});
    }
  });
}

void Decoder::run_layer(int layer_idx, int num_tokens, KvCache& cache) {
  const auto idx = static_cast<size_t>(layer_idx);
  const Layer& layer = layers_[idx];
  const Norm* next_input_norm = idx + 1 < layers_.size() ? &layers_[idx + 1].input_norm : nullptr;
  const TensorView x = rows(*hidden_, num_tokens, spec_.hidden_size);
  const TensorView qkv = rows(*qkv_, num_tokens, qkv_features(spec_));
  const TensorView attended = rows(*attention_, num_tokens, attention_features(spec_));
  const TensorView mlp = rows(*mlp_, num_tokens, spec_.intermediate_size);

  backend_.linear({.weight = layer.qkv.get(), .norm = &layer.input_norm, .x = x, .y = qkv});
  backend_.attention({.qkv = qkv,
                      .y = attended,
                      .cache = &cache,
                      .layer = layer_idx,
                      .num_heads = spec_.num_heads,
                      .num_kv_heads = spec_.num_kv_heads,
                      .head_dim = spec_.head_dim,
                      .rope = rope_,
                      .q_norm = spec_.qk_norm ? &layer.q_norm : nullptr,
                      .k_norm = spec_.qk_norm ? &layer.k_norm : nullptr});
  backend_.linear({.weight = layer.o.get(),
                   .x = attended,
                   .y = x,
                   .epilogue = Epilogue::residual,
                   .next_norm = &layer.post_attention_norm});
  backend_.linear({.weight = layer.gate_up.get(),
                   .norm = &layer.post_attention_norm,
                   .x = x,
                   .y = mlp,
                   .epilogue = Epilogue::silu_mul});
  backend_.linear({.weight = layer.down.get(),
                   .x = mlp,
                   .y = x,
                   .epilogue = Epilogue::residual,
                   .next_norm = next_input_norm});
}

void Decoder::warm_up(const StepBatch& batch, KvCache& cache, std::span<const SampleRow> rows,
                      std::span<SampleResult> results) {
  num_tokens_ = batch.num_tokens();
  num_rows_ = static_cast<int>(batch.sample_rows.size());
  backend_.begin_step(batch);
  const TensorView x = this->rows(*hidden_, num_tokens_, spec_.hidden_size);
  backend_.embed({.table = embedding_.get(), .x = x, .overrides = {}});
  run_layer(0, num_tokens_, cache);
  backend_.start_sample({.head = head_.get(), .norm = &final_norm_, .x = x});
  sample(rows, results);
}

void Decoder::sample(std::span<const SampleRow> rows, std::span<SampleResult> results) {
  TM_CHECK(static_cast<int>(rows.size()) == num_rows_ && results.size() == rows.size(),
           "%zu sample rows and %zu results for a step that wants %d", rows.size(), results.size(),
           num_rows_);
  if (rows.empty()) return;
  backend_.sample({.head = head_.get(),
                   .norm = &final_norm_,
                   .x = this->rows(*hidden_, num_tokens_, spec_.hidden_size),
                   .rows = rows,
                   .results = results});
}

bool Decoder::launch_sample(std::span<const SampleRow> rows) {
  TM_CHECK(static_cast<int>(rows.size()) == num_rows_ && num_rows_ > 0,
           "a launch of %zu rows for a step that wants %d", rows.size(), num_rows_);
  return backend_.launch_sample({.head = head_.get(),
                                 .norm = &final_norm_,
                                 .x = this->rows(*hidden_, num_tokens_, spec_.hidden_size),
                                 .rows = rows});
}

void Decoder::logits(int first_row, std::span<float> out) {
  const auto count = static_cast<int64_t>(out.size()) / spec_.vocab_size;
  TM_CHECK(count * spec_.vocab_size == static_cast<int64_t>(out.size()), "%zu logits of %d each",
           out.size(), spec_.vocab_size);
  const TensorView x = rows(*hidden_, num_tokens_, spec_.hidden_size).rows(first_row, count);
  backend_.logits({.head = head_.get(), .norm = &final_norm_, .x = x}, out);
}

void Decoder::hidden_states(int first_row, std::span<float> out) {
  const int64_t hidden = spec_.hidden_size;
  const auto count = static_cast<int64_t>(out.size()) / hidden;
  TM_CHECK(count * hidden == static_cast<int64_t>(out.size()), "%zu hidden states of %lld each",
           out.size(), static_cast<long long>(hidden));
  const TensorView x = rows(*hidden_, num_tokens_, hidden);
  // The layers are done with their scratch; x itself must stay for sample().
  const int64_t room =
      std::max<int64_t>(1, int64_t{max_tokens_} * spec_.intermediate_size / hidden);
  TM_CHECK(int64_t{max_tokens_} * spec_.intermediate_size >= hidden, "scratch of %d x %d",
           max_tokens_, spec_.intermediate_size);
  for (int64_t begin = 0; begin < count; begin += room) {
    const int64_t part = std::min(room, count - begin);
    const TensorView normed = rows(*mlp_, part, hidden);
    backend_.norm(final_norm_, x.rows(first_row + begin, part), normed);
    download_floats(normed, out.subspan(static_cast<size_t>(begin * hidden),
                                        static_cast<size_t>(part * hidden)));
  }
}

void Decoder::download_floats(ConstTensorView from, std::span<float> out) {
  if (from.dtype == DType::f32) return backend_.download(out.data(), from);
  std::vector<uint16_t> halves(out.size());
  backend_.download(halves.data(), from);
  const bool bf16 = from.dtype == DType::bf16;
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = bf16 ? bf16_to_f32(halves[i]) : f16_to_f32(halves[i]);
  }
}

Backend::WorkspaceSpec merge(const Backend::WorkspaceSpec& a, const Backend::WorkspaceSpec& b) {
  Backend::WorkspaceSpec both;
  both.max_tokens = std::max(a.max_tokens, b.max_tokens);
  both.max_sequences = std::max(a.max_sequences, b.max_sequences);
  both.max_rows = std::max(a.max_rows, b.max_rows);
  both.max_in_features = std::max(a.max_in_features, b.max_in_features);
  both.max_out_features = std::max(a.max_out_features, b.max_out_features);
  both.vocab_size = std::max(a.vocab_size, b.vocab_size);
  both.max_kv_len = std::max(a.max_kv_len, b.max_kv_len);
  both.max_heads = std::max(a.max_heads, b.max_heads);
  both.max_head_dim = std::max(a.max_head_dim, b.max_head_dim);
  both.hidden_size = std::max(a.hidden_size, b.hidden_size);
  both.vision_tile_tokens = std::max(a.vision_tile_tokens, b.vision_tile_tokens);
  both.vision_head_dim = std::max(a.vision_head_dim, b.vision_head_dim);
  both.vision_pixel_bytes = std::max(a.vision_pixel_bytes, b.vision_pixel_bytes);
  both.kv_bits = std::min(a.kv_bits, b.kv_bits);
  both.kv_block_size = std::max(a.kv_block_size, b.kv_block_size);
  return both;
}

}  // namespace turbomind
