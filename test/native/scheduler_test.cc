// Planning by example and by ten thousand random steps against a scripted model.
#include "runtime/scheduler.h"

#include <random>

#include "fake_model.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

// A scheduler, a runner and a fake model, stepped by hand.
struct Harness {
  Harness(const FakeSpec& fake, const SchedulerLimits& limits)
      : spec(fake),
        blocks(fake.num_blocks, fake.block_size),
        scheduler(limits, blocks),
        model(fake),
        runner(model, memory(limits)) {}

  static MemoryPlan memory(const SchedulerLimits& limits) {
    MemoryPlan plan;
    plan.max_sequences = limits.max_batch_size;
    plan.max_tokens = limits.max_batch_size + limits.max_prefill_token_num;
    plan.blocks_per_session = 1;
    return plan;
  }
  int max_tokens() const {
    return std::min(scheduler.limits().session_len, spec.num_blocks * spec.block_size);
  }
  void add(Request request) { EXPECT(scheduler.add(std::move(request)).admit == Admit::ok); }
  bool step() {
    const StepPlan& plan = scheduler.plan();
    if (plan.empty()) return false;
    answers.take(scheduler.commit(plan, runner.run(plan)));
    scheduler.check_invariants();
    return true;
  }
  int run_all() {
    int steps = 0;
    while (step()) ++steps;
    return steps;
  }
  void expect_same_as_alone(const Request& request) {
    const Completion expected = expected_completion(request, spec, max_tokens());
    EXPECT(answers.at(request.id).tokens == expected.tokens);
    EXPECT(answers.at(request.id).reason == expected.reason);
  }

  FakeSpec spec;
  BlockManager blocks;
  Scheduler scheduler;
  FakeModel model;
  ModelRunner runner;
  Answers answers;
};

// Host memory for `num_blocks` blocks, at a price.
SchedulerLimits with_swap(SchedulerLimits limits, int num_blocks, double block_ms = 0) {
  limits.swap = {.num_blocks = num_blocks, .block_ms = block_ms};
  return limits;
}

// Two requests whose prompts of 13 tokens differ in the last one.
std::pair<Request, Request> sharing_pair() {
  Request first = text_request(1, 13, 12);
  Request second = first;
  second.id = 2;
  second.prompt_tokens.back() = 1;
  second.max_new_tokens = 10;
  return {first, second};
}

constexpr SchedulerLimits kLimits{
    .session_len = 32, .max_batch_size = 4, .max_prefill_token_num = 8, .max_tiles = 2};

}  // namespace

TEST("a prompt is prefilled in chunks of the token budget, then decoded a token a step") {
  Harness h({}, kLimits);
  const Request request = text_request(1, 19, 3);
  h.add(request);
  EXPECT_EQ(h.scheduler.plan().rows[0].num_tokens, 8);
  EXPECT_EQ(h.run_all(), 3 + 2);  // 8 + 8 + 3 tokens, the last chunk draws; then two more
  h.expect_same_as_alone(request);
  EXPECT(h.answers.at(1).reason == FinishReason::length);
  EXPECT_EQ(h.scheduler.counters().prompt_tokens, 19U);
  EXPECT_EQ(h.scheduler.counters().completion_tokens, 3U);
  EXPECT_EQ(h.blocks.num_free(), h.spec.num_blocks);
}

TEST("decode rows come first and leave the prefill budget alone") {
  Harness h({}, kLimits);
  h.add(text_request(1, 4, 8));
  EXPECT(h.step());
  h.add(text_request(2, 12, 4));
  const StepPlan& plan = h.scheduler.plan();
  EXPECT_EQ(plan.rows.size(), size_t{2});
  EXPECT_EQ(plan.rows[0].sequence->id(), 1U);
  EXPECT_EQ(plan.rows[0].num_tokens, 1);
  EXPECT_EQ(plan.rows[1].num_tokens, 8);
  EXPECT_EQ(plan.rows[1].num_samples, 0);
  EXPECT_EQ(plan.num_tokens, 9);
  EXPECT_EQ(plan.num_samples, 1);
}

