// `NativeEngine`: the JavaScript face of an EngineSession. JS thread only; collecting it closes the
// engine in the background.
#pragma once

#include <memory>

#include "addon/napi_support.h"

namespace turbomind::addon {

class EngineSession;

class EngineWrap : public Napi::ObjectWrap<EngineWrap> {
 public:
  static Napi::Function define(Napi::Env env);
  static Napi::Object create(Napi::Env env, std::shared_ptr<EngineSession> session);

  explicit EngineWrap(const Napi::CallbackInfo& info);
  void Finalize(Napi::Env env) override;

 private:
  Napi::Value submit(const Napi::CallbackInfo& info);
  Napi::Value abort(const Napi::CallbackInfo& info);
  Napi::Value set_mask(const Napi::CallbackInfo& info);
  Napi::Value set_logits(const Napi::CallbackInfo& info);
  Napi::Value stats(const Napi::CallbackInfo& info);
  Napi::Value memory(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  Napi::Value prompt_logits(const Napi::CallbackInfo& info);

  std::shared_ptr<EngineSession> session_;
};

}  // namespace turbomind::addon
