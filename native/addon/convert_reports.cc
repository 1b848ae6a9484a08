// What stats and memory answer. JS thread only.
#include "addon/convert.h"
#include "addon/js_object.h"

namespace turbomind::addon {
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