TEST("several prompts share a step's budget in order of arrival") {
  Harness h({}, kLimits);
  for (RequestId id = 1; id <= 4; ++id) h.add(text_request(id, 3, 2));
  const StepPlan& plan = h.scheduler.plan();
  EXPECT_EQ(plan.rows.size(), size_t{3});
  EXPECT_EQ(plan.rows[2].num_tokens, 2);
  EXPECT_EQ(h.scheduler.num_waiting(), 1);
}

TEST("a request that can never fit is refused with the numbers") {
  Harness h({.num_blocks = 4}, kLimits);  // 16 tokens
  const Admission too_long = h.scheduler.add(text_request(1, 32, 1));
  EXPECT(too_long.admit == Admit::never);
  EXPECT(too_long.code == ErrorCode::prompt_too_long);
  EXPECT(too_long.reason.find("32 tokens") != std::string::npos);
  const Admission too_big = h.scheduler.add(text_request(2, 16, 1));
  EXPECT(too_big.admit == Admit::never);
  EXPECT(too_big.code == ErrorCode::out_of_memory);
  EXPECT(too_big.reason.find("5 KV blocks") != std::string::npos);
  EXPECT(h.scheduler.idle());
  h.add(text_request(3, 15, 100));
  h.run_all();
  EXPECT_EQ(h.answers.at(3).tokens.size(), size_t{1});
}

TEST("a completion ends with length at the session's end or at the pool's") {
  Harness session({.num_blocks = 100}, kLimits);
  session.add(text_request(1, 30, 1000));
  session.run_all();
  EXPECT_EQ(session.answers.at(1).tokens.size(), size_t{2});
  EXPECT(session.answers.at(1).reason == FinishReason::length);
  Harness pool({.num_blocks = 5}, kLimits);
  pool.add(text_request(1, 10, 1000));
  pool.run_all();
  EXPECT_EQ(pool.answers.at(1).tokens.size(), size_t{10});
  EXPECT(pool.answers.at(1).reason == FinishReason::length);
}

TEST("a stop token ends the sequence and is reported; below min_new_tokens it is never drawn") {
  const FakeSpec spec;
  Request request = text_request(1, 5, 20);
  const std::vector<TokenId> free_run = expected_completion(request, spec, 32).tokens;
  request.stop_token_ids = {free_run[2]};
  Harness h(spec, kLimits);
  h.add(request);
  h.run_all();
  EXPECT_EQ(h.answers.at(1).tokens.size(), size_t{3});
  EXPECT(h.answers.at(1).reason == FinishReason::stop);
  EXPECT_EQ(h.answers.at(1).last.matched_stop, free_run[2]);

  request.min_new_tokens = 4;
  Harness banned(spec, kLimits);
  banned.add(request);
  banned.run_all();
  const std::vector<TokenId>& tokens = banned.answers.at(1).tokens;
  EXPECT(tokens.size() >= 4);
  EXPECT(std::find(tokens.begin(), tokens.begin() + 4, free_run[2]) == tokens.begin() + 4);
  banned.expect_same_as_alone(request);
}

TEST("the youngest sequence is preempted, waits at the front and ends as if undisturbed") {
  Harness h({.num_blocks = 6}, kLimits);  // 24 tokens
  const Request first = text_request(1, 8, 14);
  const Request second = text_request(2, 4, 16);
  const Request third = text_request(3, 4, 3);
  h.add(first);
  h.add(second);
  EXPECT(h.step());
  while (h.scheduler.counters().preemptions == 0 && h.step()) {
  }
  EXPECT_EQ(h.scheduler.counters().preemptions, 1U);
  EXPECT_EQ(h.scheduler.num_running(), 1);
  h.add(third);
  h.run_all();
  for (const Request& request : {first, second, third}) h.expect_same_as_alone(request);
  EXPECT_EQ(h.answers.at(1).last.num_preemptions, 0);
  EXPECT(h.answers.at(2).last.num_preemptions >= 1);
}

