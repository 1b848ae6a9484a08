// Ends of requests other than by a token, and what is left of the plans they were in.
#include "runtime/scheduler.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

Event Scheduler::final_event(const Sequence& sequence, FinishReason reason) {
  Event event;
  event.id = sequence.id();
  event.finish_reason = reason;
  if (reason == FinishReason::none) return event;
  event.timings = sequence.timings();
  event.num_preemptions = sequence.num_preemptions();
  event.outputs = sequence.final_outputs();
  event.num_cached_tokens = sequence.num_cached_tokens();
  return event;
}

Event Scheduler::error_event(const Sequence& sequence, const Error& error) {
  Event event = final_event(sequence, FinishReason::error);
  event.error_code = error.code();
  event.error_message = error.what();
  return event;
}

// What was to be copied is: blocks are free again for later steps, chains before their ends.
void Scheduler::release_copied() {
  blocks_.release(copied_);
  copied_.clear();
}

void Scheduler::forget(const Sequence& sequence) {
  release_copied();
  plan_.forget(sequence);
  ahead_.forget(sequence);
  std::erase(saved_, &sequence);
  may_join_ = true;
}

// A plan that is not committed may not have run: nobody must load what it was to save.
void Scheduler::forget_plans() {
  for (Sequence* sequence : saved_) sequence->swapped().clear();
  saved_.clear();
  plan_.clear();
  ahead_.clear();
  computing_.clear();
  release_copied();
}

void Scheduler::drop_finished() {
  std::erase_if(running_, [this](const Owner& s) {
    if (s->finish_reason() == FinishReason::none) return false;
    forget(*s);
    return true;
  });
}

std::optional<Event> Scheduler::abort(RequestId id) {
  Sequence* sequence = find(id);
  if (sequence == nullptr) return std::nullopt;
  Event event = final_event(*sequence, FinishReason::abort);
  sharing_.publish(*sequence, true);
  remove(*sequence);
  return event;
}

std::optional<Event> Scheduler::fail(RequestId id, const Error& error) {
  Sequence* sequence = find(id);
  if (sequence == nullptr) return std::nullopt;
  Event event = error_event(*sequence, error);
  remove(*sequence);
  return event;
}

void Scheduler::remove(const Sequence& sequence) {
  forget(sequence);
  const auto is_it = [&sequence](const Owner& s) { return s.get() == &sequence; };
  if (std::erase_if(running_, is_it) == 0) std::erase_if(waiting_, is_it);
}

std::vector<Event> Scheduler::abort_all() {
  std::vector<Event> events;
  for (const Owner& s : running_) events.push_back(final_event(*s, FinishReason::abort));
  for (const Owner& s : waiting_) events.push_back(final_event(*s, FinishReason::abort));
  forget_plans();
  running_.clear();
  waiting_.clear();
  return events;
}

std::vector<Event> Scheduler::fail_planned(const Error& error) {
  std::vector<Event> events;
  std::vector<const Sequence*> failed;
  for (const ScheduledRow& row : plan_.rows) {
    if (row.sequence == nullptr) continue;
    events.push_back(error_event(*row.sequence, error));
    failed.push_back(row.sequence);
  }
  forget_plans();
  const auto has_failed = [&failed](const Owner& s) {
    return std::find(failed.begin(), failed.end(), s.get()) != failed.end();
  };
  std::erase_if(running_, has_failed);
  std::erase_if(waiting_, has_failed);  // planning itself may fail before a sequence has moved
  return events;
}

std::vector<Event> Scheduler::fail_all(const Error& error) {
  std::vector<Event> events;
  for (const Owner& s : running_) events.push_back(error_event(*s, error));
  for (const Owner& s : waiting_) events.push_back(error_event(*s, error));
  forget_plans();
  running_.clear();
  waiting_.clear();
  return events;
}

std::vector<Event> Scheduler::expire(Clock::time_point now) {
  std::vector<Event> events;
  const auto has_expired = [now](const Owner& s) { return s->expired(now); };
  for (const Owner& s : waiting_) {
    if (!has_expired(s)) continue;
    events.push_back(error_event(
        *s, Error(ErrorCode::deadline,
                  format("the request waited longer for its first step than queueTimeoutMs (%g ms) "
                         "allows; allow more, or try again when fewer requests run",
                         s->request().queue_timeout_ms))));
  }
  if (!events.empty()) std::erase_if(waiting_, has_expired);
  return events;
}

}  // namespace turbomind
