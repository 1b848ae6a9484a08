// The whole native stack below the addon, with a tiny random model: every request's tokens and
// log-probabilities must be the same bits alone and in any company, for any chunk size, number of
// threads and preemption.
#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "each_backend.h"
#include "runtime/engine_core.h"
#include "runtime/loaded_model.h"
#include "test.h"
#include "tiny_checkpoint.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

struct Run {
  std::string isa{};  // a cap; "": the machine's best
  int threads = 1;
  int max_batch_size = 8;
  int max_prefill_token_num = 512;
  int block_size = 64;
  int num_blocks = 0;  // 0: as planned
  int max_drafts = 0;
  int num_swap_blocks = 0;
};

EngineOptions options_of(const TinyCheckpoint& checkpoint, const Run& run) {
  EngineOptions options;
  options.spec = checkpoint.spec;
  options.files = checkpoint.files;
  options.session_len = 256;
  options.max_batch_size = run.max_batch_size;
  options.max_prefill_token_num = run.max_prefill_token_num;
  options.block_size = run.block_size;
  options.cache.share = 0.5;
  options.max_drafts = run.max_drafts;
  options.cache.swap_bytes = size_t{4096} * 1024 * static_cast<size_t>(run.num_swap_blocks);
  return options;
}

Request make_request(RequestId id, int prompt_len, int num_tiles, const ModelSpec& spec) {
  Request request;
  request.id = id;
  std::mt19937 random(static_cast<uint32_t>(id));
  const auto text = [&](int count) {
    for (int i = 0; i < count; ++i) {
      request.prompt_tokens.push_back(static_cast<TokenId>(random() % 190));
    }
  };
  text(prompt_len / 2);
  if (num_tiles > 0) {
    auto tiles = std::make_shared<image::ImageTiles>();
    tiles->num_tiles = num_tiles;
    tiles->tile_size = spec.vision->image_size;
    tiles->pixels.resize(static_cast<size_t>(num_tiles * tiles->tile_size * tiles->tile_size * 3));
    for (uint8_t& pixel : tiles->pixels) pixel = static_cast<uint8_t>(random());
    const int count = num_tiles * spec.vision->tokens_per_tile();
    request.images.push_back({tiles, static_cast<int>(request.prompt_tokens.size()), count});
    request.prompt_tokens.insert(request.prompt_tokens.end(), static_cast<size_t>(count),
                                 spec.image_token_id);
  }
  text(prompt_len - prompt_len / 2);
  request.max_new_tokens = 30 + static_cast<int>(id) * 3;
  request.sampling.num_logprobs = 2;
  if (id % 2 == 0) {
    request.sampling.do_sample = true;
    request.sampling.temperature = 1.5F;
    request.sampling.top_k = 60;
    request.sampling.top_p = 0.95F;
    request.sampling.seed = id * 7919;
  }
  if (id % 3 == 0) request.sampling.repetition_penalty = 1.2F;
  return request;
}

std::vector<Request> make_requests(const ModelSpec& spec) {
  return {make_request(1, 1, 0, spec), make_request(2, 64, 0, spec),  make_request(3, 65, 1, spec),
          make_request(4, 7, 3, spec), make_request(5, 130, 0, spec), make_request(6, 20, 2, spec),
          make_request(7, 63, 0, spec)};
}

struct Line {
  std::vector<TokenId> tokens;
  std::vector<float> logprobs;
  bool operator==(const Line&) const = default;
};

struct Outcome {
  std::map<RequestId, Line> lines;
  EngineStats stats;
};

Outcome run(const TinyCheckpoint& checkpoint, const std::vector<Request>& requests,
            const Run& how) {
  EngineParts parts =
      load_model(options_of(checkpoint, how), make_cpu_backend(how.isa, how.threads), nullptr);
  if (how.num_blocks > 0) parts.memory.num_blocks = how.num_blocks;
  parts.measure_drafts = false;
  Outcome outcome;
  const EventSink sink = [&outcome](const std::vector<Event>& events) {
    for (const Event& event : events) {
      EXPECT(event.finish_reason != FinishReason::error);
      if (event.finish_reason == FinishReason::error)
        std::printf("    %s\n", event.error_message.c_str());
      Line& line = outcome.lines[event.id];
      for (const TokenEvent& token : event.tokens) {
        line.tokens.push_back(token.token);
        line.logprobs.push_back(token.logprob);
        for (const auto& [id, logprob] : token.top_logprobs) line.logprobs.push_back(logprob);
      }
    }
  };
  const std::unique_ptr<Engine> engine = make_engine(std::move(parts), sink, Stepping::manual);
  // Requests join while others run.
  for (const Request& request : requests) {
    engine->submit(request);
    for (int i = 0; i < 3; ++i) engine->step();
  }
  while (engine->step()) {
  }
  outcome.stats = engine->stats();
  EXPECT_EQ(outcome.stats.free_swap_blocks, outcome.stats.swap_blocks);
  EXPECT_EQ(outcome.stats.free_blocks, outcome.stats.total_blocks);
  return outcome;
}

