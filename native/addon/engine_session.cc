#include "addon/engine_session.h"

#include <system_error>

#include "addon/convert.h"
#include "addon/engine_wrap.h"
#include "addon/environment.h"

namespace turbomind::addon {

void EngineSession::open(Napi::Env env, EngineOptions options, Napi::Function on_events,
                         Napi::Function on_progress, Deferred deferred) {
  const auto session = std::make_shared<EngineSession>(env, on_events, on_progress);
  session->start_task([session, deferred, options = std::move(options)]() mutable {
    std::exception_ptr failure;
    try {
      session->engine_ = Engine::open(
          std::move(options),
          [events = session->events_](std::vector<Event> batch) { events->push(std::move(batch)); },
          [raw = session.get()](double share) { raw->report_progress(share); });
    } catch (...) {
      failure = std::current_exception();
    }
    return [session, deferred, failure](Napi::Env woken) {
      session->finish_open(woken, failure, deferred);
    };
  });
  Environment::of(env).add_session(session);
}

EngineSession::EngineSession(Napi::Env env, Napi::Function on_events, Napi::Function on_progress)
    : env_(env),
      calls_(Environment::of(env).calls()),
      on_events_(Napi::Persistent(on_events)),
      on_progress_(Napi::Persistent(on_progress)),
      events_(std::make_shared<EventQueue>(env, [this](Napi::Env woken, std::vector<Event> events) {
        deliver(woken, std::move(events));
      })) {
  // Hooks run last in, first out: this one before that of the event queue's thread-safe function,
  // so the engine thread is joined while signalling is still allowed.
  napi_add_env_cleanup_hook(env, &EngineSession::on_cleanup, this);
  has_hook_ = true;
}

EngineSession::~EngineSession() {
  if (has_hook_) napi_remove_env_cleanup_hook(env_, &EngineSession::on_cleanup, this);
}

void EngineSession::start_task(Task task) {
  const auto self = shared_from_this();
  tasks_.emplace_back();
  const auto slot = std::prev(tasks_.end());
  calls_.begin();
  try {
    *slot = std::thread([self, slot, task = std::move(task)]() mutable {
      CallQueue::Call call = task();
      task = nullptr;  // what it holds must not die with this thread
      CallQueue& calls = self->calls_;
      calls.finish([self = std::move(self), slot, call = std::move(call)](Napi::Env env) {
        if (slot->joinable()) slot->join();
        self->tasks_.erase(slot);
        call(env);
      });
    });
  } catch (...) {
    tasks_.erase(slot);
    calls_.finish([](Napi::Env) {});
    throw;
  }
}

// Leaves the empty entries to the calls that will erase them.
void EngineSession::join_tasks() {
  for (std::thread& task : tasks_) {
    if (task.joinable()) task.join();
  }
}

void EngineSession::report_progress(double share) {
  if (cancelled_) throw Error(ErrorCode::disposed, "the environment ended while loading");
  const int percent = static_cast<int>(share * 100);
  if (percent == last_percent_) return;
  last_percent_ = percent;
  calls_.post([self = weak_from_this(), share](Napi::Env env) {
    const std::shared_ptr<EngineSession> session = self.lock();
    if (!session || session->on_progress_.IsEmpty()) return;
    call_into_js(env, session->on_progress_, Napi::Number::New(env, share));
  });
}

void EngineSession::finish_open(Napi::Env env, const std::exception_ptr& failure,
                                Deferred deferred) {
  if (failure) {
    release_queues();
    Environment::of(env).remove_session(this);
    deferred.Reject(js_error(env, failure).Value());
    return;
  }
  state_ = State::open;
  deferred.Resolve(EngineWrap::create(env, shared_from_this()));
}

void EngineSession::require_open() const {
  if (state_ != State::open)
    throw Error(ErrorCode::disposed, "the engine is closed; open another one");
}

void EngineSession::submit(Request request) {
  require_open();
  const RequestId id = request.id;
  if (!in_flight_.insert(id).second) {
    throw Error(ErrorCode::invalid_argument,
                format("submit: request.id: %llu is in flight already; ids must be unique",
                       static_cast<unsigned long long>(id)));
  }
  if (in_flight_.size() == 1) hold();
  try {
    engine_->submit(std::move(request));
  } catch (...) {
    in_flight_.erase(id);
    if (in_flight_.empty()) release();
    throw;
  }
}

void EngineSession::abort(RequestId id) {
  if (state_ == State::open) engine_->abort(id);
}

void EngineSession::set_mask(RequestId id, uint32_t completion_idx, TokenMask mask) {
  if (state_ == State::open) engine_->set_mask(id, completion_idx, std::move(mask));
}

void EngineSession::set_logits(RequestId id, uint32_t completion_idx, std::vector<float> logits) {
  if (state_ == State::open) engine_->set_logits(id, completion_idx, std::move(logits));
}

EngineStats EngineSession::stats() const {
  require_open();
  return engine_->stats();
}

void EngineSession::prompt_logits(Request request, Deferred deferred) {
  require_open();
  start_task([engine = engine_, request = std::move(request), deferred]() mutable {
    auto logits = std::make_shared<std::vector<float>>();
    std::exception_ptr failure;
    try {
      *logits = engine->prompt_logits(request);
    } catch (...) {
      failure = std::current_exception();
    }
    engine.reset();
    return [deferred, logits, failure](Napi::Env env) {
      if (failure) return deferred.Reject(js_error(env, failure).Value());
      Napi::Float32Array copy = Napi::Float32Array::New(env, logits->size());
      std::copy(logits->begin(), logits->end(), copy.Data());
      deferred.Resolve(copy);
    };
  });
}

void EngineSession::deliver(Napi::Env env, std::vector<Event> events) {
  const auto self = shared_from_this();  // the callback may close and drop everything
  const Napi::Value array = to_js(env, events);
  const bool had_requests = !in_flight_.empty();
  for (const Event& event : events) {
    if (event.finish_reason != FinishReason::none) in_flight_.erase(event.id);
  }
  // Before the callback: it may submit the next request, which holds again.
  if (had_requests && in_flight_.empty()) release();
  if (!on_events_.IsEmpty()) call_into_js(env, on_events_, array);
}

void EngineSession::hold() {
  events_->hold();
  if (wrapper_ != nullptr) wrapper_->Ref();
}

void EngineSession::release() {
  events_->release();
  if (wrapper_ != nullptr) wrapper_->Unref();
}

void EngineSession::close(Deferred deferred) {
  if (state_ == State::closed) return deferred.Resolve(env_.Undefined());
  if (state_ == State::open) begin_close();
  close_waiters_.push_back(deferred);
}

void EngineSession::on_wrapper_collected() {
  wrapper_ = nullptr;
  if (state_ != State::open) return;
  try {
    begin_close();
  } catch (const std::system_error&) {
    // No thread to be had: the engine stays until the environment ends, when its hook closes it.
  }
}

void EngineSession::begin_close() {
  start_task([self = shared_from_this(), engine = engine_]() mutable {
    engine->close();
    engine.reset();
    return [self](Napi::Env env) { self->finish_close(env); };
  });
  state_ = State::closing;
}

// The engine has ended; its last events are in the queue.
void EngineSession::finish_close(Napi::Env env) {
  const auto self = shared_from_this();
  join_tasks();  // prompt logits that the closing engine has just refused
  events_->drain(env);
  fail_orphans(env);
  release_queues();
  Environment::of(env).remove_session(this);
  for (const Deferred& waiter : std::exchange(close_waiters_, {})) waiter.Resolve(env.Undefined());
}

// The engine owes every request a last event; should it fail to, nobody must wait for ever.
void EngineSession::fail_orphans(Napi::Env env) {
  std::vector<Event> events;
  for (const RequestId id : in_flight_) {
    Event event;
    event.id = id;
    event.finish_reason = FinishReason::error;
    event.error_code = ErrorCode::disposed;
    event.error_message = "the engine was closed";
    events.push_back(std::move(event));
  }
  if (!events.empty()) deliver(env, std::move(events));
}

void EngineSession::release_queues() {
  state_ = State::closed;
  engine_.reset();
  events_->stop();
  on_events_.Reset();
  on_progress_.Reset();
  if (has_hook_) napi_remove_env_cleanup_hook(env_, &EngineSession::on_cleanup, this);
  has_hook_ = false;
}

// The environment ends (process exit, worker terminated): no JavaScript can run any more.
void EngineSession::on_cleanup(void* session) {
  auto& self = *static_cast<EngineSession*>(session);
  self.has_hook_ = false;
  self.cancelled_ = true;
  if (self.state_ == State::open) self.engine_->close();
  self.join_tasks();
  if (self.engine_ != nullptr) self.engine_->close();  // its load had just ended
  self.release_queues();
}

}  // namespace turbomind::addon
