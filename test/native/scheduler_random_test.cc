// More than ten thousand random steps: arrivals, aborts, images, drafts, tiny pools that force
// preemption.
// After every step the pool's books balance; every request ends once, in time, and with the tokens
// it gets when it runs alone.
#include <map>
#include <random>
#include <set>

#include "fake_model.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

class Scenario {
 public:
  explicit Scenario(uint32_t seed)
      : random_(seed),
        spec_(random_spec()),
        limits_(random_limits()),
        blocks_(spec_.num_blocks, spec_.block_size),
        scheduler_(limits_, blocks_),
        model_(spec_),
        runner_(model_, memory()) {}

  void run(int num_steps) {
    for (int i = 0; i < num_steps; ++i) {
      if (one_in(3)) arrive();
      if (one_in(25)) abort_any();
      step();
    }
    while (step()) {
    }
    EXPECT_EQ(blocks_.num_free(), spec_.num_blocks);
    EXPECT_EQ(answers_.num_ended(), requests_.size());
    for (const auto& [id, request] : requests_) check_answer(request);
  }

  uint64_t steps() const { return steps_; }
  uint64_t preemptions() const { return scheduler_.num_preemptions(); }
  uint64_t drafted() const { return scheduler_.drafts().num_drafted(); }
  uint64_t accepted() const { return scheduler_.drafts().num_accepted(); }
  size_t num_requests() const { return requests_.size(); }
  size_t num_stopped() const { return num_stopped_; }
  size_t num_images() const { return num_images_; }

 private:
  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  bool one_in(int n) { return between(1, n) == 1; }

  FakeSpec random_spec() {
    FakeSpec spec;
    spec.block_size = 1 << between(0, 3);
    spec.num_blocks = std::max(2, between(12, 60) / spec.block_size);
    spec.tokens_per_tile = between(1, 4);
    spec.loops = one_in(2);
    return spec;
  }
  SchedulerLimits random_limits() {
    return {.session_len = between(8, 50),
            .max_batch_size = between(1, 6),
            .max_prefill_token_num = between(1, 20),
            .max_tiles = between(1, 3),
            .speculation = {.max_drafts = one_in(3) ? 0 : between(1, kMaxDrafts),
                            .max_rows = between(0, 12),
                            .measured = one_in(4)}};
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

  void arrive() {
    Request request = text_request(next_id_++, between(1, max_tokens() / 2), between(1, 30));
    while (one_in(3)) {
      add_image(request, between(1, 4), static_cast<uint8_t>(between(0, 255)), spec_);
      if (one_in(2)) request.prompt_tokens.push_back(between(0, 48));
    }
    for (int i = between(0, 3); i > 0; --i) request.stop_token_ids.push_back(between(0, 48));
    request.min_new_tokens = between(0, std::min(3, request.max_new_tokens));
    const int prompt_len = static_cast<int>(request.prompt_tokens.size());
    const bool fits = prompt_len < max_tokens();
    const Admission admission = scheduler_.add(request);
    EXPECT_EQ(admission.admit == Admit::ok, fits);
    if (!fits) return;
    num_images_ += request.images.size();
    // Every step the oldest sequence gets a token further, and it is never preempted. So a request
    // ends within as many steps as it and all before it have tokens.
    const int tokens = std::min(max_tokens(), prompt_len + request.max_new_tokens);
    uint64_t deadline = steps_ + static_cast<uint64_t>(tokens);
    for (const auto& [id, other] : in_flight_) deadline += static_cast<uint64_t>(other.tokens);
    in_flight_[request.id] = {tokens, deadline};
    requests_[request.id] = request;
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

  bool step() {
    const StepPlan& plan = scheduler_.plan();
    EXPECT_EQ(plan.empty(), in_flight_.empty());
    if (plan.empty()) return false;
    check_plan(plan);
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
      if (started_.insert(row.sequence->id()).second) {  // first come, first started
        EXPECT(row.sequence->id() > last_started_);
        last_started_ = row.sequence->id();
      }
    }
    for (const ScheduledTiles& run : plan.tiles) tiles += run.num_tiles;
    EXPECT(tiles <= limits_.max_tiles);
    EXPECT(prefill <= limits_.max_prefill_token_num);
    EXPECT(static_cast<int>(plan.rows.size()) <= limits_.max_batch_size);
    EXPECT_EQ(plan.num_prefill_tokens, prefill);
    EXPECT(drafts <= limits_.speculation.max_rows);
    EXPECT(drafts == 0 || prefill == 0);
    EXPECT_EQ(plan.num_tokens, prefill + decode + drafts);
    EXPECT_EQ(plan.num_samples, samples);
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

  void check_answer(const Request& request) {
    const Answer& answer = answers_.at(request.id);
    const Completion alone = expected_completion(request, spec_, max_tokens());
    if (answer.reason == FinishReason::abort) {
      EXPECT(answer.tokens.size() <= alone.tokens.size());
      EXPECT(std::equal(answer.tokens.begin(), answer.tokens.end(), alone.tokens.begin()));
      return;
    }
    EXPECT(answer.tokens == alone.tokens);
    EXPECT(answer.reason == alone.reason);
    num_stopped_ += answer.reason == FinishReason::stop ? 1 : 0;
  }

  struct Flight {
    int tokens = 0;
    uint64_t deadline = 0;  // step
  };

  std::mt19937 random_;
  FakeSpec spec_;
  SchedulerLimits limits_;
  BlockManager blocks_;
  Scheduler scheduler_;
  FakeModel model_;
  ModelRunner runner_;
  Answers answers_;
  std::map<RequestId, Request> requests_;
  std::map<RequestId, Flight> in_flight_;
  std::set<RequestId> started_;
  RequestId next_id_ = 1;
  RequestId last_started_ = 0;
  uint64_t steps_ = 0;
  size_t num_stopped_ = 0;
  size_t num_images_ = 0;
};

}  // namespace

TEST("random steps keep the books, end every request in time and never mix sequences up") {
  constexpr uint32_t kFirstSeed = 20260101;
  constexpr int kScenarios = 100;
  uint64_t steps = 0, preemptions = 0, drafted = 0, accepted = 0;
  size_t requests = 0, stopped = 0, images = 0;
  for (uint32_t seed = kFirstSeed; seed < kFirstSeed + kScenarios; ++seed) {
    const int before = failures();
    Scenario scenario(seed);
    scenario.run(200);
    if (failures() != before) std::printf("    seed %u\n", seed);
    steps += scenario.steps();
    preemptions += scenario.preemptions();
    drafted += scenario.drafted();
    accepted += scenario.accepted();
    requests += scenario.num_requests();
    stopped += scenario.num_stopped();
    images += scenario.num_images();
  }
  std::printf(
      "    seeds %u..%u: %llu steps, %zu requests, %llu preemptions, %zu stopped, %zu images, %llu "
      "of "
      "%llu drafts right\n",
      kFirstSeed, kFirstSeed + kScenarios - 1, static_cast<unsigned long long>(steps), requests,
      static_cast<unsigned long long>(preemptions), stopped, images,
      static_cast<unsigned long long>(accepted), static_cast<unsigned long long>(drafted));
  // The scenarios must reach what they are meant to test.
  EXPECT(steps >= 10000);
  EXPECT(preemptions >= 500);
  EXPECT(stopped >= 200);
  EXPECT(images >= 500);
  EXPECT(accepted >= 1000 && drafted - accepted >= 500);
}

TEST_MAIN()