TEST("a preempted sequence goes on where it was, with its blocks from host memory") {
  SchedulerLimits limits = with_swap(kLimits, 8);
  limits.enable_prefix_caching = false;
  Harness h({.num_blocks = 6, .num_swap_blocks = 8}, limits);
  const Request first = text_request(1, 8, 14);
  const Request second = text_request(2, 4, 16);
  h.add(first);
  h.add(second);
  h.run_all();
  const SchedulerCounters& counters = h.scheduler.counters();
  EXPECT(counters.preemptions >= 1);
  EXPECT_EQ(counters.swaps_out, counters.preemptions);
  EXPECT_EQ(counters.swaps_in, counters.preemptions);
  EXPECT_EQ(counters.prompt_tokens, 12U);  // nothing was computed twice
  EXPECT_EQ(h.model.blocks_loaded, h.model.blocks_saved);
  EXPECT_EQ(h.scheduler.swap_space().num_free(), 8);
  for (const Request& request : {first, second}) h.expect_same_as_alone(request);
}

TEST("what cannot be swapped or is cheaper to compute is computed again") {
  for (const auto& [num_blocks, block_ms] : {std::pair{0, 0.0}, {1, 0.0}, {8, 1e6}}) {
    SchedulerLimits limits = with_swap(kLimits, num_blocks, block_ms);
    limits.enable_prefix_caching = false;
    Harness h({.num_blocks = 6, .num_swap_blocks = num_blocks}, limits);
    const Request first = text_request(1, 8, 14);
    const Request second = text_request(2, 7, 12);
    h.add(first);
    h.add(second);
    h.run_all();
    EXPECT(h.scheduler.counters().preemptions >= 1);
    EXPECT_EQ(h.scheduler.counters().swaps_out, 0U);
    EXPECT(h.scheduler.counters().prompt_tokens > 15U);
    for (const Request& request : {first, second}) h.expect_same_as_alone(request);
  }
}

TEST("blocks that others hold are neither saved nor loaded") {
  SchedulerLimits limits = with_swap(kLimits, 8);
  Harness h({.num_blocks = 7, .num_swap_blocks = 8}, limits);
  const auto [first, second] = sharing_pair();
  h.add(first);
  h.add(second);
  h.run_all();
  EXPECT(h.scheduler.counters().swaps_out >= 1);
  // Of the second's 4 or 5 blocks, 3 are the first's too.
  EXPECT(h.model.blocks_saved <= 2 * static_cast<int64_t>(h.scheduler.counters().swaps_out));
  for (const Request& request : {first, second}) h.expect_same_as_alone(request);
}

TEST("a shared prefix that is gone when its sequence comes back is computed again") {
  Harness h({.num_blocks = 7, .num_swap_blocks = 8}, with_swap(kLimits, 8));
  const auto [first, second] = sharing_pair();
  h.add(first);
  h.add(second);
  while (h.scheduler.counters().swaps_out == 0) EXPECT(h.step());
  EXPECT(h.scheduler.find(2)->swapped().first_block() == 3);
  EXPECT(h.scheduler.abort(1).has_value());
  h.blocks.forget_cached();
  h.run_all();
  EXPECT_EQ(h.scheduler.counters().swaps_in, 0U);
  EXPECT_EQ(h.scheduler.swap_space().num_free(), 8);
  h.expect_same_as_alone(second);
}

