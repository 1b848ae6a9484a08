#include "runtime/scheduler.h"

#include <algorithm>
#include <array>
#include <set>

#include "base/error.h"

namespace turbomind {
namespace {

// While somebody waits, a full plan is made at least this often.
constexpr int kMostStepsAhead = 16;

// Sequences of the queue that may be passed over in a step, because others compute what they need.
constexpr int kMaxPassedOver = 16;

template <class Owners, class Owner>
void insert_by_rank(Owners& owners, Owner owner) {
  const auto after = [](const Owner& a, const Owner& b) { return a->rank() < b->rank(); };
  owners.insert(std::upper_bound(owners.begin(), owners.end(), owner, after), std::move(owner));
}

}  // namespace

Scheduler::Scheduler(const SchedulerLimits& limits, BlockManager& blocks)
    : limits_(limits),
      blocks_(blocks),
      sharing_(blocks, limits.enable_prefix_caching),
      budgeter_(limits.max_inter_token_ms, limits.max_prefill_token_num, limits.max_tiles),
      drafts_(limits.speculation) {
  TM_CHECK(limits.session_len >= 2 && limits.max_batch_size >= 1 &&
               limits.max_prefill_token_num >= 1 && limits.max_tiles >= 1,
           "scheduler limits: session_len %d, max_batch_size %d, max_prefill_token_num %d, "
           "max_tiles %d",
           limits.session_len, limits.max_batch_size, limits.max_prefill_token_num,
           limits.max_tiles);
  if (limits_.max_held_tiles == 0) limits_.max_held_tiles = 4 * limits_.max_tiles;
  TM_CHECK(limits_.max_held_tiles >= limits_.max_tiles, "%d tiles held, %d encoded in a step",
           limits_.max_held_tiles, limits_.max_tiles);
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
  if (limits_.max_queue_size > 0) {
    const auto queued = std::count_if(waiting_.begin(), waiting_.end(),
                                      [](const Owner& s) { return !s->started(); });
    if (queued >= limits_.max_queue_size) {
      return {Admit::refused, ErrorCode::queue_full,
              format("%d requests wait already, as many as maxQueueSize allows; try again later",
                     static_cast<int>(queued))};
    }
  }
  may_join_ = true;
  const Rank rank{submitted - request.priority * kPriorityStep, num_added_++};
  auto sequence = std::make_unique<Sequence>(std::move(request), submitted, max_sequence_tokens(),
                                             blocks_, rank);
  open_images(*sequence);
  insert_by_rank(waiting_, std::move(sequence));
  return admission;
}

// Sequences that show the same picture share its embeddings.
void Scheduler::open_images(Sequence& sequence) {
  for (SequenceImage& image : sequence.images()) {
    if (sequence.num_computed() < image.end()) image.encoded = images_.open(*image.tiles);
  }
}

const StepPlan& Scheduler::plan() {
  forget_plans();
  may_join_ = false;
  steps_ahead_ = 0;
  planned_at_ = Clock::now();
  make_way();
  const bool enough_blocks = plan_decode();
  // The second time only if sequences were found to need other tiles than those kept for them.
  for (int i = 0; i < 2 && (i == 0 || (plan_.empty() && !idle())); ++i) {
    StepBudget budget = budgeter_.budget(plan_.num_decode);
    limit_held_tiles(budget);
    plan_prefill(budget, enough_blocks);
  }
  drafts_.add_drafts(plan_);
  const bool parked = std::any_of(running_.begin(), running_.end(),
                                  [](const Owner& sequence) { return sequence->parked(); });
  TM_CHECK(!plan_.empty() || idle() || parked,
           "nothing to run with %d running and %d waiting sequences", num_running(), num_waiting());
  for (const ScheduledRow& row : plan_.rows) row.sequence->mark_scheduled(planned_at_);
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

// What was to be copied is: blocks are free again for later steps, chains before their ends.
void Scheduler::release_copied() {
  blocks_.release(copied_);
  copied_.clear();
}

void Scheduler::forget(const Sequence& sequence) {
  release_copied();
  plan_.forget(sequence);
  ahead_.forget(sequence);
  may_join_ = true;
}

void Scheduler::forget_plans() {
  plan_.clear();
  ahead_.clear();
  computing_.clear();
  release_copied();
}

// The first of the queue may take the place of running sequences that come after it and have a
// lower priority: the last ones give way, if that makes enough room.
void Scheduler::make_way() {
  if (waiting_.empty() || running_.empty()) return;
  const Sequence& first = *waiting_.front();
  const PrefixMatch& match = sharing_.find(first);
  int slots = limits_.max_batch_size - num_running();
  if (slots > 0 && has_room(first, match)) return;
  computing_.clear();
  for (const Owner& s : running_) {
    if (!s->decoding() && !s->parked()) computing_.push_back(s.get());
  }
  const bool waits = sharing_.is_computing(computing_, first, match);
  computing_.clear();
  if (waits) return;  // room would not help it now
  const int needed = blocks_.blocks_for(first.num_tokens()) + growing_sequences();
  int free = blocks_.num_free();
  size_t kept = running_.size();
  while (kept > 0 && (slots == 0 || free < needed)) {
    const Sequence& last = *running_[kept - 1];
    const bool yields =
        first.rank() < last.rank() && last.request().priority < first.request().priority;
    if (!yields) return;
    for (BlockId block : last.blocks().blocks()) free += blocks_.reference_count(block) == 1;
    ++slots;
    --kept;
  }
  while (running_.size() > kept) preempt_last();
}

bool Scheduler::plan_decode() {
  const size_t before = running_.size();
  for (size_t i = 0; i < running_.size(); ++i) {
    Sequence& sequence = *running_[i];
    if (!sequence.decoding() || sequence.parked()) continue;
    // The last one is behind i or i itself, so it has no row in the plan yet.
    while (i < running_.size() && !sequence.blocks().grow_to(sequence.num_tokens())) {
      TM_CHECK(running_.size() > 1, "a lone sequence does not fit into a pool of %d blocks",
               blocks_.num_blocks());
      preempt_last();
    }
    if (i < running_.size()) plan_.add_decode(sequence);
  }
  return running_.size() == before;
}

// Running and waiting sequences in one order.
void Scheduler::plan_prefill(StepBudget& budget, bool admit) {
  prefilling_.clear();
  for (const Owner& s : running_) {
    if (!s->decoding() && !s->parked()) prefilling_.push_back(s.get());
  }
  size_t next = 0;     // of prefilling_
  size_t waiting = 0;  // of waiting_; those before it were passed over
  for (;;) {
    admit = admit && waiting < waiting_.size() && waiting < kMaxPassedOver &&
            num_running() < limits_.max_batch_size;
    Sequence* running = next < prefilling_.size() ? prefilling_[next] : nullptr;
    if (admit && (running == nullptr || waiting_[waiting]->rank() < running->rank())) {
      const Joined joined = try_join(waiting, budget);
      if (joined == Joined::later) ++waiting;
      admit = joined != Joined::full;
    } else if (running != nullptr) {
      continue_prefill(*running, budget);
      ++next;
    } else {
      return;
    }
  }
}

void Scheduler::continue_prefill(Sequence& sequence, StepBudget& budget) {
  const PrefixMatch& match = sharing_.find(sequence);
  if (sharing_.is_computing(computing_, sequence, match)) return;
  take_blocks(sequence, match);
  if (match.tail.block >= 0) {
    hold_tail(match);
    copy_tail(sequence, match);
  }
  add_row(sequence, budget);
}

Scheduler::Joined Scheduler::try_join(size_t waiting_idx, StepBudget& budget) {
  Sequence& sequence = *waiting_[waiting_idx];
  const PrefixMatch& match = sharing_.find(sequence);
  if (sharing_.is_computing(computing_, sequence, match)) return Joined::later;
  if (!has_room(sequence, match)) return Joined::full;
  open_images(sequence);
  // A copy holds its source for this step: one block more, if nobody else does.
  const bool copy = match.tail.block >= 0 &&
                    (blocks_.reference_count(match.tail.block) > 0 || has_room(sequence, match, 1));
  const int found =
      match.num_full_tokens(blocks_.block_size()) + (copy ? match.tail.num_tokens : 0);
  if (!plan_.can_start(sequence, found, budget)) return Joined::full;
  if (!sequence.started())
    counters_.prefix_queries += static_cast<uint64_t>(sequence.num_prompt_tokens());
  take_blocks(sequence, match);
  if (copy) hold_tail(match);
  TM_CHECK(sequence.blocks().grow_to(sequence.num_tokens()), "%d tokens with %d blocks free",
           sequence.num_tokens(), blocks_.num_free());
  if (copy) copy_tail(sequence, match);
  add_row(sequence, budget);
  insert_by_rank(running_, std::move(waiting_[waiting_idx]));
  waiting_.erase(waiting_.begin() + static_cast<ptrdiff_t>(waiting_idx));
  return Joined::yes;
}

int Scheduler::growing_sequences() const {
  return static_cast<int>(std::count_if(running_.begin(), running_.end(), [&](const Owner& s) {
    return s->blocks().num_blocks() <
           blocks_.blocks_for(s->num_prompt_tokens() + s->max_new_tokens());
  }));
}

// One block more for each sequence that may grow, or the newcomer would soon be preempted.
bool Scheduler::has_room(const Sequence& sequence, const PrefixMatch& match, int extra) const {
  const int needed = blocks_.blocks_for(sequence.num_tokens()) + extra -
                     static_cast<int>(match.blocks.size()) + match.num_unheld;
  return blocks_.num_free() >= needed + growing_sequences();
}

void Scheduler::take_blocks(Sequence& sequence, const PrefixMatch& match) {
  if (match.blocks.empty()) return;
  for (BlockId block : match.blocks) {
    sequence.blocks().adopt(sequence.num_published(), block);
    sequence.set_published(sequence.num_published() + 1);
  }
  skip(sequence, match.num_full_tokens(blocks_.block_size()));
}

// The source must not be given to another before the copy is made.
void Scheduler::hold_tail(const PrefixMatch& match) {
  blocks_.share({&match.tail.block, 1});
  copied_.push_back(match.tail.block);
}

void Scheduler::copy_tail(Sequence& sequence, const PrefixMatch& match) {
  const BlockId own = sequence.blocks().block(sequence.num_published());
  plan_.copies.emplace_back(match.tail.block, own);
  skip(sequence, match.tail.num_tokens);
}

void Scheduler::skip(Sequence& sequence, int num_tokens) {
  const int before = sequence.num_cached_tokens();
  sequence.skip(num_tokens);
  counters_.prefix_hits += static_cast<uint64_t>(sequence.num_cached_tokens() - before);
}

void Scheduler::add_row(Sequence& sequence, StepBudget& budget) {
  if (sequence.decoding()) {
    plan_.add_decode(sequence);
  } else if (plan_.add_prefill(sequence, budget) > 0) {
    computing_.push_back(&sequence);
  }
}

// Makes room for the embeddings of a step's tiles, and grants no more tiles than there is room for.
void Scheduler::limit_held_tiles(StepBudget& budget) {
  int held = images_.num_held();
  if (held + budget.tiles > limits_.max_held_tiles) {
    drop_tiles();
    held = images_.num_held();
  }
  budget.tiles = std::min(budget.tiles, std::max(0, limits_.max_held_tiles - held));
}

// Keeps only the tiles that a running sequence can go on with: those it needs next, without a gap.
// So whoever keeps tiles can use them up, and there is always room again.
void Scheduler::drop_tiles() {
  std::set<std::pair<const EncodedImage*, int>> needed;
  for (const Owner& s : running_) {
    for (const SequenceImage& image : s->images()) {
      if (s->num_computed() >= image.end()) continue;
      int tile = std::max(0, s->num_computed() - image.token_offset) / image.tokens_per_tile;
      for (; tile < image.num_tiles() && image.encoded->state(tile) != TileState::absent; ++tile) {
        needed.emplace(image.encoded.get(), tile);
      }
      if (tile < image.num_tiles()) break;
    }
  }
  for (const std::shared_ptr<EncodedImage>& image : images_.images()) {
    image->drop_unless([&](int tile) { return needed.contains({image.get(), tile}); });
  }
}

void Scheduler::preempt_last() {
  Owner last = std::move(running_.back());
  running_.pop_back();
  sharing_.publish(*last, true);
  last->preempt();
  insert_by_rank(waiting_, std::move(last));
  ++counters_.preemptions;
}

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
  const bool decoded = sequence.decoding();
  sequence.unpark();
  sequence.advance(1);
  Event event = commit_row(sequence, {&result, 1}, failure, Clock::now());
  counters_.completion_tokens += event.tokens.size();
  publish(sequence, !decoded);
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
  event.num_cached_tokens = sequence.num_cached_tokens();
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
    sharing_.publish(**found, true);
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

std::vector<Event> Scheduler::expire(Clock::time_point now) {
  std::vector<Event> events;
  std::erase_if(waiting_, [&](const Owner& s) {
    if (!s->expired(now)) return false;
    events.push_back(error_event(
        *s, Error(ErrorCode::deadline,
                  format("the request waited longer for its first step than queueTimeoutMs (%g ms) "
                         "allows; allow more, or try again when fewer requests run",
                         s->request().queue_timeout_ms))));
    return true;
  });
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
  const auto by_rank = [](const Owner& a, const Owner& b) { return a->rank() < b->rank(); };
  TM_CHECK(std::is_sorted(running_.begin(), running_.end(), by_rank) &&
               std::is_sorted(waiting_.begin(), waiting_.end(), by_rank),
           "%d running and %d waiting sequences out of order", num_running(), num_waiting());
  std::vector<int> owners(static_cast<size_t>(blocks_.num_blocks()), 0);
  for (BlockId block : copied_) ++owners[static_cast<size_t>(block)];
  for (const Owner& s : running_) {
    TM_CHECK(s->blocks().num_blocks() >= blocks_.blocks_for(s->num_computed()),
             "%d blocks for %d tokens", s->blocks().num_blocks(), s->num_computed());
    TM_CHECK(s->num_published() * blocks_.block_size() <= s->num_computed(),
             "%d blocks published of %d tokens", s->num_published(), s->num_computed());
    for (int i = 0; i < s->num_published(); ++i) {
      TM_CHECK(blocks_.index().num_tokens(s->blocks().block(i)) == blocks_.block_size(),
               "published block %d is not in the index", s->blocks().block(i));
    }
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
