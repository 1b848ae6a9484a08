// The engine thread: drains the inbox, plans, runs and commits one step after another, and sleeps on
// the inbox when there is nothing to run. Also the top-level catch: a failing step ends its own
// requests with errors; a second failing step in a row, or a lost device, ends the engine.
#include "runtime/engine.h"

#include <algorithm>
#include <exception>
#include <future>
#include <mutex>
#include <new>
#include <optional>
#include <thread>
#include <utility>

#include "runtime/engine_core.h"
#include "runtime/inbox.h"
#include "runtime/output_collector.h"
#include "runtime/scheduler.h"

namespace turbomind {
namespace {

// How long a step whose logits are there waits for the masks of its guided rows.
constexpr auto kMaskPatience = std::chrono::milliseconds(2);

Error to_error(const std::exception_ptr& exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::out_of_memory, "the host ran out of memory during a step");
  } catch (const std::exception& error) {
    return Error(ErrorCode::internal, format("a step failed: %s", error.what()));
  } catch (...) {
    return Error(ErrorCode::internal, "a step failed with an unknown exception");
  }
}

Event error_event(RequestId id, const Error& error) {
  Event event;
  event.id = id;
  event.finish_reason = FinishReason::error;
  event.error_code = error.code();
  event.error_message = error.what();
  return event;
}

// Exceptions do not cross threads: the error travels as a value.
struct LogitsAnswer {
  std::vector<float> logits;
  std::optional<Error> error;
};

Error closed_error() { return Error(ErrorCode::disposed, "the engine is closed"); }

// Tiles whose embeddings the memory plan has room for: those of one full session.
int held_tiles(const EngineParts& parts) {
  const int tokens_per_tile = parts.rules.tokens_per_tile;
  const int session = tokens_per_tile > 0 ? parts.session_len / tokens_per_tile : 0;
  return std::max(parts.memory.max_tiles, session);
}

class EngineImpl final : public Engine {
 public:
  EngineImpl(EngineParts parts, EventSink sink, Stepping stepping)
      : model_(std::move(parts.model)),
        rules_(parts.rules),
        blocks_(parts.memory.num_blocks, parts.block_size),
        scheduler_({.session_len = parts.session_len,
                    .max_batch_size = parts.memory.max_sequences,
                    .max_prefill_token_num = parts.max_prefill_token_num,
                    .max_tiles = parts.memory.max_tiles,
                    .max_held_tiles = held_tiles(parts),
                    .max_queue_size = parts.max_queue_size,
                    .max_inter_token_ms = parts.max_inter_token_ms,
                    .enable_prefix_caching = parts.enable_prefix_caching,
                    .speculation = {.max_drafts = parts.max_drafts,
                                    .max_rows = parts.memory.max_rows - parts.memory.max_sequences,
                                    .measured = parts.measure_drafts}},
                   blocks_),
        runner_(std::in_place, *model_, parts.memory),
        outputs_(*model_, parts.rules),
        sink_(std::move(sink)),
        stepping_(stepping),
        stats_(std::move(parts.stats)) {
    stats_.session_len = parts.session_len;
    publish_stats();
    if (stepping == Stepping::own_thread) thread_ = std::thread([this] { loop(); });
    thread_id_ = thread_.get_id();
  }
  ~EngineImpl() override { close(); }

  void submit(Request request) override {
    if (!inbox_.push(SubmitMessage{std::move(request), Clock::now()})) throw closed_error();
  }

  void abort(RequestId id) override {
    // After close there is nothing left to abort.
    (void)inbox_.push(AbortMessage{id});
  }

  void set_mask(RequestId id, uint32_t completion_idx, TokenMask mask) override {
    (void)inbox_.push(GuideMessage{id, completion_idx, std::move(mask)});
  }

  void set_logits(RequestId id, uint32_t completion_idx, std::vector<float> logits) override {
    if (logits.size() != static_cast<size_t>(rules_.vocab_size)) {
      throw Error(
          ErrorCode::invalid_argument,
          format("%zu logits for token %u of request %llu; the vocabulary has %d", logits.size(),
                 completion_idx, static_cast<unsigned long long>(id), rules_.vocab_size));
    }
    (void)inbox_.push(GuideMessage{id, completion_idx, std::move(logits)});
  }

  EngineStats stats() const override {
    const std::lock_guard lock(stats_mutex_);
    EngineStats stats = stats_;
    stats.waiting += inbox_.num_requests();
    return stats;
  }

  void close() override;
  bool step() override;
  std::vector<float> prompt_logits(const Request& request) override;