TEST("an abort frees blocks in host memory; a step that did not run has saved nothing") {
  for (const bool aborted : {true, false}) {
    SchedulerLimits limits = with_swap(kLimits, 8);
    limits.enable_prefix_caching = false;
    Harness h({.num_blocks = 6, .num_swap_blocks = 8}, limits);
    const Request second = text_request(2, 4, 16);
    h.add(text_request(1, 8, 14));
    h.add(second);
    while (h.scheduler.plan().saves.empty()) {
      h.answers.take(
          h.scheduler.commit(h.scheduler.current(), h.runner.run(h.scheduler.current())));
    }
    EXPECT(h.scheduler.swap_space().num_free() < 8);
    if (aborted) {
      (void)h.runner.run(h.scheduler.current());
      EXPECT(h.scheduler.abort(2).has_value());
    } else {
      h.answers.take(h.scheduler.fail_planned(Error(ErrorCode::internal, "scripted")));
    }
    EXPECT_EQ(h.scheduler.swap_space().num_free(), 8);
    h.scheduler.check_invariants();
    if (aborted) continue;
    h.run_all();
    EXPECT_EQ(h.scheduler.counters().swaps_in, 0U);
    h.expect_same_as_alone(second);
  }
}

TEST("pictures are neither computed nor encoded again for a sequence that was swapped") {
  for (int budget : {1, 8}) {
    SchedulerLimits limits = with_swap(kLimits, 16);
    limits.max_prefill_token_num = budget;
    limits.enable_prefix_caching = false;
    Harness h({.num_blocks = 8, .num_swap_blocks = 16}, limits);
    const Request first = text_request(1, 7, 25);
    Request second = text_request(2, 2, 8);
    add_image(second, 4, 9, h.spec);
    h.add(first);
    h.add(second);
    h.run_all();
    EXPECT(h.scheduler.counters().swaps_in >= 1);
    EXPECT_EQ(h.scheduler.counters().prompt_tokens, 7U + 14U);
    h.expect_same_as_alone(first);
    h.expect_same_as_alone(second);
  }
}

TEST("an aborted sequence frees its blocks at once, running or waiting") {
  Harness h({.num_blocks = 6}, kLimits);
  h.add(text_request(1, 20, 4));
  h.add(text_request(2, 20, 4));
  EXPECT(h.step());
  EXPECT_EQ(h.blocks.num_used(), 5);
  EXPECT(h.scheduler.abort(2)->finish_reason == FinishReason::abort);
  EXPECT(h.scheduler.abort(1)->finish_reason == FinishReason::abort);
  EXPECT_EQ(h.blocks.num_used(), 0);
  EXPECT(!h.scheduler.abort(1).has_value());
  EXPECT(h.scheduler.idle());
  EXPECT(!h.step());
}

TEST("tiles are encoded once, under the tile limit, whatever the chunks are") {
  for (int budget : {1, 2, 5, 100}) {
    SchedulerLimits limits = kLimits;
    limits.max_prefill_token_num = budget;
    limits.session_len = 64;
    Harness h({.num_blocks = 16}, limits);
    Request request = text_request(1, 2, 5);
    add_image(request, 5, 1, h.spec);
    request.prompt_tokens.push_back(7);
    add_image(request, 1, 2, h.spec);
    add_image(request, 2, 3, h.spec);
    h.add(request);
    bool within_limit = true;
    for (;;) {
      const int64_t before = h.model.tiles_encoded;
      if (!h.step()) break;
      within_limit = within_limit && h.model.tiles_encoded - before <= limits.max_tiles;
    }
    EXPECT(within_limit);
    EXPECT_EQ(h.model.tiles_encoded, 8);
    h.expect_same_as_alone(request);
    EXPECT(h.answers.at(1).last.timings.vision_ms > 0);
  }
}

TEST("images survive a preemption before and after their prompt is computed") {
  // The image prompt takes 5 of 8 blocks; the first sequence soon needs what it holds.
  for (int budget : {1, 8}) {
    SchedulerLimits limits = kLimits;
    limits.max_prefill_token_num = budget;
    Harness h({.num_blocks = 8}, limits);
    const Request first = text_request(1, 7, 25);
    Request second = text_request(2, 2, 8);
    add_image(second, 4, 9, h.spec);
    h.add(first);
    h.add(second);
    h.run_all();
    h.expect_same_as_alone(first);
    h.expect_same_as_alone(second);
    EXPECT(h.answers.at(2).last.num_preemptions >= 1);
  }
}

