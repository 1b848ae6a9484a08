#include "runtime/scheduler.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace turbomind {
namespace {

// While somebody waits, a full plan is made at least this often.
constexpr int kMostStepsAhead = 16;

}  // namespace

Scheduler::Scheduler(const SchedulerLimits& limits, BlockManager& blocks)
    : limits_(limits), blocks_(blocks), drafts_(limits.speculation) {
  TM_CHECK(limits.session_len >= 2 && limits.max_batch_size >= 1 &&
               limits.max_prefill_token_num >= 1 && limits.max_tiles >= 1,
           "scheduler limits: session_len %d, max_batch_size %d, max_prefill_token_num %d, "
           "max_tiles %d",
           limits.session_len, limits.max_batch_size, limits.max_prefill_token_num,
           limits.max_tiles);
  running_.reserve(static_cast<size_t>(limits.max_batch_size));
  plan_.rows.reserve(static_cast<size_t>(limits.max_batch_size));
}

int Scheduler::max_sequence_tokens() const {
  return static_cast<int>(std::min<int64_t>(limits_.session_len, blocks_.num_tokens()));
}

Admission Scheduler::fits(int num_prompt_tokens) const {
  if (num_prompt_tokens >= limits_.session_len) {
    return {Admit::never, ErrorCode::prompt_too_long,
            format("the prompt has %d tokens and leaves no room for a completion in a session of "
                   "%d; shorten it or raise sessionLen",
                   num_prompt_tokens, limits_.session_len)};
  }
  if (num_prompt_tokens >= blocks_.num_tokens()) {
    return {Admit::never, ErrorCode::out_of_memory,
            format("the prompt has %d tokens and needs %d KV blocks, but the pool has %d of %d "
                   "tokens; shorten it or raise cacheMaxEntryCount",
                   num_prompt_tokens, blocks_.blocks_for(num_prompt_tokens + 1),
                   blocks_.num_blocks(), blocks_.block_size())};
  }
  return {};
}

Admission Scheduler::add(Request request, Clock::time_point submitted) {
  Admission admission = fits(static_cast<int>(request.prompt_tokens.size()));
  if (admission.admit == Admit::never) return admission;
  may_join_ = true;
  waiting_.push_back(
      std::make_unique<Sequence>(std::move(request), submitted, max_sequence_tokens(), blocks_));
  return admission;
}

const StepPlan& Scheduler::plan() {
  forget_plans();
  may_join_ = false;
  steps_ahead_ = 0;
  StepBudget budget{limits_.max_prefill_token_num, limits_.max_tiles};
  const bool enough_blocks = plan_decode();
  plan_prefill(budget);
  if (enough_blocks) admit_waiting(budget);
  drafts_.add_drafts(plan_);
  const bool parked = std::any_of(running_.begin(), running_.end(),
                                  [](const Owner& sequence) { return sequence->parked(); });
  TM_CHECK(!plan_.empty() || idle() || parked,
           "nothing to run with %d running and %d waiting sequences", num_running(), num_waiting());
  const Clock::time_point now = Clock::now();
  for (const ScheduledRow& row : plan_.rows) row.sequence->mark_scheduled(now);
  return plan_;
}

const StepPlan* Scheduler::plan_ahead() {
  TM_CHECK(ahead_.empty(), "a second step ahead");
  const auto num_rows = static_cast<int>(plan_.rows.size());
  const bool only_decodes = plan_.num_prefill_tokens == 0 && plan_.num_tokens == num_rows &&
                            plan_.num_samples == num_rows && num_rows == num_running();
  if (num_rows == 0 || !only_decodes) return nullptr;
  if (!waiting_.empty() && (may_join_ || steps_ahead_ >= kMostStepsAhead)) return nullptr;
  for (const ScheduledRow& row : plan_.rows) {
    if (row.sequence == nullptr || row.sequence->request().step_by_step()) return nullptr;
  }
  if (drafts_.has_guess(plan_)) return nullptr;
  for (int i = 0; i < num_rows; ++i) {
    Sequence& sequence = *plan_.rows[static_cast<size_t>(i)].sequence;
    if (sequence.num_completion_tokens() + 1 >= sequence.max_new_tokens()) continue;  // its last
    if (!sequence.blocks().grow_to(sequence.num_tokens() + 1)) {
      ahead_.clear();
      return nullptr;
    }
    ahead_.add_ahead(sequence, i);
  }
  if (ahead_.empty()) return nullptr;
  ++steps_ahead_;
  return &ahead_;
}

