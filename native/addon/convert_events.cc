// What requests become: tokens, logits and ends. JS thread only.
#include <algorithm>
#include <memory>

#include "addon/convert.h"
#include "addon/js_object.h"

namespace turbomind::addon {
namespace {

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

Napi::Value to_js(Napi::Env env, const std::vector<Event>& events) {
  JsArray array(env);
  for (const Event& event : events) {
    const Napi::HandleScope scope(env);
    array.push(to_js(static_cast<napi_env>(env), event));
  }
  return {env, array.value().get()};
}

}  // namespace turbomind::addon
