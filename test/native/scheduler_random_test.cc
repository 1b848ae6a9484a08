// Ten thousand random schedules: arrivals, aborts, deadlines, priorities, shared prefixes, turns of a
// chat, images, drafts, and pools so small that sequences are preempted, with host memory to keep their
// blocks in or without. After every step the books of both balance; every request ends once, in time, and
// with the tokens it gets when it runs alone. Steps that fail before they have run are among them.
#include <map>
#include <random>
#include <set>

#include "fake_model.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

// What the schedules reached.
struct Totals {
  uint64_t steps = 0, requests = 0, preemptions = 0, stopped = 0, images = 0, aborted = 0;
  uint64_t drafted = 0, accepted = 0;
  uint64_t expired = 0, refused = 0, overtaken = 0, hits = 0, copies = 0, tiles = 0,
           shown_tiles = 0;
  uint64_t swaps_out = 0, swaps_in = 0, saved = 0, loaded = 0, failed = 0;
};

class Scenario {
 public:
  explicit Scenario(uint32_t seed)
      : random_(seed),
        spec_(random_spec()),
        limits_(random_limits()),
        blocks_(spec_.num_blocks, spec_.block_size),
        scheduler_(limits_, blocks_),
        model_(spec_),
        runner_(model_, memory()) {
    for (std::vector<TokenId>& stem : stems_) {
      for (int i = 0; i < 24; ++i) stem.push_back(between(0, 48));
    }
  }

  void run(int num_steps, Totals& totals) {
    for (int i = 0; i < num_steps; ++i) {
      now_ += std::chrono::milliseconds(between(0, 4000));
      if (one_in(3)) arrive();
      if (one_in(12)) abort_any();
      step();
    }
    while (step()) {
    }
    EXPECT_EQ(blocks_.num_free(), spec_.num_blocks);
    EXPECT_EQ(scheduler_.swap_space().num_free(), spec_.num_swap_blocks);
    EXPECT_EQ(answers_.num_ended(), requests_.size());
    for (const auto& [id, request] : requests_) check_answer(request, totals);
    totals.steps += steps_;
    totals.requests += requests_.size();
    totals.preemptions += scheduler_.counters().preemptions;
    const SchedulerCounters& counters = scheduler_.counters();
    EXPECT(counters.swaps_out <= counters.preemptions && counters.swaps_in <= counters.swaps_out);
    EXPECT(counters.swaps_out > 0 || model_.blocks_saved == 0);
    totals.swaps_out += counters.swaps_out;
    totals.swaps_in += counters.swaps_in;
    totals.saved += static_cast<uint64_t>(model_.blocks_saved);
    totals.loaded += static_cast<uint64_t>(model_.blocks_loaded);
    totals.drafted += scheduler_.drafts().num_drafted();
    totals.accepted += scheduler_.drafts().num_accepted();
    totals.refused += num_refused_;
    totals.overtaken += num_overtaken_;
    totals.hits += scheduler_.counters().prefix_hits;
    totals.copies += static_cast<uint64_t>(model_.blocks_copied);
    totals.tiles += static_cast<uint64_t>(model_.tiles_encoded);
  }

 private:
  struct Flight {
    Rank rank;  // as the scheduler defines it
    int tokens = 0;
    uint64_t deadline = 0;  // step
    bool started = false;
  };

  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  bool one_in(int n) { return between(1, n) == 1; }

  FakeSpec random_spec() {
    FakeSpec spec;
    spec.block_size = 1 << between(0, 4);
    spec.num_blocks = std::max(2, between(12, 80) / spec.block_size);
    spec.tokens_per_tile = between(1, 4);
    spec.loops = one_in(2);
    if (one_in(2)) spec.num_swap_blocks = between(1, 2 * spec.num_blocks);
    return spec;
  }
  SchedulerLimits random_limits() {
    SchedulerLimits limits;
    limits.session_len = between(8, 50);
    limits.max_batch_size = between(1, 6);
    limits.max_prefill_token_num = between(1, 20);
    limits.max_tiles = between(1, 3);
    limits.max_held_tiles = limits.max_tiles + between(0, 4);
    limits.max_queue_size = one_in(4) ? between(1, 4) : 0;
    limits.enable_prefix_caching = !one_in(4);
    if (one_in(3)) limits.max_inter_token_ms = 0.001;  // tighter than any step
    limits.speculation.max_drafts = one_in(3) ? 0 : between(1, kMaxDrafts);
    limits.speculation.max_rows = between(0, 12);
    limits.speculation.measured = one_in(4);
    // Cheaper than computing, now cheaper and now not (steps of the model take microseconds), never.
    limits.swap = {.num_blocks = spec_.num_swap_blocks,
                   .block_ms = one_in(3)   ? 0.0002 * between(1, 10)
                               : one_in(8) ? 1000.0
                                           : 0.0};
    return limits;
  }
  MemoryPlan memory() const {
    MemoryPlan plan;
    plan.max_sequences = limits_.max_batch_size;
    plan.max_tokens = limits_.max_batch_size + limits_.max_prefill_token_num;
    plan.blocks_per_session = ceil_div(limits_.session_len, spec_.block_size);
    return plan;
  }
  int max_tokens() const {
    return std::min(limits_.session_len, spec_.num_blocks * spec_.block_size);
  }