TEST("a failing step ends its own sequences only") {
  Harness h({.num_blocks = 6}, kLimits);
  h.add(text_request(1, 8, 4));
  h.add(text_request(2, 16, 4));
  EXPECT_EQ(h.scheduler.plan().rows.size(), size_t{1});
  h.answers.take(h.scheduler.fail_planned(Error(ErrorCode::internal, "scripted")));
  EXPECT(h.answers.at(1).reason == FinishReason::error);
  EXPECT(h.answers.at(1).last.error_message == "scripted");
  h.scheduler.check_invariants();
  h.run_all();
  h.expect_same_as_alone(text_request(2, 16, 4));
}

TEST("a steady state of decoding reuses the batch's memory") {
  Harness h({.num_blocks = 16}, kLimits);
  h.add(text_request(1, 8, 24));
  h.add(text_request(2, 8, 24));
  Batch batch;
  batch.reserve(h.memory(kLimits).max_tokens, kLimits.max_batch_size, kLimits.max_batch_size, 8);
  const auto build = [&] {
    batch.build(h.scheduler.plan());
    const StepBatch view = batch.view();
    h.step();
    return std::vector<const void*>{view.token_ids.data(), view.slots.data(), view.kv_len.data(),
                                    view.block_table.data(), batch.sample_rows().data()};
  };
  const std::vector<const void*> first = build();
  for (int i = 0; i < 20; ++i) EXPECT(build() == first);
}

TEST("drafts make a repetitive completion of fewer steps, with the same tokens and blocks") {
  const FakeSpec spec{.num_blocks = 64, .loops = true};
  SchedulerLimits limits = kLimits;
  limits.session_len = 200;
  limits.max_batch_size = 2;
  const Request request = text_request(1, 6, 120);
  Harness plain(spec, limits);
  plain.add(request);
  const int plain_steps = plain.run_all();
  limits.speculation = {.max_drafts = 7, .max_rows = 7, .measured = false};
  Harness h(spec, limits);
  h.add(request);
  int most_tokens = 0;
  int steps = 0;
  for (;; ++steps) {
    const StepPlan& plan = h.scheduler.plan();
    if (plan.empty()) break;
    most_tokens = std::max(most_tokens, plan.num_tokens);
    h.answers.take(h.scheduler.commit(plan, h.runner.run(plan)));
    h.scheduler.check_invariants();
  }
  h.expect_same_as_alone(request);
  EXPECT_EQ(most_tokens, 8);
  EXPECT(steps < plain_steps * 3 / 4);
  EXPECT_EQ(h.scheduler.counters().completion_tokens, 120U);
  EXPECT(h.scheduler.drafts().num_accepted() >= static_cast<uint64_t>(plain_steps - steps));
  EXPECT_EQ(h.blocks.num_free(), 64);
}

TEST(
    "a stop token among the drafts ends the sequence there, and below min_new_tokens it does not") {
  FakeSpec spec{.num_blocks = 64, .loops = true};
  SchedulerLimits limits = kLimits;
  limits.session_len = 200;
  limits.speculation = {.max_drafts = 7, .max_rows = 32, .measured = false};
  for (RequestId id = 1; id <= 20; ++id) {
    Request request = text_request(id, 6, 100);
    const std::vector<TokenId> free_run = expected_completion(request, spec, 200).tokens;
    for (size_t at : {20, 40, 60}) {
      Request stopped = request;
      stopped.stop_token_ids = {free_run[at]};
      stopped.min_new_tokens = static_cast<int>(at) - 3;
      Harness h(spec, limits);
      h.add(stopped);
      h.run_all();
      h.expect_same_as_alone(stopped);
      const Event& last = h.answers.at(id).last;
      if (last.finish_reason == FinishReason::stop) EXPECT_EQ(last.matched_stop, free_run[at]);
    }
  }
}

