// Wakes the JS thread from any thread: a thread-safe function whose calls carry no data and are
// merged while one is on its way. Owns the rule that nothing is called after `stop`.
#pragma once

#include <functional>
#include <memory>

#include "addon/napi_support.h"

namespace turbomind::addon {

class Wakeup {
 public:
  using Callback = std::function<void(Napi::Env)>;  // on the JS thread; must not throw

  // Does not keep the event loop alive until `hold`. JS thread.
  Wakeup(Napi::Env env, const char* name, Callback on_wake);
  ~Wakeup();  // stop()
  Wakeup(const Wakeup&) = delete;
  Wakeup& operator=(const Wakeup&) = delete;

  void signal();   // any thread; without effect after stop
  void hold();     // JS thread: the event loop stays alive; may be repeated
  void release();  // JS thread: and may end again
  void stop();     // JS thread, idempotent

 private:
  struct State;
  static void on_call(napi_env env, napi_value callback, void* context, void* data);

  napi_env env_;
  std::shared_ptr<State> state_;  // shared with the thread-safe function, which dies later
};

}  // namespace turbomind::addon