Outcome run_alone(const TinyCheckpoint& checkpoint, const std::vector<Request>& requests,
                  const std::string& isa) {
  Outcome all;
  for (const Request& request : requests) {
    all.lines.merge(run(checkpoint, {request}, {.isa = isa, .max_batch_size = 1}).lines);
  }
  return all;
}

void expect_equal(const Outcome& got, const Outcome& expected, const char* what) {
  const bool equal = got.lines == expected.lines;
  EXPECT(equal);
  if (equal) return;
  for (const auto& [id, line] : expected.lines) {
    const auto found = got.lines.find(id);
    if (found == got.lines.end() || !(found->second == line)) {
      std::printf("    %s: request %d differs\n", what, static_cast<int>(id));
    }
  }
}

void expect_same_bits(QuantMethod method, const std::string& isa) {
  const TinyCheckpoint checkpoint(method);
  const std::vector<Request> requests = make_requests(checkpoint.spec);
  const Outcome alone = run_alone(checkpoint, requests, isa);
  for (const Request& request : requests) {
    EXPECT_EQ(alone.lines.at(request.id).tokens.size(),
              static_cast<size_t>(request.max_new_tokens));
  }
  for (int threads = 1; threads <= 3; ++threads) {
    expect_equal(run(checkpoint, requests, {.isa = isa, .threads = threads}), alone, "threads");
  }
  for (int chunk : {1, 7, 64}) {
    expect_equal(
        run(checkpoint, requests, {.isa = isa, .threads = 2, .max_prefill_token_num = chunk}),
        alone, "chunk");
  }
  for (int chunk : {7, 512}) {
    const Outcome preempted = run(checkpoint, requests,
                                  {.isa = isa,
                                   .threads = 2,
                                   .max_prefill_token_num = chunk,
                                   .block_size = 16,
                                   .num_blocks = 12});
    EXPECT(preempted.stats.preemptions >= 1);
    EXPECT_EQ(preempted.stats.swaps_out, 0U);
    expect_equal(preempted, alone, "preemption");
    const Outcome swapped = run(checkpoint, requests,
                                {.isa = isa,
                                 .threads = 2,
                                 .max_prefill_token_num = chunk,
                                 .block_size = 16,
                                 .num_blocks = 12,
                                 .num_swap_blocks = 64});
    EXPECT(swapped.stats.swaps_in >= 1);
    expect_equal(swapped, alone, "preemption to host memory");
  }
}

// Prompts of repeated phrases, so that there is something to draft from the first token on.
std::vector<Request> make_repetitive_requests(const ModelSpec& spec) {
  std::vector<Request> requests = make_requests(spec);
  for (Request& request : requests) {
    std::vector<TokenId>& prompt = request.prompt_tokens;
    for (int i = 0; i < 30; ++i) prompt.push_back(static_cast<TokenId>(11 + i % 6));
    if (request.id == 4) request.sampling.temperature = 0.05F;
    if (request.id == 7) {
      request.sampling.bad_words = {{12, 13}, {100}};
      request.stop_token_ids = {17, 18, 19, 20};
      request.min_new_tokens = 25;
    }
  }
  return requests;
}

void expect_drafts_change_nothing(QuantMethod method, const std::string& isa) {
  const TinyCheckpoint checkpoint(method);
  const std::vector<Request> requests = make_repetitive_requests(checkpoint.spec);
  const Outcome plain = run(checkpoint, requests, {.isa = isa, .threads = 2});
  EXPECT_EQ(plain.stats.drafted_tokens, 0U);
  for (int max_drafts : {1, 3, 7}) {
    const Outcome drafted =
        run(checkpoint, requests, {.isa = isa, .threads = 2, .max_drafts = max_drafts});
    expect_equal(drafted, plain, "drafts");
    EXPECT(drafted.stats.accepted_tokens > 0);
    EXPECT(drafted.stats.drafted_tokens > drafted.stats.accepted_tokens);
    EXPECT(drafted.stats.steps < plain.stats.steps);
  }
  const Outcome preempted = run(checkpoint, requests,
                                {.isa = isa,
                                 .threads = 2,
                                 .max_prefill_token_num = 64,
                                 .block_size = 16,
                                 .num_blocks = 16,
                                 .max_drafts = 7});
  EXPECT(preempted.stats.preemptions >= 1);
  EXPECT(preempted.stats.accepted_tokens > 0);
  expect_equal(preempted, plain, "drafts and preemption");
}

}  // namespace

