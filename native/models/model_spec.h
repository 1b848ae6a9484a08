// A model as data: everything lib/checkpoint/families/*.ts reads from config.json, already in our
// terms. `validate` refuses contradictions and absurd values before anything is allocated.
#pragma once

#include <cstdint>
#include <optional>

#include "base/types.h"
#include "io/checkpoint_files.h"

namespace turbomind {

enum class QuantMethod : uint8_t { none, awq };

struct QuantSpec {
  QuantMethod method = QuantMethod::none;
  int group_size = 0;  // 32, 64 or 128
};

struct DecoderSpec {
  int hidden_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int intermediate_size = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;
  float norm_eps = 1e-6F;
  float rope_theta = 10000.0F;
  bool qkv_bias = false;         // q, k, v have biases (Qwen2)
  bool qk_norm = false;          // RMSNorm per head before RoPE (Qwen3)
  bool tied_embeddings = false;  // the head is the embedding table
};

struct VisionSpec {
  int image_size = 0;  // S, side of a tile in pixels
  int patch_size = 0;
  int hidden_size = 0;  // C
  int num_layers = 0;   // layers to run (select_layer already applied)
  int num_heads = 0;
  int intermediate_size = 0;
  float norm_eps = 1e-6F;
  bool rms_norm = false;  // InternViT-6B; else LayerNorm
  bool qkv_bias = true;
  bool qk_norm = false;    // RMSNorm over the whole C
  int shuffle_factor = 2;  // 1 / downsample_ratio
  float projector_norm_eps = 1e-5F;
  float mean[3] = {0.485F, 0.456F, 0.406F};
  float std[3] = {0.229F, 0.224F, 0.225F};

  int grid() const { return image_size / patch_size; }
  int patches() const { return grid() * grid(); }
  int tokens_per_tile() const { return patches() / (shuffle_factor * shuffle_factor); }
};

struct ModelSpec {
  DecoderSpec decoder;
  std::optional<VisionSpec> vision;
  QuantSpec quant;
  TokenId image_token_id = -1;  // the prompt id that image embeddings replace
};

// Throws Error{invalid_config | unsupported_model | unsupported_quantization}.
void validate(const ModelSpec& spec);

}  // namespace turbomind
