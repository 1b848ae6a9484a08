// The engine around a scripted model: answers to bad requests, failing steps, prompt logits, and its
// thread under close, abort and concurrent callers.
#include "runtime/engine.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <thread>

#include "fake_model.h"
#include "runtime/engine_core.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

// Collects events from any thread, and checks that they come from one thread at a time, in order.
class Collector {
 public:
  EventSink sink() {
    return [this](std::vector<Event> events) {
      const std::lock_guard lock(mutex_);
      try {
        answers_.take(events);
      } catch (const Error&) {
        out_of_order_ = true;
      }
      if (engine_thread_ == std::thread::id()) engine_thread_ = std::this_thread::get_id();
      one_thread_ = one_thread_ && engine_thread_ == std::this_thread::get_id();
      changed_.notify_all();
    };
  }
  void wait_for_tokens(RequestId id, size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return answers_.ended(id) || tokens(id) >= count; });
  }
  void wait_for_end(RequestId id) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return answers_.ended(id); });
  }
  size_t num_ended() {
    const std::lock_guard lock(mutex_);
    return answers_.num_ended();
  }
  Answer at(RequestId id) {
    const std::lock_guard lock(mutex_);
    return answers_.at(id);
  }
  bool ended(RequestId id) {
    const std::lock_guard lock(mutex_);
    return answers_.ended(id);
  }
  bool ordered() const { return one_thread_ && !out_of_order_; }

 private:
  size_t tokens(RequestId id) const {
    return answers_.known(id) ? answers_.at(id).tokens.size() : 0;
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  Answers answers_;
  std::thread::id engine_thread_;
  bool one_thread_ = true;
  bool out_of_order_ = false;
};

struct Options {
  FakeSpec spec{.num_blocks = 64};
  int session_len = 128;
  int max_batch_size = 4;
  int max_prefill_token_num = 8;
  int max_drafts = 0;
};

struct Setup {
  explicit Setup(Stepping stepping, const Options& chosen = {}) : options(chosen) {
    auto fake = std::make_unique<FakeModel>(options.spec);
    model = fake.get();
    EngineParts parts;
    parts.model = std::move(fake);
    parts.memory = plan_steps({.session_len = options.session_len,
                               .max_batch_size = options.max_batch_size,
                               .max_prefill_token_num = options.max_prefill_token_num,
                               .max_drafts = options.max_drafts,
                               .block_size = options.spec.block_size,
                               .tokens_per_tile = options.spec.tokens_per_tile});
    parts.memory.num_blocks = options.spec.num_blocks;
    parts.rules = rules_of(options.spec);
    parts.session_len = options.session_len;
    parts.max_prefill_token_num = options.max_prefill_token_num;
    parts.block_size = options.spec.block_size;
    parts.max_drafts = options.max_drafts;
    parts.measure_drafts = false;
    parts.stats.device_name = "fake";
    engine = make_engine(std::move(parts), events.sink(), stepping);
  }
  int max_tokens() const {
    return std::min(options.session_len, options.spec.num_blocks * options.spec.block_size);
  }
  void expect_same_as_alone(const Request& request) {
    const Completion expected = expected_completion(request, options.spec, max_tokens());
    EXPECT(events.at(request.id).tokens == expected.tokens);
    EXPECT(events.at(request.id).reason == expected.reason);
  }
  void run_all() {
    while (engine->step()) {
    }
  }

  Options options;
  Collector events;  // outlives the engine
  FakeModel* model = nullptr;
  std::unique_ptr<Engine> engine;
};

void expect_refused(const Request& request, ErrorCode code, const char* part,
                    const Options& options = {}) {
  Setup s(Stepping::manual, options);
  const Request good = text_request(99, 5, 3);
  s.engine->submit(good);
  s.engine->submit(request);
  s.run_all();
  const Answer answer = s.events.at(request.id);
  EXPECT(answer.reason == FinishReason::error);
  EXPECT(answer.tokens.empty());
  EXPECT(answer.last.error_code == code);
  const bool names_it = answer.last.error_message.find(part) != std::string::npos;
  EXPECT(names_it);
  if (!names_it) std::printf("    %s\n", answer.last.error_message.c_str());
  s.expect_same_as_alone(good);
  EXPECT_EQ(s.engine->stats().free_blocks, options.spec.num_blocks);
}

