// Where other threads leave work for the engine thread: requests, aborts and calls, in one order.
#pragma once

#include <algorithm>
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
// What JavaScript says about one token of one request; see Engine::set_mask and set_logits.
struct GuideMessage {
  RequestId id = 0;
  uint32_t completion_idx = 0;
  std::variant<TokenMask, std::vector<float>> answer;
};
// Runs on the engine thread between two steps; never throws (it answers through a promise).
// After close it is called with `closed` instead of being dropped, so that nobody waits for ever.
enum class CallOutcome : uint8_t { run, closed };
struct CallMessage {
  std::function<void(CallOutcome)> call;
};
using Message = std::variant<SubmitMessage, AbortMessage, GuideMessage, CallMessage>;

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
  // Moves out the guides for which wanted(guide) holds and leaves the rest as it is, waiting for one
  // until `deadline` if there is none.
  template <class Wanted>
  void take_guides(std::vector<GuideMessage>& out, Clock::time_point deadline, Wanted&& wanted) {
    out.clear();
    std::unique_lock lock(mutex_);
    const auto is_wanted = [&](const Message& message) {
      const auto* guide = std::get_if<GuideMessage>(&message);
      return guide != nullptr && wanted(*guide);
    };
    changed_.wait_until(lock, deadline, [&] {
      return closed_ || std::any_of(messages_.begin(), messages_.end(), is_wanted);
    });
    std::erase_if(messages_, [&](Message& message) {
      if (!is_wanted(message)) return false;
      out.push_back(std::move(std::get<GuideMessage>(message)));
      return true;
    });
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