 private:
  void loop();
  void admit();
  void expire();
  void admit_one(SubmitMessage message, std::vector<Event>& events);
  void take_guide(GuideMessage message, std::vector<Event>& events);
  void await_masks(const StepPlan& plan);
  void offer_logits(const StepPlan& plan, std::vector<Event>& events);
  Event draw_edited(Sequence& sequence);
  bool recover(const std::exception_ptr& exception);
  void shut_down();
  void commit_oldest(std::vector<Event> events);
  void drain();
  void finish_step(std::vector<Event> events);
  void emit(std::vector<Event> events);
  void publish_stats();
  std::vector<float> compute_prompt_logits(const Request& request);

  std::unique_ptr<Model> model_;
  RequestRules rules_;
  BlockManager blocks_;  // outlives the scheduler's sequences
  Scheduler scheduler_;
  std::optional<ModelRunner> runner_;
  OutputCollector outputs_;
  HostSampler host_sampler_;          // of edited logits
  std::vector<RequestId> answered_;   // rows of the step whose logits came back before
  std::vector<GuideMessage> guides_;  // the inbox's, reused
  bool may_run_ahead_ = false;        // the newest launched step draws without the host
  EventSink sink_;
  Stepping stepping_;
  Inbox inbox_;
  std::vector<Message> messages_;  // the inbox's, reused
  int failed_steps_ = 0;           // in a row
  std::optional<Error> dead_;      // why no further step can run
  uint64_t num_steps_ = 0;

  mutable std::mutex stats_mutex_;
  EngineStats stats_;
  std::mutex close_mutex_;
  bool shut_down_ = false;
  std::thread::id thread_id_;  // kept, because thread_ changes when it is joined
  std::thread thread_;         // last: it uses all of the above
};

bool EngineImpl::step() {
  try {
    admit();
    expire();
    std::vector<Event> events;
    if (runner_->num_launched() == 0) {
      const StepPlan& plan = scheduler_.plan();
      if (plan.empty()) return false;
      runner_->forward(plan);
      await_masks(plan);
      offer_logits(plan, events);
      outputs_.collect(plan, *runner_);
      may_run_ahead_ = runner_->draw(plan);
    }
    // The device has work while the host plans the next step and hands out the tokens of this one.
    if (may_run_ahead_) {
      const StepPlan* ahead = scheduler_.plan_ahead();
      may_run_ahead_ = ahead != nullptr && runner_->launch(*ahead);
    }
    commit_oldest(std::move(events));
    return true;
  } catch (...) {
    return recover(std::current_exception());
  }
}

// The forward runs while JavaScript computes masks. Once its logits are there, late masks get a
// moment; a sequence without one is parked, so that the others need not wait any longer.
void EngineImpl::await_masks(const StepPlan& plan) {
  const auto waits = [](const ScheduledRow& row) {
    return row.num_samples > 0 && row.sequence->needs_mask();
  };
  const auto missing = [&] { return std::any_of(plan.rows.begin(), plan.rows.end(), waits); };
  if (!missing()) return;
  model_->synchronize();
  const Clock::time_point deadline =
      Clock::now() + (stepping_ == Stepping::manual ? Clock::duration::zero() : kMaskPatience);
  do {
    inbox_.take_guides(guides_, deadline, [&](const GuideMessage& guide) {
      return std::any_of(plan.rows.begin(), plan.rows.end(), [&](const ScheduledRow& row) {
        return waits(row) && row.sequence->id() == guide.id;
      });
    });
    std::vector<Event> none;  // nothing is parked yet, so nothing can be drawn
    for (GuideMessage& guide : guides_) take_guide(std::move(guide), none);
  } while (!guides_.empty() && missing());
  for (const ScheduledRow& row : plan.rows) {
    if (waits(row)) row.sequence->park();
  }
}

// Rows whose logits JavaScript edits are parked in every step: their tokens are drawn when the
// answer comes, without another forward.
void EngineImpl::offer_logits(const StepPlan& plan, std::vector<Event>& events) {
  answered_.clear();
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    const ScheduledRow& row = plan.rows[i];
    Sequence& sequence = *row.sequence;
    if (row.num_samples == 0 || !sequence.request().edits_logits) continue;
    sequence.park();
    if (!sequence.needs_logits() && !sequence.needs_mask()) answered_.push_back(sequence.id());
    if (std::exchange(sequence.guide().offered, true)) continue;  // before it was preempted
    auto offer = std::make_shared<LogitsOffer>();
    offer->completion_idx = static_cast<uint32_t>(sequence.num_completion_tokens());
    offer->logits.resize(static_cast<size_t>(rules_.vocab_size));
    model_->logits(runner_->first_row(i) + row.num_tokens - 1, offer->logits);
    Event& event = events.emplace_back();
    event.id = sequence.id();
    event.offer = std::move(offer);
  }
}