TEST("drafts take no blocks that are not free, and no more rows than a step has") {
  const FakeSpec spec{.num_blocks = 12, .loops = true};
  SchedulerLimits limits = kLimits;
  limits.session_len = 44;
  limits.speculation = {.max_drafts = 7, .max_rows = 5, .measured = false};
  Harness h(spec, limits);
  std::vector<Request> requests;
  for (RequestId id = 1; id <= 4; ++id) requests.push_back(text_request(id, 6, 40));
  for (const Request& request : requests) h.add(request);
  int most_drafts = 0;
  for (;;) {
    const StepPlan& plan = h.scheduler.plan();
    if (plan.empty()) break;
    if (plan.num_prefill_tokens == 0) {
      most_drafts = std::max(most_drafts, plan.num_samples - static_cast<int>(plan.rows.size()));
    }
    h.answers.take(h.scheduler.commit(plan, h.runner.run(plan)));
    h.scheduler.check_invariants();
  }
  EXPECT_EQ(most_drafts, 5);
  for (const Request& request : requests) h.expect_same_as_alone(request);
}

TEST("a prompt that was computed is not computed again, but for its last token") {
  for (const int prompt_len : {7, 8, 9, 19}) {
    Harness h({.num_blocks = 32}, kLimits);
    const Request first = text_request(1, prompt_len, 4);
    h.add(first);
    h.run_all();
    Request second = first;
    second.id = 2;
    h.add(second);
    EXPECT_EQ(h.run_all(), 4);
    h.expect_same_as_alone(first);
    h.expect_same_as_alone(second);
    EXPECT_EQ(h.answers.at(2).last.num_cached_tokens, prompt_len - 1);
    EXPECT_EQ(h.blocks.num_free(), 32);
  }
}

TEST("the next turn of a chat finds prompt and completion of the one before") {
  Harness h({.num_blocks = 32}, kLimits);
  const Request first = text_request(1, 9, 6);
  h.add(first);
  h.run_all();
  Request second = first;
  second.id = 2;
  for (TokenId token : h.answers.at(1).tokens) second.prompt_tokens.push_back(token);
  second.prompt_tokens.push_back(3);
  second.prompt_tokens.push_back(5);
  h.add(second);
  h.run_all();
  h.expect_same_as_alone(second);
  EXPECT_EQ(h.answers.at(2).last.num_cached_tokens, 9 + 6 - 1);  // the last one was never fed
}

TEST("a sequence waits for blocks that another computes, and computes them when that one is gone") {
  for (const bool aborted : {false, true}) {
    Harness h({.num_blocks = 32}, kLimits);
    const Request first = text_request(1, 20, 4);
    Request second = first;
    second.id = 2;
    second.prompt_tokens[17] = 48;
    h.add(first);
    h.add(second);
    EXPECT_EQ(h.scheduler.plan().rows.size(), size_t{1});
    h.step();
    EXPECT_EQ(h.scheduler.num_waiting(), 1);
    if (aborted) h.answers.take({*h.scheduler.abort(1)});
    h.run_all();
    h.expect_same_as_alone(second);
    EXPECT_EQ(h.answers.at(2).last.num_cached_tokens, aborted ? 8 : 17);
    if (!aborted) h.expect_same_as_alone(first);
    const uint64_t computed = h.scheduler.counters().prompt_tokens;
    EXPECT_EQ(computed, aborted ? 8U + 12 : 20U + 3);
  }
}

TEST("other pictures are other prompts; the same one is encoded once, for all who show it") {
  Harness h({.num_blocks = 64},
            {.session_len = 64, .max_batch_size = 4, .max_prefill_token_num = 64, .max_tiles = 8});
  std::vector<Request> requests;
  for (RequestId id = 1; id <= 3; ++id) {
    Request request = text_request(id, static_cast<int>(id), 3);  // the picture begins elsewhere
    add_image(request, 2, 7, h.spec);
    requests.push_back(request);
  }
  Request other = text_request(1, 1, 3);
  other.id = 4;
  add_image(other, 2, 8, h.spec);
  requests.push_back(other);
  for (const Request& request : requests) h.add(request);
  h.run_all();
  for (const Request& request : requests) h.expect_same_as_alone(request);
  EXPECT_EQ(h.model.tiles_encoded, 4);
  Request again = requests[0];
  again.id = 5;
  again.prompt_tokens.push_back(3);
  h.add(again);
  h.run_all();
  h.expect_same_as_alone(again);
  EXPECT_EQ(h.model.tiles_encoded, 4);
  EXPECT_EQ(h.answers.at(5).last.timings.vision_ms, 0.0);
}

