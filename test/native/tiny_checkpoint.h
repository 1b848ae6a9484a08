// A small vision-language model with random weights in a temporary file, as a spec and a tensor
// table: enough to run every op of the runtime end to end in a few milliseconds.
#pragma once

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "models/model_spec.h"
#include "temporary_folder.h"

namespace turbomind::test {

class TinyCheckpoint {
 public:
  explicit TinyCheckpoint(QuantMethod method, uint32_t seed = 1) : random_(seed) {
    spec.decoder = {.hidden_size = 128,
                    .num_layers = 2,
                    .num_heads = 2,
                    .num_kv_heads = 1,
                    .head_dim = 64,
                    .intermediate_size = 256,
                    .vocab_size = 192,
                    .max_position_embeddings = 512,
                    .norm_eps = 1e-6F,
                    .rope_theta = 10000.0F,
                    .qkv_bias = true,
                    .qk_norm = false,
                    .tied_embeddings = true};
    VisionSpec vision;
    vision.image_size = 56;
    vision.patch_size = 14;
    vision.hidden_size = 64;
    vision.num_layers = 1;
    vision.num_heads = 1;
    vision.intermediate_size = 128;
    spec.vision = vision;
    spec.image_token_id = 191;
    if (method == QuantMethod::awq) spec.quant = {QuantMethod::awq, 64};
    add_decoder();
    add_vision();
    write();
  }
  TinyCheckpoint(const TinyCheckpoint&) = delete;
  TinyCheckpoint& operator=(const TinyCheckpoint&) = delete;

  ModelSpec spec;
  CheckpointFiles files;

 private:
  static uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
  float normal(float deviation) {
    return std::normal_distribution<float>(0.0F, deviation)(random_);
  }

  void add(const std::string& name, DType dtype, std::vector<int64_t> shape, const void* data,
           size_t bytes) {
    data_.resize(round_up(data_.size(), size_t{64}));
    files.tensors.push_back({name, dtype, std::move(shape), 0, data_.size(), bytes});
    const auto* begin = static_cast<const char*>(data);
    data_.insert(data_.end(), begin, begin + bytes);
  }
  void add_floats(const std::string& name, std::vector<int64_t> shape, float mean,
                  float deviation) {
    int64_t count = 1;
    for (int64_t dim : shape) count *= dim;
    std::vector<uint16_t> values(static_cast<size_t>(count));
    for (uint16_t& value : values) value = to_bf16(mean + normal(deviation));
    add(name, DType::bf16, std::move(shape), values.data(), values.size() * 2);
  }
  void add_dense(const std::string& prefix, int64_t n, int64_t k, bool bias) {
    add_floats(prefix + ".weight", {n, k}, 0.0F, 0.09F);
    if (bias) add_floats(prefix + ".bias", {n}, 0.0F, 0.1F);
  }
  void add_linear(const std::string& prefix, int64_t n, int64_t k, bool bias) {
    if (spec.quant.method == QuantMethod::none) return add_dense(prefix, n, k, bias);
    const int64_t groups = k / spec.quant.group_size;
    std::vector<uint32_t> words(static_cast<size_t>(k * n / 8));
    for (uint32_t& word : words) word = static_cast<uint32_t>(random_());
    add(prefix + ".qweight", DType::i32, {k, n / 8}, words.data(), words.size() * 4);
    words.assign(static_cast<size_t>(groups * n / 8), 0x77887788U);
    add(prefix + ".qzeros", DType::i32, {groups, n / 8}, words.data(), words.size() * 4);
    add_floats(prefix + ".scales", {groups, n}, 0.02F, 0.002F);
    if (bias) add_floats(prefix + ".bias", {n}, 0.0F, 0.1F);
  }
  void add_norm(const std::string& prefix, int64_t size, bool bias) {
    add_floats(prefix + ".weight", {size}, 1.0F, 0.1F);
    if (bias) add_floats(prefix + ".bias", {size}, 0.0F, 0.1F);
  }

  void add_decoder() {
    const DecoderSpec& d = spec.decoder;
    add_floats("embed_tokens.weight", {d.vocab_size, d.hidden_size}, 0.0F, 0.3F);
    add_norm("norm", d.hidden_size, false);
    for (int i = 0; i < d.num_layers; ++i) {
      const std::string layer = "layers." + std::to_string(i) + ".";
      add_norm(layer + "input_norm", d.hidden_size, false);
      add_norm(layer + "post_attention_norm", d.hidden_size, false);
      add_linear(layer + "attn.q", d.num_heads * d.head_dim, d.hidden_size, true);
      add_linear(layer + "attn.k", d.num_kv_heads * d.head_dim, d.hidden_size, true);
      add_linear(layer + "attn.v", d.num_kv_heads * d.head_dim, d.hidden_size, true);
      add_linear(layer + "attn.o", d.hidden_size, d.num_heads * d.head_dim, false);
      add_linear(layer + "mlp.gate", d.intermediate_size, d.hidden_size, false);
      add_linear(layer + "mlp.up", d.intermediate_size, d.hidden_size, false);
      add_linear(layer + "mlp.down", d.hidden_size, d.intermediate_size, false);
    }
  }
  void add_vision() {
    const VisionSpec& v = *spec.vision;
    const int64_t c = v.hidden_size;
    add_floats("vision.cls", {1, 1, c}, 0.0F, 0.3F);
    add_floats("vision.positions", {1, v.patches() + 1, c}, 0.0F, 0.3F);
    add_floats("vision.patch.weight", {c, 3, v.patch_size, v.patch_size}, 0.0F, 0.05F);
    add_floats("vision.patch.bias", {c}, 0.0F, 0.1F);
    for (int i = 0; i < v.num_layers; ++i) {
      const std::string layer = "vision.layers." + std::to_string(i) + ".";
      add_norm(layer + "norm1", c, true);
      add_norm(layer + "norm2", c, true);
      for (const char* name : {"attn.q", "attn.k", "attn.v", "attn.proj"}) {
        add_dense(layer + name, c, c, true);
      }
      add_dense(layer + "mlp.fc1", v.intermediate_size, c, true);
      add_dense(layer + "mlp.fc2", c, v.intermediate_size, true);
      add_floats(layer + "scale1", {c}, 0.5F, 0.1F);
      add_floats(layer + "scale2", {c}, 0.5F, 0.1F);
    }
    const int64_t shuffled = c * v.shuffle_factor * v.shuffle_factor;
    add_norm("projector.norm", shuffled, true);
    add_dense("projector.fc1", spec.decoder.hidden_size, shuffled, true);
    add_dense("projector.fc2", spec.decoder.hidden_size, spec.decoder.hidden_size, true);
  }
  void write() {
    files.paths = {folder_.write("model.safetensors", data_)};
    data_ = {};
  }

  TemporaryFolder folder_;
  std::mt19937 random_;
  std::vector<char> data_;
};

}  // namespace turbomind::test
