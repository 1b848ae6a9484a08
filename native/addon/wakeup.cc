#include "addon/wakeup.h"

#include <mutex>

namespace turbomind::addon {

struct Wakeup::State {
  std::mutex mutex;  // guards all but `on_wake`, which the JS thread alone touches
  napi_threadsafe_function function = nullptr;  // null after stop
  bool on_its_way = false;
  Callback on_wake;
};

Wakeup::Wakeup(Napi::Env env, const char* name, Callback on_wake)
    : env_(env), state_(std::make_shared<State>()) {
  state_->on_wake = std::move(on_wake);
  auto context = std::make_unique<std::shared_ptr<State>>(state_);
  const auto finalize = [](napi_env, void* data, void*) {
    delete static_cast<std::shared_ptr<State>*>(data);
  };
  const napi_status status = napi_create_threadsafe_function(
      env, nullptr, nullptr, Napi::String::New(env, name), 0, 1, context.get(), finalize,
      context.get(), &Wakeup::on_call, &state_->function);
  if (status != napi_ok) throw Napi::Error::New(env);
  context.release();  // NOLINT(bugprone-unused-return-value): now owned by the finalizer
  release();
}

Wakeup::~Wakeup() { stop(); }

void Wakeup::signal() {
  const std::lock_guard lock(state_->mutex);
  if (state_->function == nullptr || state_->on_its_way) return;
  state_->on_its_way =
      napi_call_threadsafe_function(state_->function, nullptr, napi_tsfn_nonblocking) == napi_ok;
}

void Wakeup::on_call(napi_env env, napi_value /*callback*/, void* context, void* /*data*/) {
  if (env == nullptr) return;  // the environment is being torn down
  // A copy: the callback may stop and destroy everything.
  const std::shared_ptr<State> state = *static_cast<std::shared_ptr<State>*>(context);
  {
    const std::lock_guard lock(state->mutex);
    state->on_its_way = false;
    if (state->function == nullptr) return;
  }
  state->on_wake(Napi::Env(env));
}

void Wakeup::hold() {
  if (state_->function != nullptr) napi_ref_threadsafe_function(env_, state_->function);
}

void Wakeup::release() {
  if (state_->function != nullptr) napi_unref_threadsafe_function(env_, state_->function);
}

void Wakeup::stop() {
  napi_threadsafe_function function = nullptr;
  {
    const std::lock_guard lock(state_->mutex);
    std::swap(function, state_->function);
  }
  if (function != nullptr) napi_release_threadsafe_function(function, napi_tsfn_abort);
}

}  // namespace turbomind::addon