TEST("a higher priority goes first, for as long as the difference is worth") {
  const auto start = Clock::time_point() + std::chrono::hours(1);
  SchedulerLimits limits = kLimits;
  limits.max_batch_size = 1;
  Harness h({.num_blocks = 32}, limits);
  const auto add = [&](RequestId id, int priority, std::chrono::milliseconds after) {
    Request request = text_request(id, 4, 2);
    request.priority = priority;
    EXPECT(h.scheduler.add(std::move(request), start + after).admit == Admit::ok);
  };
  using std::chrono::milliseconds;
  add(1, 0, milliseconds(0));
  add(2, 0, milliseconds(1));
  add(3, 1, milliseconds(9000));  // a level is worth 10 s
  add(4, 1, milliseconds(10500));
  std::vector<RequestId> order;
  for (;;) {
    const StepPlan& plan = h.scheduler.plan();
    if (plan.empty()) break;
    const RequestId id = plan.rows[0].sequence->id();
    if (order.empty() || order.back() != id) order.push_back(id);
    h.answers.take(h.scheduler.commit(plan, h.runner.run(plan)));
  }
  EXPECT(order == (std::vector<RequestId>{3, 1, 2, 4}));
}

TEST("a higher priority takes the place of a running request, which goes on later") {
  SchedulerLimits limits = kLimits;
  limits.max_batch_size = 1;
  Harness h({.num_blocks = 32}, limits);
  const Request low = text_request(1, 6, 8);
  Request high = text_request(2, 6, 2);
  high.priority = 1;
  h.add(low);
  EXPECT(h.step());
  h.add(high);
  EXPECT(h.step());
  EXPECT(h.answers.known(2));
  h.run_all();
  h.expect_same_as_alone(low);
  h.expect_same_as_alone(high);
  EXPECT_EQ(h.answers.at(1).last.num_preemptions, 1);
}

TEST("a full queue and a wait that is too long are refused with their codes") {
  SchedulerLimits limits = kLimits;
  limits.max_batch_size = 1;
  limits.max_queue_size = 1;
  Harness h({.num_blocks = 32}, limits);
  const Clock::time_point now = Clock::now();
  h.add(text_request(1, 6, 8));
  EXPECT(h.step());
  Request late = text_request(2, 6, 8);
  late.queue_timeout_ms = 50;
  EXPECT(h.scheduler.add(late, now).admit == Admit::ok);
  const Admission refused = h.scheduler.add(text_request(3, 6, 8), now);
  EXPECT(refused.admit == Admit::refused);
  EXPECT(refused.code == ErrorCode::queue_full);
  EXPECT(h.scheduler.expire(now + std::chrono::milliseconds(49)).empty());
  const std::vector<Event> expired = h.scheduler.expire(now + std::chrono::milliseconds(51));
  EXPECT_EQ(expired.size(), size_t{1});
  EXPECT(expired[0].error_code == ErrorCode::deadline);
  EXPECT(h.scheduler.expire(now + std::chrono::hours(1)).empty());  // what runs has no deadline
  h.run_all();
  h.expect_same_as_alone(text_request(1, 6, 8));
}

TEST("timings are ordered and only the last event carries them") {
  Harness h({}, kLimits);
  h.add(text_request(1, 12, 4));
  h.run_all();
  const RequestTimings& t = h.answers.at(1).last.timings;
  EXPECT(t.queue_ms >= 0 && t.prefill_ms > 0 && t.decode_ms > 0);
  EXPECT_NEAR(t.queue_ms + t.prefill_ms + t.vision_ms, t.first_token_ms, 1e-6);
}

TEST_MAIN()
