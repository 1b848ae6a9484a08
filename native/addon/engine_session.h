// One engine from open to closed: its native threads, its events, its promises. Outlives the
// JavaScript object that wraps it: the environment keeps it until its native work has ended.
//
// All functions run on the JS thread. Native work (open, close, prompt logits) runs on threads of
// its own, which touch `engine_` and the queues only. Teardown order, by close() as by the
// environment's cleanup hook: the engine stops, threads are joined, then queues are released.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <memory>
#include <thread>
#include <unordered_set>
#include <vector>

#include "addon/call_queue.h"
#include "addon/event_queue.h"
#include "runtime/engine.h"

namespace turbomind::addon {

class EngineWrap;

class EngineSession : public std::enable_shared_from_this<EngineSession> {
 public:
  using Deferred = Napi::Promise::Deferred;

  // Opens an engine on a thread; settles `deferred` with its wrapper.
  static void open(Napi::Env env, EngineOptions options, Napi::Function on_events,
                   Napi::Function on_progress, Deferred deferred);
  EngineSession(Napi::Env env, Napi::Function on_events, Napi::Function on_progress);
  ~EngineSession();

  void submit(Request request);
  void abort(RequestId id);
  void set_mask(RequestId id, uint32_t completion_idx, TokenMask mask);
  void set_logits(RequestId id, uint32_t completion_idx, std::vector<float> logits);
  EngineStats stats() const;
  void prompt_logits(Request request, Deferred deferred);
  void close(Deferred deferred);
  // The wrapper was collected. No request runs then, because they keep it alive.
  void on_wrapper_collected();
  void set_wrapper(EngineWrap* wrapper) { wrapper_ = wrapper; }

 private:
  enum class State { opening, open, closing, closed };
  // Runs on its thread; what it returns runs on the JS thread afterwards.
  using Task = std::function<CallQueue::Call()>;

  void start_task(Task task);
  void join_tasks();
  void require_open() const;
  void report_progress(double share);  // loading thread
  void finish_open(Napi::Env env, const std::exception_ptr& failure, Deferred deferred);
  void deliver(Napi::Env env, std::vector<Event> events);
  void hold();     // from the first request in flight …
  void release();  // … to the last
  void begin_close();
  void finish_close(Napi::Env env);
  void fail_orphans(Napi::Env env);
  void release_queues();
  static void on_cleanup(void* self);

  Napi::Env env_;
  CallQueue& calls_;
  Napi::FunctionReference on_events_;
  Napi::FunctionReference on_progress_;
  std::shared_ptr<EventQueue> events_;  // the engine's sink shares it
  State state_ = State::opening;
  std::shared_ptr<Engine> engine_;  // written by the open task; shared with prompt-logits tasks
  EngineWrap* wrapper_ = nullptr;
  std::unordered_set<RequestId> in_flight_;
  std::vector<Deferred> close_waiters_;
  std::list<std::thread> tasks_;
  bool has_hook_ = false;
  std::atomic<bool> cancelled_ = false;  // tells a load that nobody waits for it
  int last_percent_ = -1;                // loading thread
};

}  // namespace turbomind::addon
