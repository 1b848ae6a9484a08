// A host that has no memory: every single allocation of the engine's steps fails once, and large ones
// fail always. Requests end once, with their own tokens or with the reason; the others and the
// engine go on, and all blocks come back.
#include <atomic>
#include <cstdlib>
#include <new>

#include "fake_model.h"
#include "runtime/engine_core.h"
#include "test.h"

namespace {

// Of this thread, while it is armed.
struct Faults {
  bool armed = false;
  int64_t left = -1;          // allocations until one fails; -1: none does
  size_t largest = SIZE_MAX;  // larger ones fail
  int64_t failed = 0;
  bool fails(size_t bytes) {
    if (!armed) return false;
    const bool fails = bytes > largest || left == 0;
    if (left >= 0) --left;
    failed += fails ? 1 : 0;
    return fails;
  }
};
thread_local Faults faults;

void* take(size_t bytes) {
  void* memory = faults.fails(bytes) ? nullptr : std::malloc(bytes == 0 ? 1 : bytes);
  return memory;
}

}  // namespace

void* operator new(size_t bytes) {
  void* memory = take(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return take(bytes); }
void* operator new[](size_t bytes, const std::nothrow_t&) noexcept { return take(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

using namespace turbomind;
using namespace turbomind::test;

namespace {

struct Rig {
  explicit Rig(const FakeSpec& fake, int max_batch_size = 3) : spec(fake) {
    EngineParts parts;
    auto model_owner = std::make_unique<FakeModel>(spec);
    model = model_owner.get();
    parts.model = std::move(model_owner);
    parts.memory = plan_steps({.session_len = 64,
                               .max_batch_size = max_batch_size,
                               .max_prefill_token_num = 8,
                               .max_drafts = 2,
                               .block_size = spec.block_size,
                               .tokens_per_tile = spec.tokens_per_tile});
    parts.memory.num_blocks = spec.num_blocks;
    parts.memory.num_swap_blocks = spec.num_swap_blocks;
    parts.rules = rules_of(spec);
    parts.session_len = 64;
    parts.max_prefill_token_num = 8;
    parts.block_size = spec.block_size;
    parts.max_drafts = 2;
    const EventSink sink = [this](const std::vector<Event>& events) {
      const bool armed = std::exchange(faults.armed, false);  // the sink is its owner's
      answers.take(events);
      faults.armed = armed;
    };
    engine = make_engine(std::move(parts), sink, Stepping::manual);
  }
  bool step() {
    faults.armed = true;
    const bool more = engine->step();
    faults.armed = false;
    return more;
  }
  // Steps until nothing is left to do; false if that takes for ever.
  bool run_all() {
    for (int i = 0; i < 500; ++i) {
      if (!step()) return true;
    }
    return false;
  }
  bool as_alone(const Request& request) const {
    const int max_tokens = std::min(64, spec.num_blocks * spec.block_size);
    const Completion expected = expected_completion(request, spec, max_tokens);
    return answers.at(request.id).tokens == expected.tokens &&
           answers.at(request.id).reason == expected.reason;
  }

  FakeSpec spec;
  FakeModel* model = nullptr;
  Answers answers;
  std::unique_ptr<Engine> engine;
};

std::vector<Request> mixed_requests(const FakeSpec& spec) {
  std::vector<Request> requests = {text_request(1, 9, 14), text_request(2, 5, 12),
                                   text_request(3, 4, 6), text_request(4, 9, 3)};
  add_image(requests[2], 2, 7, spec);
  requests[3].prompt_tokens = requests[0].prompt_tokens;  // shares blocks
  requests[1].outputs = {.logits = OutputRange::generation, .hidden_states = OutputRange::all};
  return requests;
}

}  // namespace

TEST("any one allocation of a step may fail: every request ends once and the engine goes on") {
  const FakeSpec spec{.num_blocks = 9, .num_swap_blocks = 12};  // so small that some are preempted
  int64_t failed = 0, errors = 0, unharmed = 0;
  uint64_t swaps = 0;
  for (int64_t n = 0;; ++n) {
    Rig rig(spec);
    const std::vector<Request> requests = mixed_requests(spec);
    for (const Request& request : requests) rig.engine->submit(request);
    faults = {.left = n};
    EXPECT(rig.run_all());
    const bool fired = faults.failed > 0;
    faults = {};
    for (const Request& request : requests) {
      const bool ended = rig.answers.ended(request.id);
      EXPECT(ended);
      if (!ended) continue;
      const Answer& answer = rig.answers.at(request.id);
      if (answer.reason == FinishReason::error) {
        EXPECT(answer.last.error_code == ErrorCode::out_of_memory);
        ++errors;
      } else {
        EXPECT(rig.as_alone(request));
        ++unharmed;
      }
    }
    const EngineStats stats = rig.engine->stats();
    EXPECT_EQ(stats.free_blocks, stats.total_blocks);
    EXPECT_EQ(stats.free_swap_blocks, stats.swap_blocks);
    swaps += stats.swaps_in;
    Request late = text_request(9, 6, 5);
    rig.engine->submit(late);
    EXPECT(rig.run_all());
    EXPECT(rig.answers.ended(9) && rig.as_alone(late));
    if (!fired) break;
    ++failed;
    if (failures() > 5) {
      std::printf("    allocation %lld\n", static_cast<long long>(n));
      break;
    }
  }
  std::printf("    %lld allocations failed: %lld requests ended with an error, %lld as if alone\n",
              static_cast<long long>(failed), static_cast<long long>(errors),
              static_cast<long long>(unharmed));
  EXPECT(failed >= 100 && errors >= failed / 4 && unharmed > errors && swaps > 0);
}

TEST("a request whose outputs do not fit ends alone") {
  FakeSpec spec{.num_blocks = 64, .vocab_size = 20000, .image_token_id = 19999};
  Rig rig(spec);
  Request large = text_request(1, 30, 20);
  large.outputs = {.logits = OutputRange::all};
  Request edited = text_request(2, 4, 3);
  edited.edits_logits = true;
  const Request plain = text_request(3, 6, 25);
  for (const Request& request : {large, edited, plain}) rig.engine->submit(request);
  faults = {.largest = 64 * 1024};  // a row of logits has 80 000 bytes
  EXPECT(rig.run_all());
  EXPECT(faults.failed > 0);
  faults = {};
  for (RequestId id : {1, 2}) {
    EXPECT(rig.answers.at(id).reason == FinishReason::error);
    EXPECT(rig.answers.at(id).last.error_code == ErrorCode::out_of_memory);
    EXPECT(rig.answers.at(id).last.error_message.find("no memory for the logits") !=
           std::string::npos);
  }
  EXPECT(rig.as_alone(plain));
  EXPECT_EQ(rig.engine->stats().free_blocks, 64);
}

TEST_MAIN()
