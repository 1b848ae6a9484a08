// The rules a spec must keep. Each one states a requirement and names the field, the value and what
// was expected; the order is: sizes in range first, so that later arithmetic cannot overflow.
#include "models/model_spec.h"

#include <cmath>

#include "base/error.h"

namespace turbomind {
namespace {

// Beyond every published model by a factor of four or more: a larger number is a damaged config.
constexpr int kMaxLayers = 1024;
constexpr int kMaxHeads = 1024;
constexpr int kMaxHiddenSize = 1 << 17;
constexpr int kMaxIntermediateSize = 1 << 19;
constexpr int kMaxVocabSize = 1 << 22;
constexpr int kMaxPositions = 1 << 25;
constexpr int kMaxImageSize = 1 << 13;
constexpr int kMaxPatches = 1 << 14;
constexpr int kMaxShuffleFactor = 8;
// What the attention kernels cut a head into.
constexpr int kHeadDimMultiple = 16;
constexpr int kMaxHeadDim = 256;

[[noreturn]] void refuse(ErrorCode code, const std::string& message) { throw Error(code, message); }

void in_range(const char* field, int value, int low, int high) {
  if (value >= low && value <= high) return;
  refuse(ErrorCode::invalid_config, format("%s is %d; expected %d to %d", field, value, low, high));
}

void divides(const char* divisor_field, int divisor, const char* field, int value) {
  if (value % divisor == 0) return;
  refuse(ErrorCode::invalid_config,
         format("%s %d is not a multiple of %s %d", field, value, divisor_field, divisor));
}

void positive_and_finite(const char* field, float value, float limit) {
  if (std::isfinite(value) && value > 0.0F && value <= limit) return;
  refuse(ErrorCode::invalid_config,
         format("%s is %g; expected a number above 0 and at most %g", field,
                static_cast<double>(value), static_cast<double>(limit)));
}

void check_head_dim(const char* field, int head_dim) {
  if (head_dim >= kHeadDimMultiple && head_dim <= kMaxHeadDim && head_dim % kHeadDimMultiple == 0) {
    return;
  }
  refuse(ErrorCode::unsupported_model,
         format("%s is %d; supported are multiples of %d up to %d (64, 80, 96, 128, …)", field,
                head_dim, kHeadDimMultiple, kMaxHeadDim));
}

void check_decoder(const DecoderSpec& spec) {
  in_range("hidden_size", spec.hidden_size, 1, kMaxHiddenSize);
  in_range("num_hidden_layers", spec.num_layers, 1, kMaxLayers);
  in_range("num_attention_heads", spec.num_heads, 1, kMaxHeads);
  in_range("num_key_value_heads", spec.num_kv_heads, 1, kMaxHeads);
  in_range("intermediate_size", spec.intermediate_size, 1, kMaxIntermediateSize);
  in_range("vocab_size", spec.vocab_size, 1, kMaxVocabSize);
  in_range("max_position_embeddings", spec.max_position_embeddings, 1, kMaxPositions);
  if (spec.head_dim <= 0) {
    refuse(ErrorCode::invalid_config,
           format("head_dim is %d; expected a positive number", spec.head_dim));
  }
  check_head_dim("head_dim", spec.head_dim);
  divides("num_key_value_heads", spec.num_kv_heads, "num_attention_heads", spec.num_heads);
  positive_and_finite("rms_norm_eps", spec.norm_eps, 1.0F);
  positive_and_finite("rope_theta", spec.rope_theta, 1e15F);
}

void check_vision(const VisionSpec& spec) {
  in_range("vision image_size", spec.image_size, 1, kMaxImageSize);
  in_range("vision patch_size", spec.patch_size, 1, spec.image_size);
  divides("patch_size", spec.patch_size, "vision image_size", spec.image_size);
  in_range("patches of a tile", spec.patches(), 1, kMaxPatches);
  in_range("vision hidden_size", spec.hidden_size, 1, kMaxHiddenSize);
  in_range("vision num_hidden_layers", spec.num_layers, 1, kMaxLayers);
  in_range("vision num_attention_heads", spec.num_heads, 1, kMaxHeads);
  in_range("vision intermediate_size", spec.intermediate_size, 1, kMaxIntermediateSize);
  divides("num_attention_heads", spec.num_heads, "vision hidden_size", spec.hidden_size);
  check_head_dim("vision head size (hidden_size / num_attention_heads)",
                 spec.hidden_size / spec.num_heads);
  in_range("pixel shuffle factor (1 / downsample_ratio)", spec.shuffle_factor, 1,
           kMaxShuffleFactor);
  divides("pixel shuffle factor", spec.shuffle_factor, "the patch grid side", spec.grid());
  positive_and_finite("vision layer_norm_eps", spec.norm_eps, 1.0F);
  positive_and_finite("projector layer norm eps", spec.projector_norm_eps, 1.0F);
  for (int c = 0; c < 3; ++c) {
    positive_and_finite("image_std", spec.std[c], 1e6F);
    if (!std::isfinite(spec.mean[c])) {
      refuse(ErrorCode::invalid_config, format("image_mean[%d] is not a finite number", c));
    }
  }
}

// That groups divide a layer is checked layer by layer: some layers may not be quantised.
void check_quant(const QuantSpec& quant) {
  if (quant.method == QuantMethod::none) {
    if (quant.group_size == 0) return;
    refuse(ErrorCode::invalid_config,
           format("group_size is %d, but no quantization method is named", quant.group_size));
  }
  if (quant.group_size != 32 && quant.group_size != 64 && quant.group_size != 128) {
    refuse(ErrorCode::unsupported_quantization,
           format("awq: group_size is %d; expected 32, 64 or 128", quant.group_size));
  }
}

}  // namespace

void validate(const ModelSpec& spec) {
  check_decoder(spec.decoder);
  if (spec.vision) check_vision(*spec.vision);
  check_quant(spec.quant);
  if (spec.vision) {
    in_range("image_token_id", spec.image_token_id, 0, spec.decoder.vocab_size - 1);
  } else if (spec.image_token_id != -1) {
    refuse(ErrorCode::invalid_config,
           format("image_token_id is %d, but the model has no vision tower; expected -1",
                  spec.image_token_id));
  }
}

}  // namespace turbomind
