// The engine around a scripted model: answers to bad requests, failing steps, prompt logits, and its
// thread under close, abort and concurrent callers.
#include "runtime/engine.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <mutex>
#include <random>
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
  bool known(RequestId id) {
    const std::lock_guard lock(mutex_);
    return answers_.known(id);
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
  bool asynchronous = false;  // the model runs ahead
};

struct Setup {
  explicit Setup(Stepping stepping, const Options& chosen = {}) : options(chosen) {
    auto fake = std::make_unique<FakeModel>(options.spec);
    model = fake.get();
    model->asynchronous = options.asynchronous;
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

TEST("a device that draws by itself is kept busy: the next step is launched before one is read") {
  Setup s(Stepping::manual, {.asynchronous = true});
  const Request requests[] = {text_request(1, 5, 40), text_request(2, 6, 60)};
  for (const Request& request : requests) s.engine->submit(request);
  s.run_all();
  for (const Request& request : requests) s.expect_same_as_alone(request);
  // All but the prefill, what waits for it, and the steps at which a request ends.
  EXPECT(s.model->launches_ahead >= 54);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
  EXPECT_EQ(s.engine->stats().completion_tokens, 100U);
}

TEST("an arrival, an abort, a stop and a row that needs the host end running ahead") {
  Setup s(Stepping::manual, {.asynchronous = true});
  const Request first = text_request(1, 5, 60);
  s.engine->submit(first);
  for (int i = 0; i < 10; ++i) EXPECT(s.engine->step());
  const int before = s.model->launches_ahead;
  EXPECT(before >= 8);
  Request penalised = text_request(2, 6, 12);  // not even beside one that could
  penalised.sampling.repetition_penalty = 1.5F;
  s.engine->submit(penalised);
  Request stopped = text_request(3, 6, 50);
  stopped.stop_token_ids = {expected_completion(stopped, s.options.spec, 128).tokens[20]};
  for (int i = 0; i < 10; ++i) EXPECT(s.engine->step());
  EXPECT(s.model->launches_ahead <= before + 1);
  s.engine->submit(stopped);
  s.engine->submit(text_request(4, 6, 50));
  for (int i = 0; i < 15; ++i) EXPECT(s.engine->step());
  s.engine->abort(4);
  s.run_all();
  EXPECT(s.events.at(4).reason == FinishReason::abort);
  for (const Request& request : {first, penalised, stopped}) s.expect_same_as_alone(request);
  EXPECT(s.model->launches_ahead > before + 10);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("running ahead gives every request what it gets alone: random schedules") {
  int launches_ahead = 0, aborted = 0, drafted = 0, logits = 0;
  uint64_t preemptions = 0;
  for (uint32_t seed = 1; seed <= 60; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&random](int n) {
      return static_cast<int>(random() % static_cast<uint32_t>(n));
    };
    Options options;
    options.spec.num_blocks = 10 + below(30);
    options.spec.loops = below(2) == 0;
    options.session_len = 40 + below(60);
    options.max_batch_size = 1 + below(5);
    options.max_prefill_token_num = 4 + below(12);
    options.max_drafts = below(3) == 0 ? 1 + below(7) : 0;
    options.asynchronous = true;
    Setup s(Stepping::manual, options);
    s.model->fed_rows_need_host = seed % 4 == 0;
    std::vector<Request> requests;
    for (RequestId id = 1; id <= 20; ++id) {
      Request request = text_request(id, 1 + below(12), 1 + below(40));
      if (below(4) == 0) request.stop_token_ids = {below(49), below(49), below(49)};
      request.min_new_tokens = below(2) * below(std::min(request.max_new_tokens, 10));
      if (below(8) == 0) request.sampling.repetition_penalty = 1.5F;
      if (below(6) == 0) add_image(request, 1 + below(2), static_cast<uint8_t>(id), options.spec);
      s.engine->submit(request);
      requests.push_back(request);
      for (int i = below(25); i > 0; --i) (void)s.engine->step();
      if (below(5) == 0) s.engine->abort(1 + static_cast<RequestId>(below(static_cast<int>(id))));
      if (below(10) == 0 && s.engine->stats().free_blocks > 2) {
        EXPECT_EQ(s.engine->prompt_logits(text_request(100, 4, 1)).size(), size_t{50});
        ++logits;
      }
    }
    s.run_all();
    for (const Request& request : requests) {
      const Answer answer = s.events.at(request.id);
      if (answer.reason == FinishReason::abort) {
        const Completion alone = expected_completion(request, options.spec, s.max_tokens());
        EXPECT(answer.tokens.size() <= alone.tokens.size());
        EXPECT(std::equal(answer.tokens.begin(), answer.tokens.end(), alone.tokens.begin()));
        ++aborted;
      } else {
        s.expect_same_as_alone(request);
      }
    }
    EXPECT(s.events.ordered());
    const EngineStats stats = s.engine->stats();
    EXPECT_EQ(stats.free_blocks, stats.total_blocks);
    launches_ahead += s.model->launches_ahead;
    preemptions += stats.preemptions;
    drafted += static_cast<int>(stats.drafted_tokens);
  }
  std::printf("    %d steps ahead, %d aborted, %d preemptions, %d drafts, %d logits\n",
              launches_ahead, aborted, static_cast<int>(preemptions), drafted, logits);
  EXPECT(launches_ahead >= 1000 && aborted >= 20 && preemptions >= 20 && drafted >= 100);
}

TEST("a step ahead that needs the host draws for those that have not ended") {
  Setup s(Stepping::manual, {.asynchronous = true});
  s.model->fed_rows_need_host = true;
  const Request lasting = text_request(1, 5, 30);
  Request stopped = text_request(2, 6, 50);
  stopped.stop_token_ids = {expected_completion(stopped, s.options.spec, 128).tokens[10]};
  s.engine->submit(lasting);
  s.engine->submit(stopped);
  s.run_all();
  for (const Request& request : {lasting, stopped}) s.expect_same_as_alone(request);
  EXPECT(s.model->launches_ahead >= 10);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("a step that fails while another runs ends their requests, and the engine goes on") {
  Setup s(Stepping::manual, {.asynchronous = true});
  s.engine->submit(text_request(1, 5, 40));
  for (int i = 0; i < 6; ++i) EXPECT(s.engine->step());
  EXPECT(s.model->launches_ahead >= 3);
  int fail = 1;
  s.model->on_forward = [&fail] {
    if (fail-- > 0) throw std::runtime_error("scripted failure");
  };
  s.run_all();
  EXPECT(s.events.at(1).reason == FinishReason::error);
  const Request second = text_request(2, 5, 30);
  s.engine->submit(second);
  s.run_all();
  s.expect_same_as_alone(second);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("a row that cannot be sampled while its next step runs ends alone") {
  Setup s(Stepping::manual, {.asynchronous = true});
  Request bad = text_request(2, 5, 30);
  bad.sampling.seed = 77;
  const Request good = text_request(1, 5, 30);
  s.engine->submit(good);
  s.engine->submit(bad);
  for (int i = 0; i < 8; ++i) EXPECT(s.engine->step());
  s.model->unsampled = 77;
  s.run_all();
  EXPECT(s.events.at(2).reason == FinishReason::error);
  s.expect_same_as_alone(good);
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
}

TEST("close ends a step that runs ahead") {
  for (Stepping stepping : {Stepping::manual, Stepping::own_thread}) {
    Setup s(stepping, {.asynchronous = true});
    s.engine->submit(text_request(1, 5, 100));
    if (stepping == Stepping::manual) {
      for (int i = 0; i < 6; ++i) EXPECT(s.engine->step());
    } else {
      s.events.wait_for_tokens(1, 5);
    }
    s.engine->close();
    EXPECT(s.events.ended(1));
    EXPECT_EQ(s.engine->stats().free_blocks, 64);
  }
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
      throw std::runtime_error("scripted failure");
    };
    for (RequestId id = 1; id <= 4; ++id) s.engine->submit(text_request(id, 5, 3));
    s.run_all();
    EXPECT_EQ(s.model->forwards, 0);
    EXPECT_EQ(s.events.num_ended(), size_t{4});
    const Event last = s.events.at(4).last;
    EXPECT(last.finish_reason == FinishReason::error);
    EXPECT(last.error_code == (device ? ErrorCode::device_error : ErrorCode::internal));
    EXPECT(last.error_message.find("opened again") != std::string::npos);
    s.model->on_forward = nullptr;
    s.engine->submit(text_request(5, 5, 3));
    s.run_all();
    EXPECT(s.events.at(5).reason == FinishReason::error);
    EXPECT_ERROR(s.engine->prompt_logits(text_request(6, 5, 3)), last.error_code);
    EXPECT_EQ(s.engine->stats().free_blocks, 64);
  }
}

TEST("a host without memory ends the requests of its steps, however many, and not the engine") {
  Setup s(Stepping::manual, {.max_batch_size = 1});
  s.model->on_forward = [] { throw std::bad_alloc(); };
  for (RequestId id = 1; id <= 4; ++id) s.engine->submit(text_request(id, 5, 3));
  s.run_all();
  for (RequestId id = 1; id <= 4; ++id) {
    EXPECT(s.events.at(id).last.error_code == ErrorCode::out_of_memory);
    EXPECT(s.events.at(id).last.error_message.find("opened again") == std::string::npos);
  }
  s.model->on_forward = nullptr;
  s.engine->submit(text_request(5, 5, 3));
  s.run_all();
  s.expect_same_as_alone(text_request(5, 5, 3));
  EXPECT_EQ(s.engine->stats().free_blocks, 64);
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

Request guided_request(RequestId id, int prompt_len, int max_new_tokens) {
  Request request = text_request(id, prompt_len, max_new_tokens);
  request.guided = true;
  return request;
}

// A mask of a few tokens that depends on request and index.
std::vector<uint32_t> mask_of(RequestId id, uint32_t idx) {
  std::vector<uint32_t> mask(2, 0);
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t token = (static_cast<uint32_t>(id) * 7 + idx * 11 + i * 5) % 49;
    mask[token / 32] |= 1U << (token % 32);
  }
  return mask;
}

bool allows(const std::vector<uint32_t>& mask, TokenId token) {
  return (mask[static_cast<size_t>(token) / 32] >> (token % 32) & 1) != 0;
}

TEST("a guided request whose masks are there in time loses no step to them") {
  Setup s(Stepping::manual);
  s.engine->submit(guided_request(1, 12, 5));
  s.engine->submit(text_request(2, 3, 8));
  s.engine->set_mask(1, 0, mask_of(1, 0));
  // later ones arrive while the forward runs
  s.model->on_forward = [&] {
    if (!s.events.known(1)) return;
    const auto idx = static_cast<uint32_t>(s.events.at(1).tokens.size());
    s.engine->set_mask(1, idx, mask_of(1, idx));
  };
  s.run_all();
  const Answer answer = s.events.at(1);
  EXPECT_EQ(answer.tokens.size(), size_t{5});
  for (uint32_t i = 0; i < 5; ++i) EXPECT(allows(mask_of(1, i), answer.tokens[i]));
  s.expect_same_as_alone(text_request(2, 3, 8));
  EXPECT_EQ(s.model->forwards, int64_t{9});  // two for the prompts, the other's seven tokens
}

TEST("a late mask holds up its own request only, and changes nothing in what it draws") {
  std::vector<TokenId> tokens[2];
  for (const bool late : {false, true}) {
    Setup s(Stepping::manual);
    const Request free = text_request(2, 9, 30);
    s.engine->submit(guided_request(1, 19, 6));
    s.engine->submit(free);
    uint32_t said = 0;
    for (int step = 0; s.engine->step() || !s.events.ended(1); ++step) {
      const auto idx = static_cast<uint32_t>(s.events.known(1) ? s.events.at(1).tokens.size() : 0);
      if (said > idx || (late && step % 4 != 3)) continue;
      s.engine->set_mask(1, idx, mask_of(1, idx));
      said = idx + 1;
    }
    tokens[late ? 1 : 0] = s.events.at(1).tokens;
    EXPECT(s.events.at(1).reason == FinishReason::length);
    s.expect_same_as_alone(free);
    EXPECT_EQ(s.engine->stats().free_blocks, s.options.spec.num_blocks);
  }
  EXPECT(tokens[0] == tokens[1]);
  EXPECT_EQ(tokens[0].size(), size_t{6});
}

TEST("a mask of nothing allows everything; what is not about the next token is passed over") {
  Setup s(Stepping::manual);
  const Request request = guided_request(1, 6, 4);
  s.engine->submit(request);
  s.engine->set_mask(7, 0, mask_of(1, 0));  // nobody's
  s.engine->set_mask(1, 3, mask_of(1, 0));  // not next
  EXPECT(s.engine->step());                 // parks it
  EXPECT(!s.engine->step());                // nothing to run: it waits
  EXPECT(!s.events.known(1));
  EXPECT_EQ(s.engine->stats().running, 1);
  for (uint32_t i = 0; i < 4; ++i) {
    s.engine->set_mask(1, i, std::nullopt);
    EXPECT(s.engine->step());
  }
  Request plain = request;
  plain.guided = false;
  s.expect_same_as_alone(plain);
}

TEST("a parked request can be aborted, preempted and closed") {
  {
    Setup s(Stepping::manual);
    s.engine->submit(guided_request(1, 6, 4));
    s.run_all();
    s.engine->abort(1);
    s.run_all();
    EXPECT(s.events.at(1).reason == FinishReason::abort);
    EXPECT_EQ(s.engine->stats().free_blocks, s.options.spec.num_blocks);
  }
  {
    Options options;
    options.spec.num_blocks = 8;  // 32 tokens
    Setup s(Stepping::manual, options);
    const Request free = text_request(1, 6, 20);
    s.engine->submit(free);
    s.engine->submit(guided_request(2, 9, 3));
    while (!s.events.ended(1)) s.engine->step();
    EXPECT(s.engine->stats().preemptions > 0);  // the parked one gave its blocks
    for (uint32_t i = 0; i < 3; ++i) {
      s.engine->set_mask(2, i, mask_of(2, i));
      s.run_all();
    }
    s.expect_same_as_alone(free);
    for (uint32_t i = 0; i < 3; ++i) EXPECT(allows(mask_of(2, i), s.events.at(2).tokens[i]));
    EXPECT(s.events.at(2).reason == FinishReason::length);
  }
  {
    Setup s(Stepping::own_thread);
    s.engine->submit(guided_request(1, 6, 4));
    s.engine->submit(text_request(2, 6, 4));
    s.events.wait_for_end(2);
    s.engine->close();
    EXPECT(s.events.at(1).reason == FinishReason::abort);
  }
}

TEST("masks from another thread reach a running engine") {
  Setup s(Stepping::own_thread);
  for (RequestId id = 1; id <= 4; ++id) s.engine->submit(guided_request(id, 5 + int(id), 12));
  s.engine->submit(text_request(5, 7, 60));
  for (uint32_t i = 0; i < 12; ++i) {
    for (RequestId id = 1; id <= 4; ++id) {
      s.events.wait_for_tokens(id, i);
      s.engine->set_mask(id, i, mask_of(id, i));
    }
  }
  for (RequestId id = 1; id <= 5; ++id) s.events.wait_for_end(id);
  s.expect_same_as_alone(text_request(5, 7, 60));
  for (RequestId id = 1; id <= 4; ++id) {
    const Answer answer = s.events.at(id);
    for (uint32_t i = 0; i < 12; ++i) EXPECT(allows(mask_of(id, i), answer.tokens[i]));
  }
  EXPECT(s.events.ordered());
}

// Answers every offer by what `edit` makes of it.
struct Editor {
  Setup& s;
  std::function<void(uint32_t, std::vector<float>&)> edit;
  int num_offers = 0;
  void run(RequestId id) {
    uint32_t answered = 0;
    while (s.engine->step() || !s.events.ended(id)) {
      const Answer answer = s.events.known(id) ? s.events.at(id) : Answer{};
      if (!answer.last.offer || answer.last.offer->completion_idx < answered) continue;
      std::vector<float> logits = answer.last.offer->logits;
      EXPECT_EQ(answer.last.offer->completion_idx, static_cast<uint32_t>(answer.tokens.size()));
      edit(answered, logits);
      s.engine->set_logits(id, answered++, std::move(logits));
      ++num_offers;
    }
  }
};

TEST("edited logits decide the token, without another forward") {
  Setup s(Stepping::manual);
  Request request = text_request(1, 20, 5);
  request.edits_logits = true;
  const Request free = text_request(2, 4, 30);
  s.engine->submit(request);
  s.engine->submit(free);
  Editor editor{s, [](uint32_t idx, std::vector<float>& logits) { logits[idx + 3] += 50.0F; }};
  editor.run(1);
  EXPECT(s.events.at(1).tokens == (std::vector<TokenId>{3, 4, 5, 6, 7}));
  EXPECT_EQ(editor.num_offers, 5);
  s.expect_same_as_alone(free);

  Setup alone(Stepping::manual);
  alone.engine->submit(request);
  Editor same{alone, [](uint32_t, std::vector<float>&) {}};
  same.run(1);
  alone.expect_same_as_alone(request);               // what is not changed is drawn as ever
  EXPECT_EQ(alone.model->forwards, int64_t{3 + 4});  // 20 prompt tokens by 8, then one a token
}

TEST("bad edits end their own request, a wrong number of them is refused") {
  Setup s(Stepping::manual);
  Request request = text_request(1, 4, 5);
  request.edits_logits = true;
  s.engine->submit(request);
  s.run_all();
  try {
    s.engine->set_logits(1, 0, std::vector<float>(49));
    EXPECT(!"an error was expected");
  } catch (const Error& error) {
    EXPECT(error.code() == ErrorCode::invalid_argument);
  }
  s.engine->set_logits(1, 0, std::vector<float>(50, std::numeric_limits<float>::quiet_NaN()));
  s.run_all();
  EXPECT(s.events.at(1).reason == FinishReason::error);
  EXPECT(s.events.at(1).last.error_code == ErrorCode::invalid_argument);
  EXPECT_EQ(s.engine->stats().free_blocks, s.options.spec.num_blocks);
}

TEST("edited logits obey the mask, whichever comes first, also after a preemption") {
  for (const bool mask_first : {true, false}) {
    Options options;
    options.spec.num_blocks = 8;
    Setup s(Stepping::manual, options);
    Request request = guided_request(2, 9, 3);
    request.edits_logits = true;
    s.engine->submit(text_request(1, 6, 20));
    s.engine->submit(request);
    s.engine->step();
    s.engine->step();
    EXPECT(s.events.at(2).last.offer != nullptr);
    if (!mask_first) s.engine->set_logits(2, 0, std::vector<float>(50, 1.0F));
    if (mask_first) s.engine->set_mask(2, 0, mask_of(2, 0));
    while (!s.events.ended(1)) s.engine->step();
    EXPECT(s.engine->stats().preemptions > 0);
    EXPECT(s.events.at(2).tokens.empty());
    if (mask_first) s.engine->set_logits(2, 0, std::vector<float>(50, 1.0F));
    if (!mask_first) s.engine->set_mask(2, 0, mask_of(2, 0));
    s.run_all();
    EXPECT_EQ(s.events.at(2).tokens.size(), size_t{1});
    EXPECT(allows(mask_of(2, 0), s.events.at(2).tokens[0]));
    EXPECT_EQ(s.events.at(2).last.offer->completion_idx, 1U);  // the first was not offered twice
  }
}

Request output_request(RequestId id, int prompt_len, int max_new, OutputSpec outputs) {
  Request request = text_request(id, prompt_len, max_new);
  request.outputs = outputs;
  return request;
}

TEST("outputs hold each position once: chunks, decode rows and preemptions change nothing") {
  for (const int num_blocks : {64, 12}) {
    Options options;
    options.spec.num_blocks = num_blocks;
    Setup s(Stepping::manual, options);
    s.engine->submit(text_request(1, 4, 25));
    const Request all =
        output_request(2, 18, 6, {.logits = OutputRange::all, .hidden_states = OutputRange::all});
    const Request late = output_request(
        3, 10, 6, {.logits = OutputRange::generation, .hidden_states = OutputRange::generation});
    s.engine->submit(all);
    s.engine->submit(late);
    s.run_all();
    s.expect_same_as_alone(all);
    s.expect_same_as_alone(late);
    EXPECT((s.engine->stats().preemptions > 0) == (num_blocks == 12));
    for (const Request* request : {&all, &late}) {
      const Answer answer = s.events.at(request->id);
      const auto outputs = answer.last.outputs;
      std::vector<TokenId> tokens = request->prompt_tokens;
      tokens.insert(tokens.end(), answer.tokens.begin(), answer.tokens.end());
      const size_t first = request == &all ? 0 : request->prompt_tokens.size() - 1;
      const size_t rows = tokens.size() - 1 - first;
      EXPECT_EQ(outputs->logits.size(), rows * 50);
      EXPECT_EQ(outputs->hidden_states.size(), rows * 2);
      for (size_t r = 0; r < rows; ++r) {
        EXPECT_EQ(outputs->hidden_states[2 * r], static_cast<float>(first + r));
        EXPECT_EQ(outputs->hidden_states[2 * r + 1], static_cast<float>(tokens[first + r]));
        if (first + r + 1 < request->prompt_tokens.size()) continue;
        EXPECT_EQ(outputs->logits[r * 50 + static_cast<size_t>(tokens[first + r + 1])], 1.0F);
      }
    }
    EXPECT(s.events.at(1).last.outputs == nullptr);
  }
}

TEST("a request for its prompt alone ends without tokens: pooled states, likelihood") {
  Setup s(Stepping::manual);
  s.engine->submit(output_request(1, 21, 0, {.pooling = Pooling::mean, .prompt_nll = true}));
  s.engine->submit(output_request(2, 5, 0, {.pooling = Pooling::last}));
  s.engine->submit(output_request(3, 1, 0, {.prompt_nll = true}));
  s.engine->submit(text_request(4, 5, 5));
  s.run_all();
  const Answer mean = s.events.at(1);
  EXPECT(mean.tokens.empty());
  EXPECT(mean.reason == FinishReason::length);
  const Request request = text_request(1, 21, 0);
  double sum = 0;
  for (TokenId token : request.prompt_tokens) sum += token;
  EXPECT_NEAR(mean.last.outputs->pooled[0], 10.0, 1e-12);  // positions 0 to 20
  EXPECT_NEAR(mean.last.outputs->pooled[1], sum / 21, 1e-12);
  // Scripted logits are 1 for one token and 0 for 49: log(49 + e) less 1 or 0.
  EXPECT_EQ(mean.last.outputs->num_nll_tokens, 20);
  const double normalizer = std::log(49.0 + std::exp(1.0));
  const double hits = (20 * normalizer - mean.last.outputs->nll);
  EXPECT_NEAR(hits, std::round(hits), 1e-4);
  const Answer last = s.events.at(2);
  EXPECT_EQ(last.last.outputs->pooled[0], 4.0);
  EXPECT_EQ(s.events.at(3).last.outputs->num_nll_tokens, 0);
  s.expect_same_as_alone(text_request(4, 5, 5));
  EXPECT_EQ(s.engine->stats().free_blocks, s.options.spec.num_blocks);
}

TEST("outputs that cannot be held are refused with the numbers") {
  const auto bad = ErrorCode::invalid_argument;
  expect_refused(output_request(1, 5, 10'000'000, {.logits = OutputRange::generation}), bad,
                 "outputLogits of up to 10000000 positions of 50 numbers");
  expect_refused(output_request(1, 5, 200'000'000, {.hidden_states = OutputRange::all}), bad,
                 "outputLastHiddenState of up to 200000004 positions of 2 numbers");
  Request guided = output_request(1, 5, 0, {.prompt_nll = true});
  guided.guided = true;
  expect_refused(guided, bad, "maxNewTokens is 0");
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
