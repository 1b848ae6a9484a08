// What a step drew becomes tokens, published blocks and measured times.
#include "runtime/scheduler.h"

#include <algorithm>
#include <array>

#include "base/error.h"

namespace turbomind {

std::vector<Event> Scheduler::commit(const StepPlan& plan, const StepResults& results) {
  TM_CHECK(&plan == &plan_, "commit of a plan of another scheduler");
  TM_CHECK(static_cast<int>(results.rows.size()) == plan.num_samples, "%zu tokens for %d rows",
           results.rows.size(), plan.num_samples);
  const Clock::time_point now = Clock::now();
  std::vector<Event> events;
  events.reserve(results.rows.size());
  drafts_.ran(plan, results.ms);
  count_vision_time();
  size_t next = 0;  // of results.rows
  for (const ScheduledRow& row : plan.rows) {
    const auto drawn = results.rows.subspan(next, static_cast<size_t>(row.num_samples));
    next += drawn.size();
    if (row.sequence == nullptr) continue;
    Sequence& sequence = *row.sequence;
    const bool decoded = sequence.decoding();
    if (sequence.parked()) {  // its last row will run once more
      if (row.num_tokens > 1) sequence.advance(row.num_tokens - 1);
      sharing_.publish(sequence, false);
      continue;
    }
    sequence.advance(row.num_tokens - row.num_drafts());
    if (!drawn.empty()) {
      events.push_back(commit_row(sequence, drawn, results.failure, now));
      counters_.completion_tokens += events.back().tokens.size();
    } else if (sequence.max_new_tokens() == 0 && sequence.num_pending() == 0) {
      events.push_back(final_event(sequence, sequence.end_prompt()));
    }
    publish(sequence, !drawn.empty() && !decoded);
  }
  counters_.prompt_tokens += static_cast<uint64_t>(plan.num_prefill_tokens);
  observe_step(now);
  plan_.clear();
  saved_.clear();
  release_copied();
  std::swap(plan_, ahead_);
  drop_finished();
  return events;
}

// The step has been waited for, so the times of its tiles are known and nothing blocks. Whoever shows
// the same picture later finds the embeddings and has no vision time.
void Scheduler::count_vision_time() {
  for (const ScheduledTiles& tiles : plan_.tiles) {
    if (tiles.sequence == nullptr) continue;
    for (const EncodedTiles& run : tiles.image->runs()) {
      if (run.first_tile != tiles.first_tile) continue;
      tiles.sequence->add_vision_ms(run.embeddings->encode_ms());
    }
  }
}

// The end of a prompt, too, is worth finding: the same prompt may come again.
void Scheduler::publish(Sequence& sequence, bool prompt_ended) {
  if (sequence.finish_reason() == FinishReason::error) return;
  sharing_.publish(sequence, prompt_ended || sequence.finish_reason() != FinishReason::none);
}

void Scheduler::observe_step(Clock::time_point now) {
  StepLoad load{plan_.num_decode, plan_.num_prefill_tokens, 0};
  for (const ScheduledTiles& tiles : plan_.tiles) load.num_tiles += tiles.num_tiles;
  budgeter_.observe(load, ms_between(std::max(planned_at_, committed_at_), now));
  committed_at_ = now;
}

Event Scheduler::commit_parked(Sequence& sequence, const SampleResult& result,
                               const std::optional<Error>& failure) {
  TM_CHECK(sequence.parked() && sequence.num_pending() == 1, "%d tokens pending of request %llu",
           sequence.num_pending(), static_cast<unsigned long long>(sequence.id()));
  forget(sequence);  // it will be planned anew
  const bool decoded = sequence.decoding();
  sequence.unpark();
  sequence.advance(1);
  Event event = commit_row(sequence, {&result, 1}, failure, Clock::now());
  counters_.completion_tokens += event.tokens.size();
  publish(sequence, !decoded);
  drop_finished();
  return event;
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

}  // namespace turbomind
