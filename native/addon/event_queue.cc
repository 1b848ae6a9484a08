#include "addon/event_queue.h"

#include <iterator>

namespace turbomind::addon {

EventQueue::EventQueue(Napi::Env env, Deliver deliver)
    : deliver_(std::move(deliver)),
      wakeup_(env, "turbomind.events", [this](Napi::Env woken) { drain(woken); }) {}

void EventQueue::push(std::vector<Event> events) {
  {
    const std::lock_guard lock(mutex_);
    if (events_.empty()) {
      events_ = std::move(events);
    } else {
      events_.insert(events_.end(), std::make_move_iterator(events.begin()),
                     std::make_move_iterator(events.end()));
    }
  }
  wakeup_.signal();
}

void EventQueue::drain(Napi::Env env) {
  std::vector<Event> events;
  {
    const std::lock_guard lock(mutex_);
    events.swap(events_);
  }
  if (events.empty()) return;
  const Napi::HandleScope scope(env);
  deliver_(env, std::move(events));
}

}  // namespace turbomind::addon