  // A prompt of its own, one that begins like others, the same one again, or a chat's next turn.
  Request random_request() {
    const int kind = between(1, 6);
    if (kind <= 2 && !requests_.empty()) {
      auto earlier = requests_.begin();
      std::advance(earlier, between(0, static_cast<int>(requests_.size()) - 1));
      Request request = earlier->second;
      request.id = next_id_++;
      request.stop_token_ids.clear();
      if (kind == 1) return request;
      for (TokenId token : answered(earlier->first)) request.prompt_tokens.push_back(token);
      for (int i = between(0, 5); i > 0; --i) request.prompt_tokens.push_back(between(0, 48));
      return request;
    }
    Request request = text_request(next_id_++, between(1, max_tokens() / 2), 1);
    if (kind <= 4) {
      const std::vector<TokenId>& stem = stems_[static_cast<size_t>(between(0, 1))];
      const auto shared = static_cast<ptrdiff_t>(between(1, static_cast<int>(stem.size())));
      request.prompt_tokens.assign(stem.begin(), stem.begin() + shared);
    }
    while (one_in(3)) {
      add_image(request, between(1, 4), static_cast<uint8_t>(between(0, 3)), spec_);
      if (one_in(2)) request.prompt_tokens.push_back(between(0, 48));
    }
    return request;
  }
  std::vector<TokenId> answered(RequestId id) const {
    return answers_.known(id) ? answers_.at(id).tokens : std::vector<TokenId>();
  }

  void arrive() {
    Request request = random_request();
    request.max_new_tokens = between(1, 30);
    for (int i = between(0, 3); i > 0; --i) request.stop_token_ids.push_back(between(0, 48));
    request.min_new_tokens = between(0, std::min(3, request.max_new_tokens));
    request.priority = one_in(3) ? between(-2, 2) : 0;
    request.share_prefix = !one_in(8);
    if (one_in(6)) request.queue_timeout_ms = between(1, 20000);
    const int prompt_len = static_cast<int>(request.prompt_tokens.size());
    const bool fits = prompt_len < max_tokens();
    const Admission admission = scheduler_.add(request, now_);
    EXPECT_EQ(admission.admit == Admit::never, !fits);
    num_refused_ += admission.admit == Admit::refused ? 1 : 0;
    if (admission.admit != Admit::ok) return;
    begin_flight(request);
    requests_[request.id] = request;
  }

  // The first in the order gets a token further in every step and is never preempted. So from the
  // last time it was overtaken, a request ends within as many steps as all have tokens.
  void begin_flight(const Request& request) {
    Flight flight;
    flight.rank = {now_ - request.priority * Scheduler::kPriorityStep, request.id};
    flight.tokens = std::min(
        max_tokens(), static_cast<int>(request.prompt_tokens.size()) + request.max_new_tokens);
    flight.deadline = steps_ + static_cast<uint64_t>(flight.tokens);
    for (const auto& [id, other] : in_flight_) {
      flight.deadline += static_cast<uint64_t>(other.tokens);
    }
    // Those it overtakes may lose what they have: for them all begins again.
    for (auto& [id, other] : in_flight_) {
      if (other.rank < flight.rank) continue;
      other.deadline = std::max(other.deadline, flight.deadline);
      ++num_overtaken_;
    }
    in_flight_[request.id] = flight;
  }

  void abort_any() {
    if (in_flight_.empty()) return;
    auto victim = in_flight_.begin();
    std::advance(victim, between(0, static_cast<int>(in_flight_.size()) - 1));
    const std::optional<Event> event = scheduler_.abort(victim->first);
    EXPECT(event.has_value());
    if (event) answers_.take({*event});
    in_flight_.erase(victim);
    scheduler_.check_invariants();
  }

  void expire() {
    const std::vector<Event> events = scheduler_.expire(now_);
    for (const Event& event : events) {
      EXPECT(event.error_code == ErrorCode::deadline);
      EXPECT(!in_flight_.at(event.id).started);
      in_flight_.erase(event.id);
    }
    answers_.take(events);
  }