void EngineImpl::take_guide(GuideMessage message, std::vector<Event>& events) {
  Sequence* sequence = scheduler_.find(message.id);
  if (sequence == nullptr) return;  // it has ended
  if (message.completion_idx != static_cast<uint32_t>(sequence->num_completion_tokens())) return;
  const Request& request = sequence->request();
  Guide& guide = sequence->guide();
  if (auto* mask = std::get_if<TokenMask>(&message.answer)) {
    if (!request.guided) return;
    guide.mask = std::move(*mask);
  } else {
    if (!guide.offered) return;
    guide.logits = std::move(std::get<std::vector<float>>(message.answer));
  }
  if (!sequence->parked() || sequence->needs_mask() || sequence->needs_logits()) return;
  if (request.edits_logits) {
    events.push_back(draw_edited(*sequence));
  } else {
    sequence->unpark();
  }
}

Event EngineImpl::draw_edited(Sequence& sequence) {
  SampleRow row;
  row.params = &sequence.request().sampling;
  row.tokens = sequence.tokens();
  row.banned = sequence.banned(sequence.num_completion_tokens());
  row.completion_idx = static_cast<uint32_t>(sequence.num_completion_tokens());
  row.allowed = sequence.allowed();
  SampleResult result;
  std::optional<Error> failure;
  const SampleStatus status = host_sampler_.sample(*sequence.guide().logits, row, result);
  if (status != SampleStatus::ok) {
    failure = Error(ErrorCode::invalid_argument,
                    format("no token can be drawn from the logits that logitsProcessor left: %s",
                           status == SampleStatus::not_finite ? "they hold NaN or infinity"
                                                              : describe(status)));
  }
  return scheduler_.commit_parked(sequence, result, failure);
}

// `events` come before those of the step.
void EngineImpl::commit_oldest(std::vector<Event> events) {
  StepResults results = runner_->collect();
  const StepPlan& plan = scheduler_.current();
  // What waits for JavaScript or hands things out says nothing about the price of a row.
  const bool is_plain = std::none_of(plan.rows.begin(), plan.rows.end(), [](const auto& row) {
    return row.sequence != nullptr && row.sequence->request().step_by_step();
  });
  if (!is_plain) results.ms = 0;
  for (Event& event : scheduler_.commit(plan, results)) events.push_back(std::move(event));
  for (RequestId id : answered_) events.push_back(draw_edited(*scheduler_.find(id)));
  answered_.clear();
  finish_step(std::move(events));
}

// Ends running ahead: what comes next needs the runner for itself.
void EngineImpl::drain() {
  try {
    may_run_ahead_ = false;
    while (runner_->num_launched() > 0) commit_oldest({});
  } catch (...) {
    recover(std::current_exception());
  }
}

void EngineImpl::finish_step(std::vector<Event> events) {
  ++num_steps_;
  failed_steps_ = 0;
  emit(std::move(events));
}

void EngineImpl::emit(std::vector<Event> events) {
  publish_stats();  // first, so that they are not behind what the sink's owner learns
  if (!events.empty()) sink_(std::move(events));
}

void EngineImpl::publish_stats() {
  const std::lock_guard lock(stats_mutex_);
  stats_.running = scheduler_.num_running();
  stats_.waiting = scheduler_.num_waiting();
  stats_.total_blocks = blocks_.num_blocks();
  stats_.free_blocks = blocks_.num_free();
  stats_.steps = num_steps_;
  const SchedulerCounters& counters = scheduler_.counters();
  stats_.cached_blocks = blocks_.num_cached();
  stats_.preemptions = counters.preemptions;
  stats_.prompt_tokens = counters.prompt_tokens;
  stats_.completion_tokens = counters.completion_tokens;
  stats_.prefix_queries = counters.prefix_queries;
  stats_.prefix_hits = counters.prefix_hits;
  stats_.drafted_tokens = scheduler_.drafts().num_drafted();
  stats_.accepted_tokens = scheduler_.drafts().num_accepted();
}

void EngineImpl::admit() {
  inbox_.drain(messages_);
  if (messages_.empty()) return;
  std::vector<Event> events;
  for (Message& message : messages_) {
    if (auto* submit = std::get_if<SubmitMessage>(&message)) {
      admit_one(std::move(*submit), events);
    } else if (const auto* abort = std::get_if<AbortMessage>(&message)) {
      if (std::optional<Event> event = scheduler_.abort(abort->id)) events.push_back(*event);
    } else if (auto* guide = std::get_if<GuideMessage>(&message)) {
      take_guide(std::move(*guide), events);
    } else {
      drain();
      std::get<CallMessage>(message).call(CallOutcome::run);
    }
  }
  messages_.clear();  // calls hold references
  emit(std::move(events));
}

void EngineImpl::expire() {
  std::vector<Event> events = scheduler_.expire(Clock::now());
  if (!events.empty()) emit(std::move(events));
}

