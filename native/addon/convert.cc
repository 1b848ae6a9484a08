#include "addon/convert.h"

#include <cmath>
#include <utility>

#include "addon/js_object.h"
#include "addon/tiles_wrap.h"

namespace turbomind::addon {
namespace {

constexpr int64_t kMaxSafeInteger = (1LL << 53) - 1;

// What a person passed, short enough for a message.
std::string describe(const Napi::Value& value) {
  switch (value.Type()) {
    case napi_undefined:
      return "undefined";
    case napi_null:
      return "null";
    case napi_boolean:
      return value.As<Napi::Boolean>() ? "true" : "false";
    case napi_number:
      return format("%.17g", value.As<Napi::Number>().DoubleValue());
    case napi_string: {
      const std::string text = value.As<Napi::String>();
      return text.size() <= 40 ? "'" + text + "'" : "'" + text.substr(0, 40) + "…'";
    }
    case napi_bigint:
      return "a bigint";
    case napi_symbol:
      return "a symbol";
    case napi_function:
      return "a function";
    default:
      break;
  }
  if (value.IsArray()) return "an array";
  if (value.IsTypedArray()) return "another typed array";
  return "an object";
}

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

std::vector<TokenId> to_tokens(const Field& array) {
  std::vector<TokenId> tokens(array.length());
  for (uint32_t i = 0; i < tokens.size(); ++i) tokens[i] = array.at(i).int32();
  return tokens;
}

std::vector<TokenId> to_prompt(const Field& field) {
  if (!field.value().IsTypedArray() ||
      field.value().As<Napi::TypedArray>().TypedArrayType() != napi_int32_array) {
    field.fail("an Int32Array");
  }
  const Napi::Int32Array array = field.value().As<Napi::Int32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

SamplingParams to_sampling(const Field& f) {
  SamplingParams params;
  params.do_sample = f["doSample"].boolean();
  params.temperature = static_cast<float>(f["temperature"].number());
  params.top_k = f["topK"].int32();
  params.top_p = static_cast<float>(f["topP"].number());
  params.min_p = static_cast<float>(f["minP"].number());
  params.repetition_penalty = static_cast<float>(f["repetitionPenalty"].number());
  params.frequency_penalty = static_cast<float>(f["frequencyPenalty"].number());
  params.presence_penalty = static_cast<float>(f["presencePenalty"].number());
  const Field bias = f["logitBias"];
  for (uint32_t i = 0; i < bias.length(); ++i) {
    const Field pair = bias.at(i);
    if (pair.length() != 2) pair.fail("[token, bias]");
    params.logit_bias.emplace_back(pair.at(0).int32(), static_cast<float>(pair.at(1).number()));
  }
  params.seed = f["seed"].unsigned_bigint();
  params.num_logprobs = f["numLogprobs"].int32();
  const Field bad_words = f["badWords"];
  for (uint32_t i = 0; i < bad_words.length(); ++i) {
    params.bad_words.push_back(to_tokens(bad_words.at(i)));
  }
  return params;
}

ImageInput to_image(const Field& f) {
  ImageInput image;
  image.tiles = TilesWrap::unwrap(f["tiles"].value());
  if (image.tiles == nullptr) f["tiles"].fail("what makeTiles() resolved to");
  image.token_offset = f["tokenOffset"].int32();
  image.num_tokens = f["numTokens"].int32();
  return image;
}

OutputRange to_range(const Field& f) {
  const std::string name = f.string();
  if (name == "none") return OutputRange::none;
  if (name == "generation") return OutputRange::generation;
  if (name != "all") f.fail("'none', 'generation' or 'all'");
  return OutputRange::all;
}

OutputSpec to_outputs(const Field& f) {
  OutputSpec spec;
  spec.logits = to_range(f["logits"]);
  spec.hidden_states = to_range(f["hiddenStates"]);
  const std::string pooling = f["pooling"].string();
  if (pooling == "last") spec.pooling = Pooling::last;
  if (pooling == "mean") spec.pooling = Pooling::mean;
  if (pooling != "none" && spec.pooling == Pooling::none) {
    f["pooling"].fail("'none', 'last' or 'mean'");
  }
  spec.prompt_nll = f["promptNll"].boolean();
  return spec;
}

// The owner lives until JavaScript has let go of the array.
template <class Owner>
JsValue float_array(napi_env env, const std::shared_ptr<const Owner>& owner,
                    const std::vector<float>& values) {
  napi_value buffer = nullptr;
  const size_t bytes = values.size() * sizeof(float);
  auto* keep = new std::shared_ptr<const Owner>(owner);
  const napi_status status = napi_create_external_arraybuffer(
      env, const_cast<float*>(values.data()), bytes,
      [](napi_env, void*, void* kept) { delete static_cast<std::shared_ptr<const Owner>*>(kept); },
      keep, &buffer);
  if (status != napi_ok) {  // Electron forbids memory that is not V8's
    delete keep;
    void* data = nullptr;
    if (napi_create_arraybuffer(env, bytes, &data, &buffer) != napi_ok) return JsValue(nullptr);
    std::copy(values.begin(), values.end(), static_cast<float*>(data));
  }
  napi_value array = nullptr;
  napi_create_typedarray(env, napi_float32_array, values.size(), buffer, 0, &array);
  return JsValue(array);
}

JsValue to_js(napi_env env, const std::shared_ptr<const RequestOutputs>& outputs) {
  JsObject object(env);
  if (!outputs->logits.empty()) object.set("logits", float_array(env, outputs, outputs->logits));
  if (!outputs->hidden_states.empty()) {
    object.set("hiddenStates", float_array(env, outputs, outputs->hidden_states));
  }
  JsArray pooled(env);
  for (double value : outputs->pooled) pooled.push(value);
  object.set("pooled", pooled.value());
  object.set("nll", outputs->nll);
  object.set("numNllTokens", outputs->num_nll_tokens);
  return object.value();
}

JsValue to_js(napi_env env, const TokenEvent& token) {
  JsObject object(env);
  object.set("token", token.token);
  if (!token.top_logprobs.empty()) {
    object.set("logprob", static_cast<double>(token.logprob));
    JsArray best(env);
    for (const auto& [id, logprob] : token.top_logprobs) {
      JsArray pair(env);
      pair.push(id);
      pair.push(static_cast<double>(logprob));
      best.push(pair.value());
    }
    object.set("topLogprobs", best.value());
  }
  return object.value();
}

JsValue to_js(napi_env env, const RequestTimings& timings) {
  JsObject object(env);
  object.set("queueMs", timings.queue_ms);
  object.set("visionMs", timings.vision_ms);
  object.set("prefillMs", timings.prefill_ms);
  object.set("firstTokenMs", timings.first_token_ms);
  object.set("decodeMs", timings.decode_ms);
  return object.value();
}

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::none:
      return "";
    case FinishReason::stop:
      return "stop";
    case FinishReason::length:
      return "length";
    case FinishReason::abort:
      return "abort";
    case FinishReason::error:
      return "error";
  }
  return "";
}

JsValue to_js(napi_env env, const Event& event) {
  JsObject object(env);
  object.set("id", static_cast<double>(event.id));
  JsArray tokens(env);
  for (const TokenEvent& token : event.tokens) tokens.push(to_js(env, token));
  object.set("tokens", tokens.value());
  if (event.offer) {
    object.set("completionIdx", static_cast<double>(event.offer->completion_idx));
    object.set("logits", float_array(env, event.offer, event.offer->logits));
  }
  if (event.finish_reason == FinishReason::none) return object.value();
  object.set("finishReason", to_string(event.finish_reason));
  if (event.matched_stop >= 0) object.set("matchedStop", event.matched_stop);
  object.set("timings", to_js(env, event.timings));
  object.set("numPreemptions", event.num_preemptions);
  object.set("cachedTokens", event.num_cached_tokens);
  if (event.outputs) object.set("outputs", to_js(env, event.outputs));
  if (event.finish_reason == FinishReason::error) {
    object.set("errorCode", turbomind::to_string(event.error_code));
    object.set("errorMessage", event.error_message);
  }
  return object.value();
}

}  // namespace