  bool step() {
    expire();
    const StepPlan& plan = scheduler_.plan();
    EXPECT_EQ(plan.empty(), in_flight_.empty());
    if (plan.empty()) return false;
    check_plan(plan);
    scheduler_.check_invariants();
    if (one_in(200)) {
      fail(plan);
      return true;
    }
    StepResults results = runner_.run(plan);
    std::vector<SampleResult> drawn(results.rows.begin(), results.rows.end());
    spoil_unused(plan, drawn);
    results.rows = drawn;
    answers_.take(scheduler_.commit(plan, results));
    ++steps_;
    scheduler_.check_invariants();
    std::erase_if(in_flight_, [&](const auto& entry) { return answers_.ended(entry.first); });
    for (const auto& [id, flight] : in_flight_) EXPECT(steps_ < flight.deadline);
    return true;
  }

  // A step that did not run: what it was to save and load must not be taken for saved and loaded.
  void fail(const StepPlan& plan) {
    std::set<RequestId> planned;
    for (const ScheduledRow& row : plan.rows) planned.insert(row.sequence->id());
    for (const SwapMove& move : plan.loads) EXPECT(move.slot < spec_.num_swap_blocks);
    const std::vector<Event> events =
        scheduler_.fail_planned(Error(ErrorCode::internal, "scripted"));
    for (const Event& event : events) {
      EXPECT_EQ(planned.erase(event.id), size_t{1});
      in_flight_.erase(event.id);
    }
    EXPECT(planned.empty());
    answers_.take(events);
    scheduler_.check_invariants();
  }

  // What is drawn behind a wrong draft must not matter, not even that it failed.
  static void spoil_unused(const StepPlan& plan, std::vector<SampleResult>& drawn) {
    size_t next = 0;
    for (const ScheduledRow& row : plan.rows) {
      const auto drafts = row.sequence->drafts();
      bool right = true;
      for (size_t i = 0; i < static_cast<size_t>(row.num_samples); ++i, ++next) {
        const TokenId token = drawn[next].token;
        if (!right) drawn[next].token = -1;
        right = right && i < drafts.size() && drafts[i] == token;
      }
    }
  }

  void check_plan(const StepPlan& plan) {
    int prefill = 0, decode = 0, samples = 0, tiles = 0, drafts = 0;
    std::set<const Sequence*> seen;
    for (const ScheduledRow& row : plan.rows) {
      EXPECT(row.num_tokens >= 1);
      EXPECT(seen.insert(row.sequence).second);
      if (row.sequence->decoding()) {
        EXPECT_EQ(prefill, 0);  // decode rows first
        ++decode;
        drafts += row.num_drafts();
        EXPECT_EQ(row.num_tokens, 1 + row.num_drafts());
        EXPECT_EQ(static_cast<size_t>(row.num_drafts()), row.sequence->drafts().size());
        EXPECT(row.num_drafts() <= limits_.speculation.max_drafts);
        // Every drawn token could be the last one that there is room for.
        EXPECT(row.sequence->num_completion_tokens() + row.num_samples <=
               row.sequence->max_new_tokens());
      } else {
        prefill += row.num_tokens;
      }
      samples += row.num_samples;
      note_start(row.sequence->id());
    }
    if (!limits_.enable_prefix_caching) check_start_order();
    for (const ScheduledTiles& run : plan.tiles) tiles += run.num_tiles;
    EXPECT(tiles <= limits_.max_tiles);
    EXPECT(prefill <= limits_.max_prefill_token_num);
    EXPECT(static_cast<int>(plan.rows.size()) <= limits_.max_batch_size);
    EXPECT_EQ(plan.num_decode, decode);
    EXPECT_EQ(plan.num_prefill_tokens, prefill);
    EXPECT(drafts <= limits_.speculation.max_rows);
    EXPECT(drafts == 0 || prefill == 0);
    EXPECT_EQ(plan.num_tokens, prefill + decode + drafts);
    EXPECT_EQ(plan.num_samples, samples);
  }

  // One that starts before its turn, because those before it wait for blocks that others compute,
  // may hold them up as long as it runs.
  void note_start(RequestId id) {
    Flight& flight = in_flight_.at(id);
    if (flight.started) return;
    flight.started = true;
    for (auto& [other_id, other] : in_flight_) {
      if (other.rank < flight.rank) other.deadline += static_cast<uint64_t>(flight.tokens);
    }
  }
  // Without sharing nobody waits for another's blocks: who starts comes after all who have started.
  void check_start_order() {
    Rank last_started{Clock::time_point::min(), 0};
    for (const auto& [id, flight] : in_flight_) {
      if (flight.started && !known_started_.contains(id)) {
        known_started_.insert(id);
        last_started = std::max(last_started, flight.rank);
      }
    }
    for (const auto& [id, flight] : in_flight_) {
      if (!flight.started) EXPECT(last_started < flight.rank);
    }
  }

