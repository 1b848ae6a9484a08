// The sampler: worked examples, filters against a plain sort in float64, reproducible draws, and
// the distribution of many draws.
#include "backend/host_sampler.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "test.h"

using namespace turbomind;

namespace {

struct Outcome {
  SampleStatus status;
  SampleResult result;
};

Outcome draw(std::vector<float> logits, const SamplingParams& params,
             const std::vector<TokenId>& tokens = {}, uint32_t index = 0,
             const std::vector<TokenId>& banned = {}) {
  static HostSampler sampler;  // reused: scratch must not carry anything over
  SampleRow row{.params = &params, .tokens = tokens, .banned = banned, .completion_idx = index};
  Outcome outcome;
  outcome.status = sampler.sample(logits, row, outcome.result);
  return outcome;
}

TokenId token(const std::vector<float>& logits, const SamplingParams& params,
              const std::vector<TokenId>& tokens = {}, uint32_t index = 0,
              const std::vector<TokenId>& banned = {}) {
  return draw(logits, params, tokens, index, banned).result.token;
}

std::vector<float> random_logits(size_t vocab, uint32_t seed, float spread) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, spread);
  std::vector<float> logits(vocab);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// The tokens that may be drawn, by a full sort in float64.
std::set<TokenId> allowed(const std::vector<float>& logits, const SamplingParams& params) {
  std::vector<TokenId> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](TokenId a, TokenId b) { return logits[a] > logits[b]; });
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < order.size()) {
    order.resize(params.top_k);
  }
  const double max = logits[order[0]];
  const auto share = [&](TokenId id) {
    return std::exp((logits[id] - max) / static_cast<double>(params.temperature));
  };
  double total = 0;
  for (TokenId id : order) total += share(id);
  std::set<TokenId> kept;
  double mass = 0;
  for (TokenId id : order) {
    if (!kept.empty() && (mass >= params.top_p * total || share(id) < params.min_p)) break;
    kept.insert(id);
    mass += share(id);
  }
  return kept;
}

}  // namespace

TEST("greedy takes the largest logit, and the lowest id among equals") {
  const SamplingParams greedy;
  EXPECT_EQ(token({0.5F, 2.0F, -1.0F, 2.0F}, greedy), 1);
  std::vector<float> wide(1000, -3.0F);
  wide[999] = wide[130] = 4.0F;
  EXPECT_EQ(token(wide, greedy), 130);
  EXPECT_EQ(token({-INFINITY, -5.0F}, greedy), 1);
  EXPECT_EQ(token({7.0F}, greedy), 0);
}

TEST("the repetition penalty divides positive and multiplies negative logits, once a token") {
  SamplingParams params;
  params.repetition_penalty = 2.0F;
  EXPECT_EQ(token({3.0F, 2.0F, 0.0F}, params, {0, 0, 0}), 1);  // 3 -> 1.5 < 2
  EXPECT_EQ(token({5.0F, 2.0F, 0.0F}, params, {0, 0, 0}), 0);  // 5 -> 2.5, not 0.6
  EXPECT_EQ(token({-1.0F, -1.5F}, params, {0}), 1);            // -1 -> -2
  EXPECT_EQ(token({3.0F, 2.0F}, params, {0, -4, 99}), 1);      // ids outside are passed over
  EXPECT_EQ(token({3.0F, 2.0F}, params, {}), 0);               // nothing is left over
}

TEST("bans: single tokens, this step's extra ones, and the last token of a begun bad word") {
  SamplingParams params;
  params.bad_words = {{3}, {5, 6, 2}, {}};
  const std::vector<float> logits = {0.0F, 1.0F, 2.0F, 3.0F};
  EXPECT_EQ(token(logits, params), 2);
  EXPECT_EQ(token(logits, params, {9, 5, 6}), 1);  // 2 would complete 5 6 2
  EXPECT_EQ(token(logits, params, {5, 6, 9}), 2);
  EXPECT_EQ(token(logits, params, {6}), 2);  // shorter than the word's beginning
  EXPECT_EQ(token(logits, params, {5, 6}, 0, {1}), 0);
  params.bad_words = {{0}, {1}, {2}, {3}};
  const Outcome none = draw(logits, params);
  EXPECT(none.status == SampleStatus::all_banned);
  EXPECT_EQ(none.result.token, -1);
}

