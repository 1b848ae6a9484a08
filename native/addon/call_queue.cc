#include "addon/call_queue.h"

namespace turbomind::addon {

CallQueue::CallQueue(Napi::Env env)
    : wakeup_(env, "turbomind.calls", [this](Napi::Env woken) { run_all(woken); }) {}

void CallQueue::post(Call call) {
  {
    const std::lock_guard lock(mutex_);
    // After stop the call is dropped by whoever posts; only pool and engine threads that hold no
    // JavaScript references can be that late.
    if (stopped_) return;
    calls_.push_back(std::move(call));
  }
  wakeup_.signal();
}

void CallQueue::begin() {
  if (num_operations_++ == 0) wakeup_.hold();
}

void CallQueue::finish(Call call) {
  post([this, call = std::move(call)](Napi::Env env) {
    if (--num_operations_ == 0) wakeup_.release();
    call(env);
  });
}

void CallQueue::run_all(Napi::Env env) {
  std::vector<Call> calls;
  {
    const std::lock_guard lock(mutex_);
    calls.swap(calls_);
  }
  for (const Call& call : calls) {
    const Napi::HandleScope scope(env);
    try {
      call(env);
    } catch (const Napi::Error& error) {
      napi_fatal_exception(env, error.Value());
    }
  }
}

void CallQueue::stop() {
  wakeup_.stop();
  std::vector<Call> dropped;
  const std::lock_guard lock(mutex_);
  stopped_ = true;
  dropped.swap(calls_);
}

void call_into_js(Napi::Env env, const Napi::FunctionReference& function, napi_value argument) {
  napi_value result = nullptr;
  const napi_status status =
      napi_call_function(env, env.Undefined(), function.Value(), 1, &argument, &result);
  if (status != napi_pending_exception) return;
  napi_value error = nullptr;
  if (napi_get_and_clear_last_exception(env, &error) == napi_ok) napi_fatal_exception(env, error);
}

}  // namespace turbomind::addon