  void check_answer(const Request& request, Totals& totals) {
    const Answer& answer = answers_.at(request.id);
    const Completion alone = expected_completion(request, spec_, max_tokens());
    for (const ImageInput& image : request.images) {
      totals.shown_tiles += static_cast<uint64_t>(image.tiles->num_tiles);
    }
    totals.images += request.images.size();
    const int cached = answer.last.num_cached_tokens;
    EXPECT(cached >= 0 && cached < static_cast<int>(request.prompt_tokens.size()));
    EXPECT(cached == 0 || (limits_.enable_prefix_caching && request.share_prefix));
    if (answer.last.error_code == ErrorCode::deadline) {
      EXPECT(request.queue_timeout_ms > 0 && answer.tokens.empty());
      ++totals.expired;
    } else if (answer.reason == FinishReason::abort || answer.reason == FinishReason::error) {
      EXPECT(answer.tokens.size() <= alone.tokens.size());
      EXPECT(std::equal(answer.tokens.begin(), answer.tokens.end(), alone.tokens.begin()));
      ++(answer.reason == FinishReason::abort ? totals.aborted : totals.failed);
    } else {
      EXPECT(answer.tokens == alone.tokens);
      EXPECT(answer.reason == alone.reason);
      totals.stopped += answer.reason == FinishReason::stop ? 1 : 0;
    }
  }

  std::mt19937 random_;
  FakeSpec spec_;
  SchedulerLimits limits_;
  BlockManager blocks_;
  Scheduler scheduler_;
  FakeModel model_;
  ModelRunner runner_;
  Answers answers_;
  std::array<std::vector<TokenId>, 2> stems_;
  std::map<RequestId, Request> requests_;
  std::map<RequestId, Flight> in_flight_;
  std::set<RequestId> known_started_;
  RequestId next_id_ = 1;
  Clock::time_point now_ = Clock::time_point() + std::chrono::hours(1);
  uint64_t steps_ = 0;
  uint64_t num_refused_ = 0;
  uint64_t num_overtaken_ = 0;
};

unsigned long long wide(uint64_t value) { return value; }

}  // namespace

TEST("random schedules keep the books, end every request in time and never mix sequences up") {
  constexpr uint32_t kFirstSeed = 20260101;
  constexpr int kScenarios = 10000;
  Totals totals;
  int failed = 0;
  for (uint32_t seed = kFirstSeed; seed < kFirstSeed + kScenarios && failed < 5; ++seed) {
    const int before = failures();
    try {
      Scenario scenario(seed);
      scenario.run(30, totals);
    } catch (const Error& error) {
      report(false, "no exception expected", __FILE__, __LINE__, error.what());
    }
    if (failures() == before) continue;
    std::printf("    seed %u\n", seed);
    ++failed;
  }
  std::printf(
      "    seeds %u..%u: %llu steps, %llu requests (%llu stopped, %llu aborted, %llu expired, "
      "%llu refused), %llu overtaken, %llu preemptions\n",
      kFirstSeed, kFirstSeed + kScenarios - 1, wide(totals.steps), wide(totals.requests),
      wide(totals.stopped), wide(totals.aborted), wide(totals.expired), wide(totals.refused),
      wide(totals.overtaken), wide(totals.preemptions));
  std::printf(
      "    %llu tokens found, %llu blocks copied, %llu images, %llu of %llu tiles encoded\n",
      wide(totals.hits), wide(totals.copies), wide(totals.images), wide(totals.tiles),
      wide(totals.shown_tiles));
  std::printf(
      "    %llu preempted to host memory, %llu back; %llu blocks saved, %llu loaded; %llu failed\n",
      wide(totals.swaps_out), wide(totals.swaps_in), wide(totals.saved), wide(totals.loaded),
      wide(totals.failed));
  std::printf("    %llu of %llu drafts right\n", wide(totals.accepted), wide(totals.drafted));
  // The schedules must reach what they are meant to test.
  EXPECT(totals.requests >= 50000);
  EXPECT(totals.preemptions >= 1000);
  EXPECT(totals.stopped >= 5000 && totals.aborted >= 5000 && totals.expired >= 200);
  EXPECT(totals.refused >= 200 && totals.overtaken >= 1000);
  EXPECT(totals.hits >= 50000 && totals.copies >= 1000);
  EXPECT(totals.accepted >= 5000 && totals.drafted - totals.accepted >= 5000);
  EXPECT(totals.swaps_out >= 1000 && totals.swaps_in >= 500);
  EXPECT(totals.preemptions - totals.swaps_out >= 1000);
  EXPECT(totals.loaded >= 500 && totals.loaded < totals.saved && totals.failed >= 500);
  EXPECT(totals.images >= 10000 && totals.tiles < totals.shown_tiles);
}

TEST_MAIN()