TEST("frequency and presence penalty count the completion, not the prompt") {
  SamplingParams params;
  params.frequency_penalty = 0.75F;
  const std::vector<float> logits = {3.0F, 2.0F, 0.0F};
  // tokens 0 0 | 0: the prompt's two do not count
  EXPECT_EQ(token(logits, params, {0, 0, 0}, 1), 0);  // 3 - 0.75
  EXPECT_EQ(token(logits, params, {0, 0, 0}, 2), 1);  // 3 - 1.5
  params.frequency_penalty = 0.0F;
  params.presence_penalty = 0.75F;
  EXPECT_EQ(token(logits, params, {0, 0, 0}, 3), 0);  // once, however often it was said
  params.presence_penalty = 1.5F;
  EXPECT_EQ(token(logits, params, {0, 0, 0}, 1), 1);
  EXPECT_EQ(token(logits, params, {0, 0, 0}, 0), 0);
  params.presence_penalty = -2.0F;  // negative ones encourage
  EXPECT_EQ(token(logits, params, {1, -4, 99}, 3), 1);
  EXPECT_EQ(token(logits, {}, {1, 1}, 2), 0);  // nothing is left over
}

TEST("a bias is added after the penalties and loses to a ban; a mask leaves what it holds") {
  SamplingParams params;
  params.logit_bias = {{2, 2.5F}, {77, 9.0F}};
  const std::vector<float> logits = {1.0F, 2.0F, 0.0F};
  EXPECT_EQ(token(logits, params), 2);
  params.repetition_penalty = 2.0F;  // a biased 2.5 would become 1.25
  EXPECT_EQ(token(logits, params, {2}), 2);
  params.bad_words = {{2}};
  EXPECT_EQ(token(logits, params), 1);
  params = {};
  const std::vector<float> wide = random_logits(70, 3, 1.0F);
  const auto masked = [&](std::vector<uint32_t> allowed) {
    std::vector<float> copy = wide;
    HostSampler sampler;
    SampleResult result;
    const SampleRow row{.params = &params, .tokens = {}, .banned = {}, .allowed = allowed};
    const SampleStatus status = sampler.sample(copy, row, result);
    EXPECT((status == SampleStatus::ok) == (result.token >= 0));
    return result.token;
  };
  EXPECT_EQ(masked({~0U, ~0U, ~0U}), token(wide, {}));
  EXPECT_EQ(masked({0, 0, 1U << 5}), 69);
  EXPECT_EQ(masked({1U << 31}), 31);       // ids past the mask's end are not allowed
  EXPECT_EQ(masked({0, 0, 1U << 6}), -1);  // bit 70 is no token
  params.logit_bias = {{40, 100.0F}};
  EXPECT_EQ(masked({1U << 3}), 3);
}

// One row of random parameters against the order of host_sampler.h in float64.
TEST("random penalties, biases, bans and masks agree with the formulas in float64") {
  std::mt19937 random(11);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  HostSampler sampler;
  for (int round = 0; round < 400; ++round) {
    const int vocab = 2 + below(300);
    const std::vector<float> logits = random_logits(static_cast<size_t>(vocab), random(), 3.0F);
    SamplingParams params;
    if (below(2) != 0) params.repetition_penalty = 0.5F + 0.25F * static_cast<float>(below(8));
    if (below(2) != 0) params.frequency_penalty = 0.3F * static_cast<float>(below(13) - 6);
    if (below(2) != 0) params.presence_penalty = 0.3F * static_cast<float>(below(13) - 6);
    std::vector<TokenId> tokens;
    for (int i = below(60); i > 0; --i) tokens.push_back(below(vocab));
    const auto index = static_cast<uint32_t>(below(static_cast<int>(tokens.size()) + 1));
    std::set<TokenId> biased;
    for (int i = below(10); i > 0; --i) biased.insert(below(vocab));
    for (TokenId id : biased)
      params.logit_bias.emplace_back(id, static_cast<float>(below(20) - 10));
    std::vector<TokenId> banned;
    for (int i = below(4); i > 0; --i) banned.push_back(below(vocab));
    std::vector<uint32_t> allowed;
    if (below(3) == 0) {
      for (int i = 0; i < (vocab + 31) / 32; ++i) allowed.push_back(random());
    }
    std::vector<double> want(logits.begin(), logits.end());
    for (TokenId id : std::set<TokenId>(tokens.begin(), tokens.end())) {
      double& l = want[static_cast<size_t>(id)];
      l = l > 0 ? l / params.repetition_penalty : l * params.repetition_penalty;
    }
    std::map<TokenId, int> counts;
    for (size_t i = tokens.size() - index; i < tokens.size(); ++i) ++counts[tokens[i]];
    for (const auto& [id, count] : counts) {
      want[static_cast<size_t>(id)] -=
          count * double{params.frequency_penalty} + double{params.presence_penalty};
    }
    for (const auto& [id, bias] : params.logit_bias) want[static_cast<size_t>(id)] += bias;
    for (TokenId id : banned) want[static_cast<size_t>(id)] = -INFINITY;
    for (size_t i = 0; i < want.size() && !allowed.empty(); ++i) {
      if ((allowed[i / 32] >> (i % 32) & 1) == 0) want[i] = -INFINITY;
    }
    std::vector<float> copy = logits;
    SampleResult result;
    const SampleRow row{.params = &params,
                        .tokens = tokens,
                        .banned = banned,
                        .completion_idx = index,
                        .allowed = allowed};
    const SampleStatus status = sampler.sample(copy, row, result);
    const double best = *std::max_element(want.begin(), want.end());
    if (std::isinf(best)) {
      EXPECT(status == SampleStatus::all_banned);
      continue;
    }
    EXPECT(status == SampleStatus::ok);
    EXPECT_NEAR(want[static_cast<size_t>(result.token)], best, 1e-4);
    for (size_t i = 0; i < want.size(); ++i) {
      if (std::isinf(want[i]))
        EXPECT(std::isinf(copy[i]));
      else
        EXPECT_NEAR(copy[i], want[i], 1e-4);
    }
  }
}

