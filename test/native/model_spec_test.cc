// Every rule of validate(): a good spec passes, and each single change that breaks it is refused.
#include "models/model_spec.h"

#include <cmath>
#include <functional>
#include <limits>

#include "test.h"

using namespace turbomind;

namespace {

ModelSpec good() {
  ModelSpec spec;
  spec.decoder = {.hidden_size = 896,
                  .num_layers = 24,
                  .num_heads = 14,
                  .num_kv_heads = 2,
                  .head_dim = 64,
                  .intermediate_size = 4864,
                  .vocab_size = 151674,
                  .max_position_embeddings = 32768,
                  .norm_eps = 1e-6F,
                  .rope_theta = 1e6F,
                  .qkv_bias = true};
  spec.vision.emplace();
  spec.vision->image_size = 448;
  spec.vision->patch_size = 14;
  spec.vision->hidden_size = 1024;
  spec.vision->num_layers = 24;
  spec.vision->num_heads = 16;
  spec.vision->intermediate_size = 4096;
  spec.quant = {QuantMethod::awq, 128};
  spec.image_token_id = 151667;
  return spec;
}

struct Change {
  const char* what;
  ErrorCode code;
  std::function<void(ModelSpec&)> apply;
};

std::string message_of(const ModelSpec& spec, ErrorCode wanted) {
  try {
    validate(spec);
  } catch (const Error& error) {
    return error.code() == wanted ? error.what() : std::string("other code: ") + error.what();
  }
  return "accepted";
}

const float kNan = std::numeric_limits<float>::quiet_NaN();
const float kInfinity = std::numeric_limits<float>::infinity();
const ErrorCode kInvalid = ErrorCode::invalid_config;

const std::vector<Change> kChanges = {
    {"hidden_size", kInvalid, [](ModelSpec& s) { s.decoder.hidden_size = 0; }},
    {"hidden_size", kInvalid,
     [](ModelSpec& s) { s.decoder.hidden_size = std::numeric_limits<int>::max(); }},
    {"num_hidden_layers", kInvalid, [](ModelSpec& s) { s.decoder.num_layers = -1; }},
    {"num_hidden_layers", kInvalid, [](ModelSpec& s) { s.decoder.num_layers = 1000000; }},
    {"num_attention_heads", kInvalid, [](ModelSpec& s) { s.decoder.num_heads = 0; }},
    {"num_key_value_heads", kInvalid, [](ModelSpec& s) { s.decoder.num_kv_heads = 0; }},
    {"num_key_value_heads 4", kInvalid, [](ModelSpec& s) { s.decoder.num_kv_heads = 4; }},
    {"num_key_value_heads 28", kInvalid, [](ModelSpec& s) { s.decoder.num_kv_heads = 28; }},
    {"intermediate_size", kInvalid, [](ModelSpec& s) { s.decoder.intermediate_size = -4864; }},
    {"vocab_size", kInvalid, [](ModelSpec& s) { s.decoder.vocab_size = 2000000000; }},
    {"max_position_embeddings", kInvalid,
     [](ModelSpec& s) { s.decoder.max_position_embeddings = 0; }},
    {"head_dim is -64", kInvalid, [](ModelSpec& s) { s.decoder.head_dim = -64; }},
    {"head_dim is 65", ErrorCode::unsupported_model, [](ModelSpec& s) { s.decoder.head_dim = 65; }},
    {"head_dim is 72", ErrorCode::unsupported_model, [](ModelSpec& s) { s.decoder.head_dim = 72; }},
    {"head_dim is 512", ErrorCode::unsupported_model,
     [](ModelSpec& s) { s.decoder.head_dim = 512; }},
    {"rms_norm_eps", kInvalid, [](ModelSpec& s) { s.decoder.norm_eps = 0; }},
    {"rms_norm_eps", kInvalid, [](ModelSpec& s) { s.decoder.norm_eps = kNan; }},
    {"rope_theta", kInvalid, [](ModelSpec& s) { s.decoder.rope_theta = -1; }},
    {"rope_theta", kInvalid, [](ModelSpec& s) { s.decoder.rope_theta = kInfinity; }},
    {"image_size", kInvalid, [](ModelSpec& s) { s.vision->image_size = 450; }},
    {"image_size", kInvalid, [](ModelSpec& s) { s.vision->image_size = 1 << 30; }},
    {"patch_size", kInvalid, [](ModelSpec& s) { s.vision->patch_size = 0; }},
    {"patch_size", kInvalid, [](ModelSpec& s) { s.vision->patch_size = 896; }},
    {"patches", kInvalid, [](ModelSpec& s) { s.vision->patch_size = 1; }},
    {"pixel shuffle factor", kInvalid, [](ModelSpec& s) { s.vision->shuffle_factor = 3; }},
    {"pixel shuffle factor", kInvalid, [](ModelSpec& s) { s.vision->shuffle_factor = 0; }},
    {"vision hidden_size", kInvalid, [](ModelSpec& s) { s.vision->hidden_size = 0; }},
    {"vision hidden_size", kInvalid, [](ModelSpec& s) { s.vision->num_heads = 15; }},
    {"vision head size", ErrorCode::unsupported_model,
     [](ModelSpec& s) { s.vision->num_heads = 128; }},
    {"vision num_hidden_layers", kInvalid, [](ModelSpec& s) { s.vision->num_layers = 0; }},
    {"vision intermediate_size", kInvalid, [](ModelSpec& s) { s.vision->intermediate_size = 0; }},
    {"layer_norm_eps", kInvalid, [](ModelSpec& s) { s.vision->norm_eps = -1e-6F; }},
    {"projector", kInvalid, [](ModelSpec& s) { s.vision->projector_norm_eps = kNan; }},
    {"image_std", kInvalid, [](ModelSpec& s) { s.vision->std[1] = 0; }},
    {"image_mean", kInvalid, [](ModelSpec& s) { s.vision->mean[2] = kInfinity; }},
    {"group_size is 48", ErrorCode::unsupported_quantization,
     [](ModelSpec& s) { s.quant.group_size = 48; }},
    {"group_size is -1", ErrorCode::unsupported_quantization,
     [](ModelSpec& s) { s.quant.group_size = -1; }},
    {"group_size is 128", kInvalid, [](ModelSpec& s) { s.quant.method = QuantMethod::none; }},
    {"image_token_id", kInvalid, [](ModelSpec& s) { s.image_token_id = 151674; }},
    {"image_token_id", kInvalid, [](ModelSpec& s) { s.image_token_id = -1; }},
    {"image_token_id", kInvalid, [](ModelSpec& s) { s.vision.reset(); }},
};

}  // namespace

TEST("published shapes are accepted") {
  validate(good());
  ModelSpec text = good();
  text.vision.reset();
  text.image_token_id = -1;
  text.quant = {};
  validate(text);
  ModelSpec big = good();  // InternVL3-78B: InternViT-6B beside Qwen2.5-72B
  big.decoder.hidden_size = 8192;
  big.decoder.num_layers = 80;
  big.decoder.num_heads = 64;
  big.decoder.num_kv_heads = 8;
  big.decoder.head_dim = 128;
  big.decoder.intermediate_size = 29568;
  big.vision->hidden_size = 3200;
  big.vision->num_heads = 25;
  big.vision->num_layers = 45;
  big.vision->intermediate_size = 12800;
  validate(big);
}

TEST("each contradiction or absurd value is refused with its field and the right code") {
  for (const Change& change : kChanges) {
    ModelSpec spec = good();
    change.apply(spec);
    const std::string message = message_of(spec, change.code);
    const bool named = message.find(change.what) != std::string::npos;
    if (!named) std::printf("    wanted '%s', got: %s\n", change.what, message.c_str());
    EXPECT(named && message.find("other code") == std::string::npos);
  }
}

TEST_MAIN()
