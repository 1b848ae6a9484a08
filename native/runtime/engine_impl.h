// The engine's own class, shared by the files that implement it:
//   engine.cc           opening and closing, the loop, one step
//   engine_requests.cc  what comes in and how it is answered; failing steps
//   engine_guides.cc    masks and edited logits from JavaScript
//   engine_logits.cc    prompt_logits, which runs apart from the batch
// Members of the engine thread but for the inbox and what a mutex guards.
#pragma once

#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "runtime/engine_core.h"
#include "runtime/inbox.h"
#include "runtime/output_collector.h"
#include "runtime/scheduler.h"

namespace turbomind {

Error to_error(const std::exception_ptr& exception);
Error closed_error();

class EngineImpl final : public Engine {
 public:
  EngineImpl(EngineParts parts, EventSink sink, Stepping stepping);
  ~EngineImpl() override { close(); }

  void submit(Request request) override;
  void abort(RequestId id) override;
  void set_mask(RequestId id, uint32_t completion_idx, TokenMask mask) override;
  void set_logits(RequestId id, uint32_t completion_idx, std::vector<float> logits) override;
  EngineStats stats() const override;
  void close() override;
  bool step() override;
  std::vector<float> prompt_logits(const Request& request) override;

 private:
  void loop();
  void admit();
  void expire();
  void admit_one(SubmitMessage& message, std::vector<Event>& events);
  void take_guide(GuideMessage message, std::vector<Event>& events);
  void await_masks(const StepPlan& plan);
  void offer_logits(const StepPlan& plan, std::vector<Event>& events);
  Event draw_edited(Sequence& sequence);
  bool recover(const std::exception_ptr& exception);
  void admit_message(Message& message, std::vector<Event>& events);
  void shut_down();
  void commit_oldest(std::vector<Event> events);
  void end_failed(std::vector<Event>& events);
  void drain();
  void keep_spare();
  void finish_step(std::vector<Event> events);
  void emit(std::vector<Event> events);
  void publish_stats();
  void note_free_memory();
  std::vector<float> compute_prompt_logits(const Request& request);

  std::unique_ptr<Model> model_;
  RequestRules rules_;
  BlockManager blocks_;  // outlives the scheduler's sequences
  Scheduler scheduler_;
  std::optional<ModelRunner> runner_;
  OutputCollector outputs_;
  HostSampler host_sampler_;          // of edited logits
  std::vector<RequestId> failed_;     // rows of the step that the host has no memory for
  std::vector<RequestId> answered_;   // rows of the step whose logits came back before
  std::vector<GuideMessage> guides_;  // the inbox's, reused
  bool may_run_ahead_ = false;        // the newest launched step draws without the host
  EventSink sink_;
  Stepping stepping_;
  Inbox inbox_;
  std::vector<Message> messages_;  // the inbox's, reused
  std::unique_ptr<char[]> spare_;  // given up to have memory for the answers to a step without
  int failed_steps_ = 0;           // in a row
  std::optional<Error> dead_;      // why no further step can run
  uint64_t num_steps_ = 0;
  uint64_t steps_at_note_ = 0;
  StepTimes step_times_;

  mutable std::mutex stats_mutex_;
  EngineStats stats_;
  std::mutex close_mutex_;
  bool shut_down_ = false;
  std::thread::id thread_id_;  // kept, because thread_ changes when it is joined
  std::thread thread_;         // last: it uses all of the above
};

}  // namespace turbomind
