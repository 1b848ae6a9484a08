// Functions that other threads want run on the JS thread: one queue an environment. Also counts the
// operations under way, so that an awaited promise keeps the event loop alive and nothing else does.
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "addon/wakeup.h"

namespace turbomind::addon {

class CallQueue {
 public:
  using Call = std::function<void(Napi::Env)>;

  explicit CallQueue(Napi::Env env);

  // Any thread. In order; dropped, and destroyed on the JS thread, when the environment ends first.
  void post(Call call);
  // An operation that the event loop waits for, from `begin` to the call given to `finish`.
  void begin();            // JS thread
  void finish(Call call);  // any thread
  // JS thread. Nothing runs afterwards; what was posted is destroyed here.
  void stop();

 private:
  void run_all(Napi::Env env);

  std::mutex mutex_;
  std::vector<Call> calls_;
  bool stopped_ = false;
  int num_operations_ = 0;  // JS thread only
  Wakeup wakeup_;
};

// Runs a callback into JavaScript; what it throws becomes an uncaught exception, as for any callback
// of the event loop. Silent where the environment can no longer run JavaScript.
void call_into_js(Napi::Env env, const Napi::FunctionReference& function, napi_value argument);

}  // namespace turbomind::addon
