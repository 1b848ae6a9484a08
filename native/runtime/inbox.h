// Where other threads leave work for the engine thread: requests, aborts and calls, in one order.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <variant>
#include <vector>

#include "runtime/sequence.h"

namespace turbomind {

struct SubmitMessage {
  Request request;
  Clock::time_point submitted;
};
struct AbortMessage {
  RequestId id = 0;
};
// Runs on the engine thread between two steps; never throws (it answers through a promise).
// After close it is called with `closed` instead of being dropped, so that nobody waits for ever.
enum class CallOutcome : uint8_t { run, closed };
struct CallMessage {
  std::function<void(CallOutcome)> call;
};
using Message = std::variant<SubmitMessage, AbortMessage, CallMessage>;

class Inbox {
 public:
  // False once closed; the message is then untouched.
  [[nodiscard]] bool push(Message&& message) {
    {
      const std::lock_guard lock(mutex_);
      if (closed_) return false;
      num_requests_ += std::holds_alternative<SubmitMessage>(message) ? 1 : 0;
      messages_.push_back(std::move(message));
    }
    changed_.notify_one();
    return true;
  }
  // Swaps the messages into `out`, which is emptied first.
  void drain(std::vector<Message>& out) {
    out.clear();
    const std::lock_guard lock(mutex_);
    std::swap(out, messages_);
    num_requests_ = 0;
  }
  // Sleeps until there is a message or close() was called.
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return closed_ || !messages_.empty(); });
  }
  // Nothing is taken from now on; what lies here is still drained.
  void close() {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
  }
  bool closed() const {
    const std::lock_guard lock(mutex_);
    return closed_;
  }
  int num_requests() const {  // submitted, not drained
    const std::lock_guard lock(mutex_);
    return num_requests_;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Message> messages_;
  int num_requests_ = 0;
  bool closed_ = false;
};

}  // namespace turbomind