// Each instruction set has bits of its own; what must agree is every way to run on one of them. The
// scalar loops are slow and get a smaller case.
std::vector<std::string> fast_isas() {
  std::vector<std::string> names = cpu_isas();
  std::erase(names, "scalar");
  return names;
}

TEST("bf16: the same bits alone and in any batch, chunk, thread count and preemption") {
  for (const std::string& isa : fast_isas()) expect_same_bits(QuantMethod::none, isa);
}

TEST("awq: the same bits alone and in any batch, chunk, thread count and preemption") {
  for (const std::string& isa : fast_isas()) expect_same_bits(QuantMethod::awq, isa);
}

TEST("drafts change neither tokens nor log probabilities: greedy, sampled, penalised, with bans") {
  for (const std::string& isa : fast_isas()) {
    expect_drafts_change_nothing(QuantMethod::none, isa);
    expect_drafts_change_nothing(QuantMethod::awq, isa);
  }
}

TEST("the scalar kernels, too, give the same bits in a batch of chunks as alone") {
  const TinyCheckpoint checkpoint(QuantMethod::awq);
  std::vector<Request> requests = {make_request(1, 3, 0, checkpoint.spec),
                                   make_request(2, 9, 1, checkpoint.spec)};
  for (Request& request : requests) request.max_new_tokens = 3;
  const Outcome batch =
      run(checkpoint, requests, {.isa = "scalar", .threads = 2, .max_prefill_token_num = 4});
  expect_equal(batch, run_alone(checkpoint, requests, "scalar"), "scalar");
}

TEST(
    "images and prompts matter: other pixels, other logits; prompt logits choose the first token") {
  const TinyCheckpoint checkpoint(QuantMethod::none);
  const Run how{.max_prefill_token_num = 16};
  Request request = make_request(1, 20, 2, checkpoint.spec);
  const Outcome alone = run(checkpoint, {request}, how);
  EngineParts parts = load_model(options_of(checkpoint, how), make_cpu_backend("", 2), nullptr);
  const std::unique_ptr<Engine> engine = make_engine(
      std::move(parts), [](const std::vector<Event>&) {}, Stepping::own_thread);
  const std::vector<float> logits = engine->prompt_logits(request);
  EXPECT_EQ(logits.size(), static_cast<size_t>(checkpoint.spec.decoder.vocab_size));
  const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
  EXPECT_EQ(static_cast<TokenId>(best), alone.lines.at(1).tokens[0]);
  EXPECT(engine->prompt_logits(request) == logits);
  auto other = std::make_shared<image::ImageTiles>(*request.images[0].tiles);
  for (uint8_t& pixel : other->pixels) pixel = static_cast<uint8_t>(255 - pixel);
  request.images[0].tiles = other;
  EXPECT(engine->prompt_logits(request) != logits);
}

TEST("loading reports progress up to 1 and the sizes of what it took") {
  const TinyCheckpoint checkpoint(QuantMethod::awq);
  std::vector<double> shares;
  const EngineParts parts = load_model(options_of(checkpoint, {}), make_cpu_backend("", 1),
                                       [&shares](double share) { shares.push_back(share); });
  EXPECT(shares.size() > 5);
  EXPECT(std::is_sorted(shares.begin(), shares.end()));
  EXPECT_NEAR(shares.back(), 1.0, 1e-9);
  EXPECT(parts.stats.weight_bytes > 100000);
  EXPECT(parts.stats.kv_cache_bytes > 0 && parts.stats.workspace_bytes > 0);
  EXPECT(parts.stats.load_ms > 0);
  EXPECT_EQ(parts.memory.num_blocks, 8 * 4);
}

TEST("a session longer than the model's positions and a missing tensor are typed errors") {
  TinyCheckpoint checkpoint(QuantMethod::none);
  EngineOptions options = options_of(checkpoint, {});
  options.session_len = 513;
  EXPECT_ERROR(load_model(options, make_cpu_backend("", 1), nullptr), ErrorCode::invalid_argument);
  options.session_len = 0;
  EXPECT_EQ(load_model(options, make_cpu_backend("", 1), nullptr).session_len, 512);
  options.cache.share = 1e-12;
  EXPECT_ERROR(load_model(options, make_cpu_backend("", 1), nullptr), ErrorCode::out_of_memory);
  options = options_of(checkpoint, {});
  options.files.tensors.erase(options.files.tensors.begin() + 3);
  EXPECT_ERROR(load_model(options, make_cpu_backend("", 1), nullptr), ErrorCode::missing_tensor);
}

TEST_MAIN()