TEST("NaN and infinite logits are reported, wherever they stand") {
  for (const float bad : {NAN, INFINITY}) {
    for (const size_t place : {size_t{0}, size_t{63}, size_t{64}, size_t{100}, size_t{129}}) {
      std::vector<float> logits(130, 1.0F);
      logits[place] = bad;
      const Outcome outcome = draw(logits, {});
      EXPECT(outcome.status == SampleStatus::not_finite);
      EXPECT_EQ(outcome.result.token, -1);
    }
  }
}

TEST("Philox4x32-10 gives the published values and 53 uniform bits") {
  // Random123's known answer for key 0, counter 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
  const uint64_t bits = (uint64_t{0xe169c58dU} << 32 | 0x6627e8d5U) >> 11;
  EXPECT_EQ(counter_uniform(0, 0), static_cast<double>(bits) * 0x1p-53);
  double sum = 0;
  for (uint32_t i = 0; i < 20000; ++i) {
    const double u = counter_uniform(12345678901234ULL, i);
    EXPECT(u >= 0.0 && u < 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / 20000, 0.5, 0.01);
  EXPECT(counter_uniform(1, 5) != counter_uniform(2, 5));
  EXPECT(counter_uniform(1, 5) != counter_uniform(uint64_t{1} << 32 | 1, 5));
}

TEST("draws come only from the tokens the filters leave, and reach all likely ones") {
  for (const size_t vocab : {size_t{50}, size_t{1000}, size_t{5003}}) {
    const auto logits = random_logits(vocab, static_cast<uint32_t>(vocab), 3.0F);
    for (const int top_k : {0, 1, 7, 40, 4500, 100000}) {
      for (const float top_p : {0.05F, 0.5F, 0.9F, 1.0F}) {
        for (const float min_p : {0.0F, 0.1F}) {
          SamplingParams params{.do_sample = true,
                                .temperature = 1.3F,
                                .top_k = top_k,
                                .top_p = top_p,
                                .min_p = min_p,
                                .logit_bias = {},
                                .seed = 17,
                                .bad_words = {}};
          const auto kept = allowed(logits, params);
          std::set<TokenId> drawn;
          for (uint32_t i = 0; i < 60; ++i) {
            const TokenId id = token(logits, params, {}, i);
            EXPECT(kept.contains(id));
            drawn.insert(id);
          }
          EXPECT(kept.size() > 3 || drawn.size() == kept.size());
        }
      }
    }
  }
}

TEST("equal logits: the nucleus takes the lowest ids") {
  const std::vector<float> flat(1000, 2.5F);
  SamplingParams params{
      .do_sample = true, .top_p = 0.1F, .logit_bias = {}, .seed = 3, .bad_words = {}};
  std::set<TokenId> drawn;
  for (uint32_t i = 0; i < 3000; ++i) drawn.insert(token(flat, params, {}, i));
  EXPECT_EQ(drawn.size(), size_t{100});
  EXPECT_EQ(*drawn.rbegin(), 99);
  params.top_k = 5;
  params.top_p = 1.0F;
  drawn.clear();
  for (uint32_t i = 0; i < 200; ++i) drawn.insert(token(flat, params, {}, i));
  EXPECT_EQ(drawn, (std::set<TokenId>{0, 1, 2, 3, 4}));
}

TEST("many draws follow the distribution (chi-square), with and without top-k") {
  const auto logits = random_logits(24, 5, 1.5F);
  for (const int top_k : {0, 12}) {
    SamplingParams params{.do_sample = true,
                          .temperature = 0.8F,
                          .top_k = top_k,
                          .logit_bias = {},
                          .seed = 99,
                          .bad_words = {}};
    const auto kept = allowed(logits, params);
    double total = 0;
    for (TokenId id : kept) total += std::exp(logits[id] / 0.8);
    std::map<TokenId, int> counts;
    constexpr int kDraws = 20000;
    for (uint32_t i = 0; i < kDraws; ++i) ++counts[token(logits, params, {}, i)];
    double chi_square = 0;
    for (TokenId id : kept) {
      const double want = kDraws * std::exp(logits[id] / 0.8) / total;
      chi_square += (counts[id] - want) * (counts[id] - want) / want;
    }
    const double freedom = static_cast<double>(kept.size()) - 1;
    EXPECT(chi_square < freedom + 4 * std::sqrt(2 * freedom));
    EXPECT(chi_square > freedom - 4 * std::sqrt(2 * freedom));
  }
}

TEST("a draw depends on seed, index and logits alone") {
  const auto logits = random_logits(3000, 8, 2.0F);
  SamplingParams params{
      .do_sample = true, .top_k = 50, .logit_bias = {}, .seed = 7, .bad_words = {}};
  std::vector<TokenId> first;
  for (uint32_t i = 0; i < 50; ++i) first.push_back(token(logits, params, {}, i));
  for (uint32_t i = 50; i-- > 0;) EXPECT_EQ(token(logits, params, {1, 2, 3}, i), first[i]);
  params.seed = 8;
  int equal = 0;
  for (uint32_t i = 0; i < 50; ++i) equal += token(logits, params, {}, i) == first[i] ? 1 : 0;
  EXPECT(equal < 25);
}

TEST("a tiny temperature is greedy, a huge one is nearly uniform") {
  const auto logits = random_logits(500, 4, 1.0F);
  const TokenId best = token(logits, {});
  SamplingParams params{
      .do_sample = true, .temperature = 1e-30F, .logit_bias = {}, .bad_words = {}};
  for (const int top_k : {0, 10, 1000}) {
    params.top_k = top_k;
    for (uint32_t i = 0; i < 5; ++i) EXPECT_EQ(token(logits, params, {}, i), best);
  }
  params = {.do_sample = true, .temperature = 1e30F, .logit_bias = {}, .bad_words = {}};
  std::set<TokenId> drawn;
  for (uint32_t i = 0; i < 4000; ++i) drawn.insert(token(logits, params, {}, i));
  EXPECT(drawn.size() > 490);
}

TEST("log-probabilities are the log-softmax of the raw logits, best first") {
  const std::vector<float> logits = {1.0F, 3.0F, 2.0F, 3.0F};
  const double sum = std::exp(1.0) + 2 * std::exp(3.0) + std::exp(2.0);
  SamplingParams params;
  params.num_logprobs = 3;
  params.bad_words = {{1}};
  params.repetition_penalty = 1.5F;
  const SampleResult result = draw(logits, params, {3}).result;
  EXPECT_EQ(result.token, 2);  // 1 is banned, 3 becomes 2 by the penalty: the lower id wins the tie
  EXPECT_NEAR(result.logprob, 2 - std::log(sum), 1e-6);
  EXPECT_EQ(result.top_logprobs.size(), size_t{3});
  EXPECT_EQ(result.top_logprobs[0].first, 1);
  EXPECT_EQ(result.top_logprobs[1].first, 3);
  EXPECT_EQ(result.top_logprobs[2].first, 2);
  EXPECT_NEAR(result.top_logprobs[0].second, 3 - std::log(sum), 1e-6);
  params.num_logprobs = 100;
  EXPECT_EQ(draw(logits, params).result.top_logprobs.size(), size_t{4});
}

TEST_MAIN()