void Field::fail(const char* expected) const {
  throw Error(ErrorCode::invalid_argument,
              format("%s: expected %s, got %s", path_.c_str(), expected, describe(value_).c_str()));
}

Field Field::operator[](const char* key) const {
  if (!value_.IsObject() || value_.IsArray()) fail("an object");
  return {value_.As<Napi::Object>().Get(key), path_ + "." + key};
}

std::optional<Field> Field::optional(const char* key) const {
  Field field = (*this)[key];
  if (field.value().IsUndefined()) return std::nullopt;
  return field;
}

Field Field::at(uint32_t idx) const {
  return {value_.As<Napi::Array>().Get(idx), path_ + "[" + std::to_string(idx) + "]"};
}

uint32_t Field::length() const {
  if (!value_.IsArray()) fail("an array");
  return value_.As<Napi::Array>().Length();
}

int64_t Field::integer(int64_t min, int64_t max) const {
  if (value_.IsNumber()) {
    const double number = value_.As<Napi::Number>().DoubleValue();
    if (number == std::trunc(number) && number >= static_cast<double>(min) &&
        number <= static_cast<double>(max)) {
      return static_cast<int64_t>(number);
    }
  }
  if (min == INT32_MIN && max == INT32_MAX) fail("an integer of 32 bits");
  fail(format("an integer from %lld to %lld", static_cast<long long>(min),
              static_cast<long long>(max))
           .c_str());
}

