#include "addon/engine_wrap.h"

#include "addon/convert.h"
#include "addon/engine_session.h"
#include "addon/environment.h"

namespace turbomind::addon {

Napi::Function EngineWrap::define(Napi::Env env) {
  return DefineClass(
      env, "NativeEngine",
      {InstanceMethod<&EngineWrap::submit>("submit"), InstanceMethod<&EngineWrap::abort>("abort"),
       InstanceMethod<&EngineWrap::set_mask>("setMask"),
       InstanceMethod<&EngineWrap::set_logits>("setLogits"),
       InstanceMethod<&EngineWrap::stats>("stats"), InstanceMethod<&EngineWrap::close>("close"),
       InstanceMethod<&EngineWrap::memory>("memory"),
       InstanceMethod<&EngineWrap::prompt_logits>("promptLogits")});
}

Napi::Object EngineWrap::create(Napi::Env env, std::shared_ptr<EngineSession> session) {
  Environment& environment = Environment::of(env);
  environment.new_session = std::move(session);
  return environment.engine_class.New({});
}

EngineWrap::EngineWrap(const Napi::CallbackInfo& info) : ObjectWrap(info) {
  // `create` leaves the session for us; anybody else has got hold of the class through an instance.
  session_ = std::exchange(Environment::of(info.Env()).new_session, nullptr);
  if (session_ == nullptr) {
    throw js_error(info.Env(), ErrorCode::invalid_argument,
                   "NativeEngine cannot be constructed; use open()");
  }
  session_->set_wrapper(this);
}

void EngineWrap::Finalize(Napi::Env /*env*/) {
  if (session_ != nullptr) session_->on_wrapper_collected();
}

Napi::Value EngineWrap::submit(const Napi::CallbackInfo& info) {
  return guard(info.Env(), [&] {
    session_->submit(to_request(Field(info[0], "submit: request")));
    return info.Env().Undefined();
  });
}

Napi::Value EngineWrap::abort(const Napi::CallbackInfo& info) {
  return guard(info.Env(), [&] {
    const int64_t id = Field(info[0], "abort: id").integer(0, (1LL << 53) - 1);
    session_->abort(static_cast<RequestId>(id));
    return info.Env().Undefined();
  });
}

Napi::Value EngineWrap::set_mask(const Napi::CallbackInfo& info) {
  return guard(info.Env(), [&] {
    const int64_t id = Field(info[0], "setMask: id").integer(0, (1LL << 53) - 1);
    const int idx = Field(info[1], "setMask: completionIdx").int32(0);
    TokenMask mask;
    if (!info[2].IsNull()) mask = Field(info[2], "setMask: mask").words();
    session_->set_mask(static_cast<RequestId>(id), static_cast<uint32_t>(idx), std::move(mask));
    return info.Env().Undefined();
  });
}

Napi::Value EngineWrap::set_logits(const Napi::CallbackInfo& info) {
  return guard(info.Env(), [&] {
    const int64_t id = Field(info[0], "setLogits: id").integer(0, (1LL << 53) - 1);
    const int idx = Field(info[1], "setLogits: completionIdx").int32(0);
    session_->set_logits(static_cast<RequestId>(id), static_cast<uint32_t>(idx),
                         Field(info[2], "setLogits: logits").floats());
    return info.Env().Undefined();
  });
}

Napi::Value EngineWrap::stats(const Napi::CallbackInfo& info) {
  return guard(info.Env(), [&] { return to_js(info.Env(), session_->stats()); });
}

Napi::Value EngineWrap::memory(const Napi::CallbackInfo& info) {
  return guard(info.Env(), [&] { return to_js(info.Env(), session_->stats().memory); });
}

Napi::Value EngineWrap::close(const Napi::CallbackInfo& info) {
  return guard_promise(info.Env(),
                       [&](const Napi::Promise::Deferred& deferred) { session_->close(deferred); });
}

Napi::Value EngineWrap::prompt_logits(const Napi::CallbackInfo& info) {
  return guard_promise(info.Env(), [&](const Napi::Promise::Deferred& deferred) {
    session_->prompt_logits(to_request(Field(info[0], "promptLogits: request")), deferred);
  });
}

}  // namespace turbomind::addon
