// What comes in is taken or answered with an error. Also the top-level catch: a failing step ends its
// own requests with errors; a second failing step in a row, or a lost device, ends the engine. A
// host without memory is neither: who asked for it ends, the others go on.
#include <new>
#include <utility>

#include "runtime/engine_impl.h"

namespace turbomind {
namespace {

Event error_event(RequestId id, const Error& error) {
  Event event;
  event.id = id;
  event.finish_reason = FinishReason::error;
  event.error_code = error.code();
  event.error_message = error.what();
  return event;
}

bool is_bad_alloc(const std::exception_ptr& exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const std::bad_alloc&) {
    return true;
  } catch (...) {
    return false;
  }
}

}  // namespace

Error to_error(const std::exception_ptr& exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::out_of_memory,
                 "the host ran out of memory during a step; free some, or run fewer requests at a "
                 "time");
  } catch (const std::exception& error) {
    return Error(ErrorCode::internal, format("a step failed: %s", error.what()));
  } catch (...) {
    return Error(ErrorCode::internal, "a step failed with an unknown exception");
  }
}

Error closed_error() {
  return Error(ErrorCode::disposed, "the engine is closed; open another one");
}

void EngineImpl::submit(Request request) {
  if (!inbox_.push(SubmitMessage{std::move(request), Clock::now()})) throw closed_error();
}

void EngineImpl::abort(RequestId id) {
  // After close there is nothing left to abort.
  (void)inbox_.push(AbortMessage{id});
}

// One message after another, so that one which fails for want of memory takes no other with it.
void EngineImpl::admit() {
  inbox_.drain(messages_);
  if (messages_.empty()) return;
  std::vector<Event> events;
  for (Message& message : messages_) {
    try {
      admit_message(message, events);
    } catch (const std::bad_alloc&) {
      spare_.reset();
      admit_message(message, events);
    }
  }
  messages_.clear();  // calls hold references
  emit(std::move(events));
}

void EngineImpl::admit_message(Message& message, std::vector<Event>& events) {
  if (events.size() == events.capacity()) events.reserve(2 * events.size() + 4);
  if (auto* submit = std::get_if<SubmitMessage>(&message)) {
    admit_one(*submit, events);
  } else if (const auto* abort = std::get_if<AbortMessage>(&message)) {
    if (std::optional<Event> event = scheduler_.abort(abort->id)) {
      events.push_back(std::move(*event));
    }
  } else if (auto* guide = std::get_if<GuideMessage>(&message)) {
    take_guide(std::move(*guide), events);
  } else {
    drain();
    std::get<CallMessage>(message).call(CallOutcome::run);
  }
}

// Every request is answered: whatever goes wrong here is the answer, and the others go on.
void EngineImpl::admit_one(SubmitMessage& message, std::vector<Event>& events) {
  const RequestId id = message.request.id;
  try {
    if (dead_) throw *dead_;
    if (std::optional<Error> problem = check_request(message.request, rules_)) throw *problem;
    if (scheduler_.has(id)) {
      throw Error(ErrorCode::invalid_argument,
                  format("request id %llu is in use; ids must be unique among requests in flight",
                         static_cast<unsigned long long>(id)));
    }
    const Admission admission = scheduler_.add(std::move(message.request), message.submitted);
    if (admission.admit != Admit::ok) throw Error(admission.code, admission.reason);
  } catch (...) {
    events.push_back(error_event(id, to_error(std::current_exception())));
  }
}

// More than the answers to all requests of a step take.
void EngineImpl::keep_spare() {
  constexpr size_t kSpareBytes = size_t{1} << 20;
  spare_.reset(new (std::nothrow) char[kSpareBytes]);
}

void EngineImpl::expire() {
  std::vector<Event> events = scheduler_.expire(Clock::now());
  if (!events.empty()) emit(std::move(events));
}

bool EngineImpl::recover(const std::exception_ptr& exception) {
  spare_.reset();
  const Error error = to_error(exception);
  failed_.clear();
  answered_.clear();
  runner_->discard();
  may_run_ahead_ = false;
  ++failed_steps_;
  const bool lost = error.code() == ErrorCode::device_error || failed_steps_ > 1;
  if (!lost) {
    std::vector<Event> events = scheduler_.fail_planned(error);
    // The device is well, and those who needed the memory are gone.
    if (is_bad_alloc(exception) && !events.empty()) failed_steps_ = 0;
    emit(std::move(events));
    return true;
  }
  dead_ = Error(error.code(),
                format("the engine has stopped and must be opened again: %s", error.what()));
  emit(scheduler_.fail_all(*dead_));
  return true;
}

}  // namespace turbomind