template <class Change>
Request changed(Change change) {
  Request request = text_request(1, 6, 4);
  change(request);
  return request;
}

Request image_request(RequestId id, int num_tiles) {
  Request request = text_request(id, 2, 6);
  add_image(request, num_tiles, static_cast<uint8_t>(id), FakeSpec{});
  request.prompt_tokens.push_back(3);
  return request;
}

}  // namespace

TEST("requests run together and each gets what it gets alone") {
  Setup s(Stepping::manual);
  std::vector<Request> requests;
  for (RequestId id = 1; id <= 6; ++id) requests.push_back(text_request(id, 3 + 4 * (id % 3), 10));
  requests.push_back(image_request(7, 3));
  for (const Request& request : requests) s.engine->submit(request);
  EXPECT_EQ(s.engine->stats().waiting, 7);
  EXPECT(s.engine->step());
  EXPECT(s.engine->stats().running > 0);
  s.run_all();
  for (const Request& request : requests) s.expect_same_as_alone(request);
  EXPECT(s.model->max_step_tokens > 8);  // decode and prefill shared a step
  const EngineStats stats = s.engine->stats();
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.free_blocks, stats.total_blocks);
  EXPECT_EQ(stats.completion_tokens, 6U * 10 + 6);
  EXPECT_EQ(stats.steps, static_cast<uint64_t>(s.model->forwards));
  EXPECT(stats.device_name == "fake");
  EXPECT_EQ(stats.session_len, 128);
}

TEST("events carry several tokens where drafts were right, and stats count them") {
  Setup s(Stepping::manual,
          {.spec = {.num_blocks = 64, .loops = true}, .max_batch_size = 2, .max_drafts = 7});
  const Request request = text_request(1, 6, 100);
  s.engine->submit(request);
  s.run_all();
  s.expect_same_as_alone(request);
  const EngineStats stats = s.engine->stats();
  EXPECT(stats.steps < 90);
  EXPECT(stats.accepted_tokens > 0 && stats.drafted_tokens >= stats.accepted_tokens);
  EXPECT_EQ(stats.completion_tokens, 100U);
  EXPECT_EQ(stats.steps + stats.accepted_tokens, 100U);
}

TEST("a bad prompt is answered with an error that names it") {
  const auto bad = ErrorCode::invalid_argument;
  expect_refused(changed([](Request& r) { r.prompt_tokens.clear(); }), bad, "no tokens");
  expect_refused(changed([](Request& r) { r.prompt_tokens[2] = 50; }), bad,
                 "prompt token[2] is 50");
  expect_refused(changed([](Request& r) { r.prompt_tokens[0] = -1; }), bad, "ids 0 to 49");
  expect_refused(changed([](Request& r) { r.prompt_tokens[3] = 49; }), bad, "no image covers it");
  expect_refused(text_request(1, 128, 1), ErrorCode::prompt_too_long, "128 tokens");
  Options tiny;
  tiny.spec.num_blocks = 4;
  expect_refused(text_request(1, 100, 1), ErrorCode::out_of_memory, "cacheMaxEntryCount", tiny);
}

TEST("bad images are answered with an error that names them") {
  const auto bad = ErrorCode::invalid_argument;
  const auto image = [](auto change) {
    Request request = image_request(1, 2);
    change(request);
    return request;
  };
  const auto tiles = [&image](auto change) {
    return image([&change](Request& r) {
      auto copy = std::make_shared<image::ImageTiles>(*r.images[0].tiles);
      change(*copy);
      r.images[0].tiles = copy;
    });
  };
  expect_refused(image([](Request& r) { r.images[0].tiles.reset(); }), bad, "no tiles");
  expect_refused(image([](Request& r) { r.images[0].num_tokens = 5; }), bad, "5 image tokens");
  expect_refused(image([](Request& r) { r.images[0].token_offset = 1; }), bad, "image token 49");
  expect_refused(image([](Request& r) { r.images[0].token_offset = 7; }), bad, "the prompt has 9");
  expect_refused(image([](Request& r) { r.images[0].token_offset = -1; }), bad, "from -1");
  expect_refused(image([](Request& r) { r.images.push_back(r.images[0]); }), bad, "images[1]");
  expect_refused(image([](Request& r) { r.prompt_tokens[8] = 49; }), bad, "no image covers");
  expect_refused(tiles([](image::ImageTiles& t) { t.tile_size = 4; }), bad, "4 pixels");
  expect_refused(tiles([](image::ImageTiles& t) { t.num_tiles = 3; }), bad, "24 bytes");
  expect_refused(tiles([](image::ImageTiles& t) { t.num_tiles = 0; }), bad, "no tiles");
  Options text;
  text.spec.tile_size = 0;
  expect_refused(image_request(1, 1), bad, "text only", text);
}

