// Engine events on their way from the engine thread to JavaScript: one thread-safe function an
// engine, which delivers in batches whatever has gathered since the last time.
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "addon/wakeup.h"
#include "runtime/request.h"

namespace turbomind::addon {

class EventQueue {
 public:
  using Deliver = std::function<void(Napi::Env, std::vector<Event>)>;  // on the JS thread

  EventQueue(Napi::Env env, Deliver deliver);

  void push(std::vector<Event> events);  // any thread; after stop they are dropped
  void drain(Napi::Env env);             // JS thread: delivers what is there now
  void hold() { wakeup_.hold(); }        // JS thread: the event loop waits for more events
  void release() { wakeup_.release(); }
  void stop() { wakeup_.stop(); }  // JS thread: nothing is delivered by itself any more

 private:
  std::mutex mutex_;
  std::vector<Event> events_;
  Deliver deliver_;
  Wakeup wakeup_;
};

}  // namespace turbomind::addon
