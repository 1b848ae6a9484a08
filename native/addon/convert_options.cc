// What open, estimate, makeTiles and hashBytes take. JS thread only.
#include "addon/convert.h"

namespace turbomind::addon {
namespace {

DType to_dtype(const Field& field) {
  const std::string name = field.string();
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16, DType::i32}) {
    if (name == to_string(dtype)) return dtype;
  }
  field.fail("'f32', 'f16', 'bf16' or 'i32'");
}

DecoderSpec to_decoder(const Field& f) {
  DecoderSpec spec;
  spec.hidden_size = f["hiddenSize"].int32();
  spec.num_layers = f["numLayers"].int32();
  spec.num_heads = f["numHeads"].int32();
  spec.num_kv_heads = f["numKvHeads"].int32();
  spec.head_dim = f["headDim"].int32();
  spec.intermediate_size = f["intermediateSize"].int32();
  spec.vocab_size = f["vocabSize"].int32();
  spec.max_position_embeddings = f["maxPositionEmbeddings"].int32();
  spec.norm_eps = static_cast<float>(f["normEps"].number());
  spec.rope_theta = static_cast<float>(f["ropeTheta"].number());
  spec.qkv_bias = f["qkvBias"].boolean();
  spec.qk_norm = f["qkNorm"].boolean();
  spec.tied_embeddings = f["tiedEmbeddings"].boolean();
  return spec;
}

void to_channels(const Field& field, float (&channels)[3]) {
  if (field.length() != 3) field.fail("three numbers");
  for (uint32_t i = 0; i < 3; ++i) channels[i] = static_cast<float>(field.at(i).number());
}

VisionSpec to_vision(const Field& f) {
  VisionSpec spec;
  spec.image_size = f["imageSize"].int32();
  spec.patch_size = f["patchSize"].int32();
  spec.hidden_size = f["hiddenSize"].int32();
  spec.num_layers = f["numLayers"].int32();
  spec.num_heads = f["numHeads"].int32();
  spec.intermediate_size = f["intermediateSize"].int32();
  spec.norm_eps = static_cast<float>(f["normEps"].number());
  spec.rms_norm = f["rmsNorm"].boolean();
  spec.qkv_bias = f["qkvBias"].boolean();
  spec.qk_norm = f["qkNorm"].boolean();
  spec.shuffle_factor = f["shuffleFactor"].int32();
  spec.projector_norm_eps = static_cast<float>(f["projectorNormEps"].number());
  to_channels(f["mean"], spec.mean);
  to_channels(f["std"], spec.std);
  return spec;
}

QuantSpec to_quant(const Field& f) {
  const std::string method = f["method"].string();
  if (method != "none" && method != "awq") f["method"].fail("'none' or 'awq'");
  return {method == "awq" ? QuantMethod::awq : QuantMethod::none, f["groupSize"].int32()};
}

ModelSpec to_spec(const Field& f) {
  ModelSpec spec;
  spec.decoder = to_decoder(f["decoder"]);
  if (const std::optional<Field> vision = f.optional("vision")) spec.vision = to_vision(*vision);
  spec.quant = to_quant(f["quant"]);
  spec.image_token_id = f["imageTokenId"].int32();
  return spec;
}

TensorEntry to_tensor(const Field& f, size_t num_files) {
  TensorEntry tensor;
  tensor.name = f["name"].string();
  tensor.dtype = to_dtype(f["dtype"]);
  const Field shape = f["shape"];
  for (uint32_t i = 0; i < shape.length(); ++i) {
    tensor.shape.push_back(shape.at(i).integer(0, kMaxSafeInteger));
  }
  tensor.file_idx = static_cast<int>(f["file"].integer(0, static_cast<int64_t>(num_files) - 1));
  tensor.offset = static_cast<uint64_t>(f["offset"].integer(0, kMaxSafeInteger));
  tensor.bytes = static_cast<uint64_t>(f["bytes"].integer(0, kMaxSafeInteger));
  return tensor;
}

std::optional<DType> to_activation_dtype(const Field& f) {
  const std::string name = f.string();
  if (name == "auto") return std::nullopt;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  f.fail("'auto', 'float16' or 'bfloat16'");
}

}  // namespace

EngineOptions to_engine_options(const Field& f) {
  EngineOptions options;
  options.spec = to_spec(f["spec"]);
  const Field files = f["files"];
  for (uint32_t i = 0; i < files.length(); ++i) options.files.paths.push_back(files.at(i).string());
  const Field tensors = f["tensors"];
  options.files.tensors.reserve(tensors.length());
  for (uint32_t i = 0; i < tensors.length(); ++i) {
    const Napi::HandleScope scope(f.value().Env());  // a checkpoint has thousands of tensors
    options.files.tensors.push_back(to_tensor(tensors.at(i), options.files.paths.size()));
  }
  options.backend.device = f["device"].string();
  options.backend.threads = f["threads"].int32(0);
  options.backend.cuda_library = f["cudaLibrary"].string();
  options.backend.cpu_isa = f["cpuIsa"].string();
  options.dtype = to_activation_dtype(f["dtype"]);
  options.session_len = f["sessionLen"].int32(0);
  options.max_batch_size = f["maxBatchSize"].int32(1);
  options.max_prefill_token_num = f["maxPrefillTokenNum"].int32(1);
  options.block_size = f["blockSize"].int32(1);
  options.max_drafts = f["numSpeculativeTokens"].int32(0);
  const double share = f["cacheMaxEntryCount"].number();
  options.cache.automatic = share == 0.0;
  if (!options.cache.automatic) options.cache.share = share;
  options.cache.kv_bytes = static_cast<size_t>(f["kvCacheBytes"].integer(0, kMaxSafeInteger));
  options.cache.total_bytes =
      static_cast<size_t>(f["memoryBudgetBytes"].integer(0, kMaxSafeInteger));
  options.cache.free_bytes = static_cast<size_t>(f["freeBytes"].integer(0, kMaxSafeInteger));
  const int64_t swap_bytes = f["swapSpaceBytes"].integer(-1, kMaxSafeInteger);
  if (swap_bytes >= 0) options.cache.swap_bytes = static_cast<size_t>(swap_bytes);
  options.enable_prefix_caching = f["enablePrefixCaching"].boolean();
  options.max_queue_size = f["maxQueueSize"].int32(0);
  options.max_inter_token_ms = f["maxInterTokenLatencyMs"].number();
  const int quant_policy = f["quantPolicy"].int32(0);
  options.kv_bits = quant_policy == 0 ? 16 : quant_policy;
  return options;
}

image::TileOptions to_tile_options(const Field& f) {
  image::TileOptions options;
  options.tile_size = f["tileSize"].int32();
  options.min_tiles = f["minTiles"].int32();
  options.max_tiles = f["maxTiles"].int32();
  options.use_thumbnail = f["useThumbnail"].boolean();
  return options;
}

image::ContentHash to_content_hash(const Field& f) {
  const std::string digits = f.string();
  if (digits.empty()) return {};
  const bool is_hex = digits.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (digits.size() != 32 || !is_hex) f.fail("'' or 32 hex digits");
  return {{std::stoull(digits.substr(0, 16), nullptr, 16),
           std::stoull(digits.substr(16), nullptr, 16)}};
}

std::string to_hex(const image::ContentHash& hash) {
  return format("%016llx%016llx", static_cast<unsigned long long>(hash.words[0]),
                static_cast<unsigned long long>(hash.words[1]));
}

}  // namespace turbomind::addon