void Scheduler::forget(const Sequence& sequence) {
  plan_.forget(sequence);
  ahead_.forget(sequence);
  may_join_ = true;
}

void Scheduler::forget_plans() {
  plan_.clear();
  ahead_.clear();
}

bool Scheduler::plan_decode() {
  const size_t before = running_.size();
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (!sequence.decoding() || sequence.parked()) continue;
    // The youngest is behind i or i itself, so it has no row in the plan yet.
    while (i < running_.size() && !sequence.blocks().grow_to(sequence.num_tokens())) {
      preempt_youngest();
    }
    if (i < running_.size()) plan_.add_decode(sequence);
  }
  return running_.size() == before;
}

void Scheduler::plan_prefill(StepBudget& budget) {
  for (const Owner& sequence : running_) {
    if (!sequence->decoding() && !sequence->parked()) plan_.add_prefill(*sequence, budget);
  }
}

void Scheduler::admit_waiting(StepBudget& budget) {
  while (!waiting_.empty() && num_running() < limits_.max_batch_size) {
    Sequence& sequence = *waiting_.front();
    // One block more for each sequence that may grow, or the newcomer would soon be preempted.
    const int needed = blocks_.blocks_for(sequence.num_tokens());
    if (blocks_.num_free() < needed + growing_sequences()) return;
    if (plan_.add_prefill(sequence, budget) == 0) return;
    TM_CHECK(sequence.blocks().grow_to(sequence.num_tokens()), "%d blocks with %d free", needed,
             blocks_.num_free());
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

int Scheduler::growing_sequences() const {
  return static_cast<int>(std::count_if(running_.begin(), running_.end(), [&](const Owner& s) {
    return s->blocks().num_blocks() <
           blocks_.blocks_for(s->num_prompt_tokens() + s->max_new_tokens());
  }));
}

void Scheduler::preempt_youngest() {
  TM_CHECK(running_.size() > 1, "a lone sequence does not fit into a pool of %d blocks",
           blocks_.num_blocks());
  running_.back()->preempt();
  waiting_.push_front(std::move(running_.back()));
  running_.pop_back();
  ++num_preemptions_;
}

std::vector<Event> Scheduler::commit(const StepPlan& plan, const StepResults& results) {
  TM_CHECK(&plan == &plan_, "commit of a plan of another scheduler");
  TM_CHECK(static_cast<int>(results.rows.size()) == plan.num_samples, "%zu tokens for %d rows",
           results.rows.size(), plan.num_samples);
  const Clock::time_point now = Clock::now();
  std::vector<Event> events;
  events.reserve(results.rows.size());
  drafts_.ran(plan, results.ms);
  size_t next = 0;  // of results.rows
  for (const ScheduledRow& row : plan.rows) {
    const auto drawn = results.rows.subspan(next, static_cast<size_t>(row.num_samples));
    next += drawn.size();
    if (row.sequence == nullptr) continue;
    Sequence& sequence = *row.sequence;
    if (sequence.parked()) {  // its last row will run once more
      if (row.num_tokens > 1) sequence.advance(row.num_tokens - 1);
      continue;
    }
    sequence.advance(row.num_tokens - row.num_drafts());
    if (!drawn.empty()) {
      events.push_back(commit_row(sequence, drawn, results.failure, now));
      num_completion_tokens_ += events.back().tokens.size();
    } else if (sequence.max_new_tokens() == 0 && sequence.num_pending() == 0) {
      events.push_back(final_event(sequence, sequence.end_prompt()));
    }
  }
  num_prompt_tokens_ += static_cast<uint64_t>(plan.num_prefill_tokens);
  plan_.clear();
  std::swap(plan_, ahead_);
  drop_finished();
  return events;
}

void Scheduler::drop_finished() {
  std::erase_if(running_, [this](const Owner& s) {
    if (s->finish_reason() == FinishReason::none) return false;
    forget(*s);
    return true;
  });
}

Event Scheduler::commit_parked(Sequence& sequence, const SampleResult& result,
                               const std::optional<Error>& failure) {
  TM_CHECK(sequence.parked() && sequence.num_pending() == 1, "%d tokens pending of request %llu",
           sequence.num_pending(), static_cast<unsigned long long>(sequence.id()));
  forget(sequence);  // it will be planned anew
  sequence.unpark();
  sequence.advance(1);
  Event event = commit_row(sequence, {&result, 1}, failure, Clock::now());
  num_completion_tokens_ += event.tokens.size();
  drop_finished();
  return event;
}

Sequence* Scheduler::find(RequestId id) {
  for (const Owner& s : running_) {
    if (s->id() == id) return s.get();
  }
  for (const Owner& s : waiting_) {
    if (s->id() == id) return s.get();
  }
  return nullptr;
}

// Takes the token of each position while the draft behind it was that token: exactly what decoding
// one by one draws. What was computed for a wrong draft is computed again in its place.
Event Scheduler::commit_row(Sequence& sequence, std::span<const SampleResult> results,
                            const std::optional<Error>& failure, Clock::time_point now) {
  std::array<TokenId, kMaxDrafts> drafts{};
  std::copy(sequence.drafts().begin(), sequence.drafts().end(), drafts.begin());
  std::vector<TokenEvent> tokens;
  FinishReason reason = FinishReason::none;
  int accepted = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const SampleResult& result = results[i];
    if (result.token < 0) {
      sequence.fail();
      Event event =
          error_event(sequence, failure.value_or(Error(ErrorCode::internal, "no token was drawn")));
      event.tokens = std::move(tokens);
      return event;
    }
    reason = sequence.append(result.token, now);
    tokens.push_back({result.token, result.logprob, result.top_logprobs});
    if (reason != FinishReason::none || i + 1 == results.size()) break;
    if (drafts[i] != result.token) break;
    sequence.advance(1);
    ++accepted;
  }
  drafts_.committed(sequence, static_cast<int>(results.size()) - 1, accepted);
  Event event = final_event(sequence, reason);
  event.tokens = std::move(tokens);
  if (reason == FinishReason::stop) event.matched_stop = event.tokens.back().token;
  return event;
}

Event Scheduler::final_event(const Sequence& sequence, FinishReason reason) {
  Event event;
  event.id = sequence.id();
  event.finish_reason = reason;
  if (reason == FinishReason::none) return event;
  event.timings = sequence.timings();
  event.num_preemptions = sequence.num_preemptions();
  event.outputs = sequence.final_outputs();
  return event;
}

Event Scheduler::error_event(const Sequence& sequence, const Error& error) {
  Event event = final_event(sequence, FinishReason::error);
  event.error_code = error.code();
  event.error_message = error.what();
  return event;
}

std::optional<Event> Scheduler::abort(RequestId id) {
  const auto matches = [id](const Owner& s) { return s->id() == id; };
  const auto end = [this, &matches](auto& owners) -> std::optional<Event> {
    const auto found = std::find_if(owners.begin(), owners.end(), matches);
    if (found == owners.end()) return std::nullopt;
    forget(**found);
    const Event event = final_event(**found, FinishReason::abort);
    owners.erase(found);
    return event;
  };
  if (std::optional<Event> event = end(running_)) return event;
  return end(waiting_);
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

bool Scheduler::has(RequestId id) const {
  const auto matches = [id](const Owner& s) { return s->id() == id; };
  return std::any_of(running_.begin(), running_.end(), matches) ||
         std::any_of(waiting_.begin(), waiting_.end(), matches);
}

void Scheduler::check_invariants() const {
  blocks_.check_invariants();
  TM_CHECK(num_running() <= limits_.max_batch_size, "%d running sequences of at most %d",
           num_running(), limits_.max_batch_size);
  std::vector<int> owners(static_cast<size_t>(blocks_.num_blocks()), 0);
  for (const Owner& s : running_) {
    TM_CHECK(s->blocks().num_blocks() >= blocks_.blocks_for(s->num_computed()),
             "%d blocks for %d tokens", s->blocks().num_blocks(), s->num_computed());
    for (BlockId block : s->blocks().blocks()) ++owners[static_cast<size_t>(block)];
  }
  for (const Owner& s : waiting_) {
    TM_CHECK(s->blocks().num_blocks() == 0 && s->num_computed() == 0,
             "a waiting sequence holds %d blocks", s->blocks().num_blocks());
  }
  for (BlockId block = 0; block < blocks_.num_blocks(); ++block) {
    const int held = owners[static_cast<size_t>(block)];
    TM_CHECK(held == blocks_.reference_count(block), "block %d: %d references, %d owners", block,
             blocks_.reference_count(block), held);
  }
}

}  // namespace turbomind