double Field::number() const {
  if (!value_.IsNumber()) fail("a number");
  const double number = value_.As<Napi::Number>().DoubleValue();
  if (!std::isfinite(number)) fail("a finite number");
  return number;
}

bool Field::boolean() const {
  if (!value_.IsBoolean()) fail("true or false");
  return value_.As<Napi::Boolean>();
}

std::string Field::string() const {
  if (!value_.IsString()) fail("a string");
  return value_.As<Napi::String>();
}

uint64_t Field::unsigned_bigint() const {
  const char* expected = "a bigint from 0n to 2n ** 64n - 1n";
  if (!value_.IsBigInt()) fail(expected);
  bool lossless = false;
  const uint64_t number = value_.As<Napi::BigInt>().Uint64Value(&lossless);
  if (!lossless) fail(expected);
  return number;
}

Napi::Uint8Array Field::bytes() const {
  if (!value_.IsTypedArray() ||
      value_.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    fail("a Uint8Array");
  }
  return value_.As<Napi::Uint8Array>();
}

std::vector<uint32_t> Field::words() const {
  if (!value_.IsTypedArray() ||
      value_.As<Napi::TypedArray>().TypedArrayType() != napi_uint32_array) {
    fail("a Uint32Array");
  }
  const Napi::Uint32Array array = value_.As<Napi::Uint32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

std::vector<float> Field::floats() const {
  if (!value_.IsTypedArray() ||
      value_.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array) {
    fail("a Float32Array");
  }
  const Napi::Float32Array array = value_.As<Napi::Float32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

Napi::Function Field::function() const {
  if (!value_.IsFunction()) fail("a function");
  return value_.As<Napi::Function>();
}

std::optional<DType> to_activation_dtype(const Field& f) {
  const std::string name = f.string();
  if (name == "auto") return std::nullopt;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  f.fail("'auto', 'float16' or 'bfloat16'");
}

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

Request to_request(const Field& f) {
  Request request;
  request.id = static_cast<RequestId>(f["id"].integer(0, kMaxSafeInteger));
  request.sampling = to_sampling(f["sampling"]);
  request.max_new_tokens = f["maxNewTokens"].int32();
  request.min_new_tokens = f["minNewTokens"].int32();
  if (const auto priority = f.optional("priority")) {
    request.priority = static_cast<int>(priority->integer(-100, 100));
  }
  if (const auto timeout = f.optional("queueTimeoutMs"))
    request.queue_timeout_ms = timeout->number();
  request.stop_token_ids = to_tokens(f["stopTokenIds"]);
  if (const auto guided = f.optional("guided")) request.guided = guided->boolean();
  if (const auto edits = f.optional("editsLogits")) request.edits_logits = edits->boolean();
  if (const auto outputs = f.optional("outputs")) request.outputs = to_outputs(*outputs);
  const Field images = f["images"];
  for (uint32_t i = 0; i < images.length(); ++i) request.images.push_back(to_image(images.at(i)));
  request.prompt_tokens = to_prompt(f["promptTokens"]);
  return request;
}

Napi::Value to_js(Napi::Env env, const std::vector<Event>& events) {
  JsArray array(env);
  for (const Event& event : events) {
    const Napi::HandleScope scope(env);
    array.push(to_js(static_cast<napi_env>(env), event));
  }
  return {env, array.value().get()};
}

namespace {

// In seconds, as metrics are.
JsValue to_js(napi_env env, const StepTimes& times) {
  JsArray bounds(env);
  for (double ms : StepTimes::kBoundsMs) bounds.push(ms / 1000);
  JsArray counts(env);
  for (uint64_t count : times.counts) counts.push(static_cast<double>(count));
  JsObject object(env);
  object.set("bounds", bounds.value());
  object.set("counts", counts.value());
  object.set("sum", times.sum_ms / 1000);
  return object.value();
}

}  // namespace

Napi::Value to_js(Napi::Env env, const EngineStats& stats) {
  JsObject object(env);
  object.set("running", stats.running);
  object.set("waiting", stats.waiting);
  object.set("totalBlocks", stats.total_blocks);
  object.set("freeBlocks", stats.free_blocks);
  object.set("cachedBlocks", stats.cached_blocks);
  object.set("prefixQueries", static_cast<double>(stats.prefix_queries));
  object.set("prefixHits", static_cast<double>(stats.prefix_hits));
  object.set("steps", static_cast<double>(stats.steps));
  object.set("preemptions", static_cast<double>(stats.preemptions));
  object.set("swapsOut", static_cast<double>(stats.swaps_out));
  object.set("swapsIn", static_cast<double>(stats.swaps_in));
  object.set("swapBlocks", stats.swap_blocks);
  object.set("freeSwapBlocks", stats.free_swap_blocks);
  object.set("stepTimes", to_js(static_cast<napi_env>(env), stats.step_times));
  object.set("promptTokens", static_cast<double>(stats.prompt_tokens));
  object.set("completionTokens", static_cast<double>(stats.completion_tokens));
  object.set("draftedTokens", static_cast<double>(stats.drafted_tokens));
  object.set("acceptedTokens", static_cast<double>(stats.accepted_tokens));
  object.set("weightBytes", static_cast<double>(stats.weight_bytes));
  object.set("kvCacheBytes", static_cast<double>(stats.kv_cache_bytes));
  object.set("workspaceBytes", static_cast<double>(stats.workspace_bytes));
  object.set("loadMs", stats.load_ms);
  object.set("sessionLen", stats.session_len);
  object.set("deviceName", stats.device_name);
  object.set("deviceDescription", stats.device_description);
  return {env, object.value().get()};
}

Napi::Value to_js(Napi::Env env, const MemoryReport& report) {
  JsObject object(env);
  const auto bytes = [&object](const char* name, size_t value) {
    object.set(name, static_cast<double>(value));
  };
  const MemoryParts& parts = report.plan.parts;
  object.set("device", report.device_name);
  bytes("freeBytes", report.plan.free_bytes);
  bytes("weightBytes", parts.weights);
  bytes("visionWeightBytes", parts.vision_weights);
  bytes("activationBytes", parts.activations);
  bytes("visionActivationBytes", parts.vision_activations);
  bytes("imageEmbeddingBytes", parts.image_embeddings);
  bytes("scratchBytes", parts.scratch);
  bytes("samplingBytes", parts.sampling);
  bytes("graphBytes", parts.graphs);
  bytes("reserveBytes", parts.reserve);
  bytes("kvCacheBytes", report.plan.kv_cache_bytes);
  bytes("totalBytes", parts.total() + report.plan.kv_cache_bytes);
  bytes("hostStagingBytes", parts.staging);
  bytes("kvBlockBytes", report.plan.block_bytes);
  object.set("kvBlocks", report.plan.num_blocks);
  object.set("kvBlockTokens", report.block_size);
  object.set("kvBits", report.kv_bits);
  bytes("hostSwapBytes", parts.swap);
  object.set("swapBlocks", report.plan.num_swap_blocks);
  bytes("allocatedBytes", report.use.allocated);
  bytes("deviceFreeBytes", report.use.device_free);
  JsObject use(env);
  use.set("decoderBytes", static_cast<double>(report.use.decoder));
  use.set("visionBytes", static_cast<double>(report.use.vision));
  use.set("workspaceBytes", static_cast<double>(report.use.workspace));
  use.set("kvCacheBytes", static_cast<double>(report.use.kv_cache));
  use.set("imageEmbeddingBytes", static_cast<double>(report.use.image_embeddings));
  use.set("hostSwapBytes", static_cast<double>(report.use.swap));
  object.set("use", use.value());
  return {env, object.value().get()};
}

}  // namespace turbomind::addon
