// The engine thread: drains the inbox, plans, runs and commits one step after another, and sleeps on
// the inbox when there is nothing to run.
#include <algorithm>
#include <utility>

#include "runtime/engine_impl.h"

namespace turbomind {

EngineImpl::EngineImpl(EngineParts parts, EventSink sink, Stepping stepping)
    : model_(std::move(parts.model)),
      rules_(parts.rules),
      blocks_(parts.memory.num_blocks, parts.block_size),
      scheduler_(
          {.session_len = parts.session_len,
           .max_batch_size = parts.memory.max_sequences,
           .max_prefill_token_num = parts.max_prefill_token_num,
           .max_tiles = parts.memory.max_tiles,
           .max_held_tiles = parts.memory.max_held_tiles,
           .max_queue_size = parts.max_queue_size,
           .max_inter_token_ms = parts.max_inter_token_ms,
           .enable_prefix_caching = parts.enable_prefix_caching,
           .speculation = {.max_drafts = parts.max_drafts,
                           .max_rows = parts.memory.max_rows - parts.memory.max_sequences,
                           .measured = parts.measure_drafts},
           .swap = {.num_blocks = parts.memory.num_swap_blocks, .block_ms = parts.swap_block_ms}},
          blocks_),
      runner_(std::in_place, *model_, parts.memory),
      outputs_(*model_, parts.rules),
      sink_(std::move(sink)),
      stepping_(stepping),
      stats_(std::move(parts.stats)) {
  failed_.reserve(2 * static_cast<size_t>(parts.memory.max_sequences));
  answered_.reserve(static_cast<size_t>(parts.memory.max_sequences));
  keep_spare();
  stats_.session_len = parts.session_len;
  publish_stats();
  if (stepping == Stepping::own_thread) thread_ = std::thread([this] { loop(); });
  thread_id_ = thread_.get_id();
}

EngineStats EngineImpl::stats() const {
  const std::lock_guard lock(stats_mutex_);
  EngineStats stats = stats_;
  stats.waiting += inbox_.num_requests();
  return stats;
}

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
      outputs_.collect(plan, *runner_, failed_);
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

// `events` come before those of the step.
void EngineImpl::commit_oldest(std::vector<Event> events) {
  const StepPlan& plan = scheduler_.current();
  StepResults results = runner_->collect(plan);
  step_times_.observe(results.ms);
  // What waits for JavaScript or hands things out says nothing about the price of a row.
  const bool is_plain = std::none_of(plan.rows.begin(), plan.rows.end(), [](const auto& row) {
    return row.sequence != nullptr && row.sequence->request().step_by_step();
  });
  if (!is_plain) results.ms = 0;
  // Room for all of them first: what is committed must go out.
  events.reserve(events.size() + plan.rows.size() + failed_.size() + answered_.size());
  end_failed(events);
  for (Event& event : scheduler_.commit(plan, results)) events.push_back(std::move(event));
  for (RequestId id : answered_) {
    if (Sequence* sequence = scheduler_.find(id)) events.push_back(draw_edited(*sequence));
  }
  answered_.clear();
  finish_step(std::move(events));
}

// Before the commit, so that nothing drawn for them goes out.
void EngineImpl::end_failed(std::vector<Event>& events) {
  for (RequestId id : failed_) {
    const Error error(ErrorCode::out_of_memory,
                      "the host has no memory for the logits or hidden states of this request; ask "
                      "for fewer positions, or try again when fewer requests run");
    if (std::optional<Event> event = scheduler_.fail(id, error))
      events.push_back(std::move(*event));
  }
  failed_.clear();
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
  if (!spare_) keep_spare();
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
  stats_.step_times = step_times_;
  stats_.memory.use.allocated = model_->allocated_bytes();
  stats_.preemptions = counters.preemptions;
  stats_.swaps_out = counters.swaps_out;
  stats_.swaps_in = counters.swaps_in;
  stats_.swap_blocks = scheduler_.swap_space().num_slots();
  stats_.free_swap_blocks = scheduler_.swap_space().num_free();
  stats_.prompt_tokens = counters.prompt_tokens;
  stats_.completion_tokens = counters.completion_tokens;
  stats_.prefix_queries = counters.prefix_queries;
  stats_.prefix_hits = counters.prefix_hits;
  stats_.drafted_tokens = scheduler_.drafts().num_drafted();
  stats_.accepted_tokens = scheduler_.drafts().num_accepted();
}

void EngineImpl::loop() {
  while (!inbox_.closed()) {
    if (step()) continue;
    note_free_memory();
    inbox_.wait();
  }
  shut_down();
}

// When there is time for it, and something may have changed.
void EngineImpl::note_free_memory() {
  if (num_steps_ == steps_at_note_ || dead_) return;
  steps_at_note_ = num_steps_;
  try {
    const size_t free_bytes = model_->device_free_bytes();
    const std::lock_guard lock(stats_mutex_);
    stats_.memory.use.device_free = free_bytes;
  } catch (const Error&) {
    // A lost device, which the next step reports.
  }
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

std::unique_ptr<Engine> make_engine(EngineParts parts, EventSink sink, Stepping stepping) {
  return std::make_unique<EngineImpl>(std::move(parts), std::move(sink), stepping);
}

}  // namespace turbomind