TEST("bad sampling parameters are answered with an error that names them") {
  const auto bad = ErrorCode::invalid_argument;
  const auto sampling = [](auto change) {
    return changed([&change](Request& r) {
      r.sampling.do_sample = true;
      change(r.sampling);
    });
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (float value : {0.0F, -1.0F, kNan, kInf}) {
    expect_refused(sampling([=](SamplingParams& p) { p.temperature = value; }), bad, "temperature");
    expect_refused(sampling([=](SamplingParams& p) { p.repetition_penalty = value; }), bad,
                   "repetitionPenalty");
  }
  for (float value : {0.0F, 1.5F, kNan}) {
    expect_refused(sampling([=](SamplingParams& p) { p.top_p = value; }), bad, "topP");
  }
  for (float value : {-0.1F, 1.0F, kNan}) {
    expect_refused(sampling([=](SamplingParams& p) { p.min_p = value; }), bad, "minP");
  }
  for (float value : {kNan, kInf}) {
    expect_refused(sampling([=](SamplingParams& p) { p.frequency_penalty = value; }), bad,
                   "frequencyPenalty");
    expect_refused(sampling([=](SamplingParams& p) { p.presence_penalty = value; }), bad,
                   "presencePenalty");
    expect_refused(sampling([=](SamplingParams& p) {
                     p.logit_bias = {{1, value}};
                   }),
                   bad, "logitBias of token 1");
  }
  expect_refused(sampling([](SamplingParams& p) { p.logit_bias = {{77, 1.0F}}; }), bad, "77");
  expect_refused(sampling([](SamplingParams& p) {
                   p.logit_bias = {{7, 1.0F}, {7, 2.0F}};
                 }),
                 bad, "token 7 twice");
  expect_refused(sampling([](SamplingParams& p) { p.top_k = -1; }), bad, "topK");
  expect_refused(sampling([](SamplingParams& p) { p.num_logprobs = -1; }), bad, "logprobs");
  expect_refused(sampling([](SamplingParams& p) { p.bad_words = {{}}; }), bad, "badWords[0]");
  expect_refused(sampling([](SamplingParams& p) { p.bad_words = {{1, 77}}; }), bad, "77");
  expect_refused(changed([](Request& r) { r.max_new_tokens = 0; }), bad, "maxNewTokens");
  expect_refused(changed([](Request& r) { r.min_new_tokens = 5; }), bad, "maxNewTokens = 4");
  expect_refused(changed([](Request& r) { r.min_new_tokens = -1; }), bad, "minNewTokens");
  expect_refused(changed([](Request& r) { r.stop_token_ids = {2, 50}; }), bad, "stopTokenIds[1]");
}

TEST("an id in use is refused") {
  Setup s(Stepping::manual);
  s.engine->submit(text_request(1, 5, 3));
  EXPECT(s.engine->step());
  s.engine->submit(text_request(1, 5, 3));
  EXPECT(s.engine->step());
  EXPECT(s.events.at(1).reason == FinishReason::error);
  EXPECT(s.events.at(1).last.error_message.find("id 1") != std::string::npos);
}

TEST("a failing step ends the requests in it, and the engine goes on") {
  Setup s(Stepping::manual, {.max_batch_size = 1});
  int fail = 1;
  s.model->on_forward = [&fail] {
    if (fail-- > 0) throw std::runtime_error("scripted failure");
  };
  const Request second = text_request(2, 5, 3);
  s.engine->submit(text_request(1, 5, 3));
  s.engine->submit(second);
  s.run_all();
  EXPECT(s.events.at(1).reason == FinishReason::error);
  EXPECT(s.events.at(1).last.error_code == ErrorCode::internal);
  EXPECT(s.events.at(1).last.error_message.find("scripted failure") != std::string::npos);
  s.expect_same_as_alone(second);
  fail = 1;  // failures with a healthy step between them are single ones
  s.engine->submit(text_request(3, 5, 3));
  s.engine->submit(text_request(4, 5, 3));
  s.run_all();
  EXPECT(s.events.at(3).reason == FinishReason::error);
  s.expect_same_as_alone(text_request(4, 5, 3));
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("a second failing step in a row, or a lost device, ends the engine with answers for all") {
  for (bool device : {false, true}) {
    Setup s(Stepping::manual, {.max_batch_size = 1});
    s.model->on_forward = [device] {
      if (device) throw Error(ErrorCode::device_error, "scripted loss");
      throw std::bad_alloc();
    };
    for (RequestId id = 1; id <= 4; ++id) s.engine->submit(text_request(id, 5, 3));
    s.run_all();
    EXPECT_EQ(s.model->forwards, 0);
    EXPECT_EQ(s.events.num_ended(), size_t{4});
    const Event last = s.events.at(4).last;
    EXPECT(last.finish_reason == FinishReason::error);
    EXPECT(last.error_code == (device ? ErrorCode::device_error : ErrorCode::out_of_memory));
    EXPECT(last.error_message.find("opened again") != std::string::npos);
    s.model->on_forward = nullptr;
    s.engine->submit(text_request(5, 5, 3));
    s.run_all();
    EXPECT(s.events.at(5).reason == FinishReason::error);
    EXPECT_ERROR(s.engine->prompt_logits(text_request(6, 5, 3)), last.error_code);
    EXPECT_EQ(s.engine->stats().free_blocks, 64);
  }
}

TEST("a row that cannot be sampled ends with the reason, the rest of its batch goes on") {
  Setup s(Stepping::manual);
  Request bad = text_request(2, 5, 9);
  bad.sampling.seed = 77;
  const Request good[] = {text_request(1, 5, 9), text_request(3, 6, 9)};
  s.engine->submit(good[0]);
  s.engine->submit(bad);
  s.engine->submit(good[1]);
  EXPECT(s.engine->step());
  s.model->unsampled = 77;
  s.run_all();
  EXPECT(s.events.at(2).reason == FinishReason::error);
  EXPECT(s.events.at(2).last.error_message == "scripted row failure");
  for (const Request& request : good) s.expect_same_as_alone(request);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("an abort frees blocks in the next step, before anything runs") {
  Setup s(Stepping::manual);
  s.engine->submit(text_request(1, 8, 50));
  EXPECT(s.engine->step());
  s.engine->abort(1);
  s.engine->abort(1);
  s.engine->abort(12345);
  EXPECT(!s.engine->step());
  EXPECT(s.events.at(1).reason == FinishReason::abort);
  EXPECT_EQ(s.events.at(1).tokens.size(), size_t{1});
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("prompt logits are those of the first token, in chunks, and leave running requests alone") {
  Setup s(Stepping::manual);
  const Request running = text_request(1, 8, 12);
  s.engine->submit(running);
  EXPECT(s.engine->step());
  Request asked = image_request(2, 4);
  const std::vector<float> logits = s.engine->prompt_logits(asked);
  EXPECT_EQ(logits.size(), size_t{50});
  const TokenId first = expected_completion(asked, s.options.spec, s.max_tokens()).tokens[0];
  for (size_t i = 0; i < logits.size(); ++i) {
    EXPECT_EQ(logits[i], static_cast<TokenId>(i) == first ? 1.0F : 0.0F);
  }
  s.run_all();
  s.expect_same_as_alone(running);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
  asked.prompt_tokens.clear();
  EXPECT_ERROR(s.engine->prompt_logits(asked), ErrorCode::invalid_argument);
  EXPECT_ERROR(s.engine->prompt_logits(text_request(3, 128, 1)), ErrorCode::prompt_too_long);
}

TEST("prompt logits without free blocks are a typed error") {
  Setup s(Stepping::manual, {.spec = {.num_blocks = 8}, .max_prefill_token_num = 64});
  s.engine->submit(text_request(1, 28, 4));
  EXPECT(s.engine->step());
  EXPECT_ERROR(s.engine->prompt_logits(text_request(2, 8, 1)), ErrorCode::out_of_memory);
  s.run_all();
  EXPECT_EQ(s.engine->prompt_logits(text_request(2, 8, 1)).size(), size_t{50});
}

TEST("close is idempotent, aborts what is in flight, and later calls are refused") {
  Setup s(Stepping::manual);
  s.engine->submit(text_request(1, 8, 50));
  EXPECT(s.engine->step());
  s.engine->submit(text_request(2, 8, 50));
  s.engine->close();
  s.engine->close();
  EXPECT(s.events.at(1).reason == FinishReason::abort);
  EXPECT(s.events.at(2).reason == FinishReason::abort);
  EXPECT_ERROR(s.engine->submit(text_request(3, 8, 5)), ErrorCode::disposed);
  EXPECT_ERROR(s.engine->prompt_logits(text_request(3, 8, 5)), ErrorCode::disposed);
  s.engine->abort(1);
  EXPECT(!s.engine->step());
  EXPECT_EQ(s.engine->stats().running, 0);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("the engine thread wakes for each request and answers in order") {
  Setup s(Stepping::own_thread);
  for (RequestId id = 1; id <= 50; ++id) {
    const Request request = text_request(id, 1 + id % 20, 5);
    s.engine->submit(request);
    s.events.wait_for_end(id);  // idle before the next one
    s.expect_same_as_alone(request);
  }
  EXPECT(s.events.ordered());
}

TEST("several threads submit, abort and ask for stats and logits at once") {
  Setup s(Stepping::own_thread, {.spec = {.num_blocks = 40}});
  constexpr int kThreads = 4, kRequests = 100;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&s, t] {
      for (int i = 0; i < kRequests; ++i) {
        const auto id = static_cast<RequestId>(t * kRequests + i);
        s.engine->submit(text_request(id, 1 + i % 30, 1 + i % 17));
        if (i % 5 == 0) s.engine->abort(id);
        if (i % 7 == 0 && i >= 7) s.engine->abort(id - 7);
        if (i % 40 == 0) {
          try {
            (void)s.engine->prompt_logits(text_request(id, 4, 1));
          } catch (const Error& error) {
            TM_CHECK(error.code() == ErrorCode::out_of_memory, "%s", error.what());
          }
        }
        (void)s.engine->stats();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  size_t aborted = 0;
  for (RequestId id = 0; id < kThreads * kRequests; ++id) {
    s.events.wait_for_end(id);
    if (s.events.at(id).reason == FinishReason::abort) {
      ++aborted;
    } else {
      const int i = static_cast<int>(id) % kRequests;
      s.expect_same_as_alone(text_request(id, 1 + i % 30, 1 + i % 17));
    }
  }
  EXPECT(aborted <= kThreads * (20 + 14));
  EXPECT(s.events.ordered());
  s.engine->close();
  EXPECT_EQ(s.engine->stats().free_blocks, 40);
}

TEST("close while running ends every request once, also from several threads") {
  for (int round = 0; round < 20; ++round) {
    Setup s(Stepping::own_thread);
    for (RequestId id = 1; id <= 8; ++id) s.engine->submit(text_request(id, 10, 100));
    s.events.wait_for_tokens(1, static_cast<size_t>(round));
    std::thread other([&s] { s.engine->close(); });
    s.engine->close();
    other.join();
    EXPECT_EQ(s.events.num_ended(), size_t{8});
    EXPECT(s.events.ordered());
  }
}

TEST("a caller waiting for logits is answered when the engine closes") {
  Setup s(Stepping::own_thread);
  std::mutex gate;
  std::atomic<bool> entered{false};
  gate.lock();
  s.model->on_forward = [&] {
    entered = true;
    entered.notify_all();
    const std::lock_guard wait(gate);
  };
  s.engine->submit(text_request(1, 4, 50));
  entered.wait(false);  // the engine thread is inside a step
  std::atomic<bool> refused{false};
  std::atomic<bool> answered{false};
  std::thread asker([&] {
    try {
      (void)s.engine->prompt_logits(text_request(2, 4, 1));
      answered = true;
    } catch (const Error& error) {
      refused = error.code() == ErrorCode::disposed;
    }
  });
  std::thread closer([&] { s.engine->close(); });
  gate.unlock();
  asker.join();
  closer.join();
  EXPECT(refused || answered);
  EXPECT(s.events.ended(1));
}

TEST("destroying an engine closes it") {
  Setup s(Stepping::own_thread);
  s.engine->submit(text_request(1, 4, 100));
  s.events.wait_for_tokens(1, 1);
  s.engine.reset();
  EXPECT(s.events.at(1).reason == FinishReason::abort ||
         s.events.at(1).reason == FinishReason::length);
}

TEST_MAIN()