// Every request is answered: whatever goes wrong here is the answer, and the others go on.
void EngineImpl::admit_one(SubmitMessage message, std::vector<Event>& events) {
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

bool EngineImpl::recover(const std::exception_ptr& exception) {
  const Error error = to_error(exception);
  runner_->discard();
  may_run_ahead_ = false;
  ++failed_steps_;
  const bool lost = error.code() == ErrorCode::device_error || failed_steps_ > 1;
  if (!lost) {
    emit(scheduler_.fail_planned(error));
    return true;
  }
  dead_ = Error(error.code(),
                format("the engine has stopped and must be opened again: %s", error.what()));
  emit(scheduler_.fail_all(*dead_));
  return true;
}

std::vector<float> EngineImpl::prompt_logits(const Request& request) {
  if (stepping_ == Stepping::manual) {
    if (inbox_.closed()) throw closed_error();
    drain();
    return compute_prompt_logits(request);
  }
  TM_CHECK(std::this_thread::get_id() != thread_id_, "prompt_logits called by the sink");
  std::promise<LogitsAnswer> promise;
  std::future<LogitsAnswer> future = promise.get_future();
  // References are safe: this function waits until the call was made.
  CallMessage message{[this, &promise, &request](CallOutcome outcome) {
    LogitsAnswer answer;
    try {
      if (outcome == CallOutcome::closed) throw closed_error();
      answer.logits = compute_prompt_logits(request);
    } catch (...) {
      answer.error = to_error(std::current_exception());
    }
    promise.set_value(std::move(answer));
  }};
  if (!inbox_.push(std::move(message))) throw closed_error();
  LogitsAnswer answer = future.get();
  if (answer.error) throw *answer.error;
  return std::move(answer.logits);
}

// Runs between two steps, with blocks of its own that are back before the next plan.
std::vector<float> EngineImpl::compute_prompt_logits(const Request& request) {
  if (dead_) throw *dead_;
  if (std::optional<Error> problem = check_request(request, rules_)) throw *problem;
  const int num_tokens = static_cast<int>(request.prompt_tokens.size());
  const Admission admission = scheduler_.fits(num_tokens);
  if (admission.admit == Admit::never) throw Error(admission.code, admission.reason);
  Sequence sequence(request, Clock::now(), num_tokens + 1, blocks_);
  if (!sequence.blocks().grow_to(num_tokens)) {
    throw Error(ErrorCode::out_of_memory,
                format("logits of a prompt of %d tokens need %d KV blocks; %d of %d are free while "
                       "%d sequences run; ask again when they have ended",
                       num_tokens, blocks_.blocks_for(num_tokens), blocks_.num_free(),
                       blocks_.num_blocks(), scheduler_.num_running()));
  }
  std::vector<float> logits(static_cast<size_t>(rules_.vocab_size));
  StepPlan plan;
  while (sequence.num_pending() > 0) {
    plan.clear();
    StepBudget budget{scheduler_.limits().max_prefill_token_num, scheduler_.limits().max_tiles};
    const int count = plan.add_prefill(sequence, budget);
    if (plan.num_samples == 1) {
      runner_->run_logits(plan, logits);
    } else {
      runner_->run(plan);
    }
    sequence.advance(count);
  }
  return logits;
}

void EngineImpl::loop() {
  while (!inbox_.closed()) {
    if (!step()) inbox_.wait();
  }
  shut_down();
}

// Ends everything that runs, waits or lies in the inbox. Nothing can come in any more.
void EngineImpl::shut_down() {
  runner_->discard();
  std::vector<Event> events = scheduler_.abort_all();
  inbox_.drain(messages_);
  for (Message& message : messages_) {
    if (const auto* submit = std::get_if<SubmitMessage>(&message)) {
      Event& event = events.emplace_back();
      event.id = submit->request.id;
      event.finish_reason = FinishReason::abort;
    } else if (const auto* call = std::get_if<CallMessage>(&message)) {
      call->call(CallOutcome::closed);
    }
  }
  messages_.clear();
  emit(std::move(events));
}

void EngineImpl::close() {
  TM_CHECK(std::this_thread::get_id() != thread_id_, "close called by the sink");
  const std::lock_guard lock(close_mutex_);
  if (shut_down_) return;
  inbox_.close();
  if (thread_.joinable()) {
    thread_.join();
  } else {
    shut_down();
  }
  runner_.reset();
  model_.reset();
  shut_down_ = true;
}

}  // namespace

std::unique_ptr<Engine> make_engine(EngineParts parts, EventSink sink, Stepping stepping) {
  return std::make_unique<EngineImpl>(std::move(parts), std::move(sink), stepping);
}

}  // namespace turbomind
