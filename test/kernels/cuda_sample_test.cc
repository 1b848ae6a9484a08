// The GPU's sampler against HostSampler: the same token, the same log-probabilities to the bit, the same
// refusals, for random and for adversarial logits; and the scan that greedy rows live on.
#include "backend/cuda/cuda_sampler.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "gpu_test.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;

constexpr int kRows = 8;

struct Bench {
  explicit Bench(int64_t vocab, int rows = kRows)
      : vocab(vocab), context(test_context()),
        sizes(sampler_sizes({.max_rows = rows, .vocab_size = vocab, .max_kv_len = 8192}, rows)),
        sampler(sizes, context, pool) {}
  int64_t vocab;
  DevicePool pool;
  LaunchContext context;
  SamplerSizes sizes;
  CudaSampler sampler;
};

struct Case {
  std::vector<float> logits;
  SamplingParams params;
  std::vector<TokenId> tokens;
  std::vector<TokenId> banned;
  std::vector<uint32_t> allowed;
  uint32_t completion_idx = 0;
  SampleRow row() const { return {&params, tokens, banned, completion_idx, allowed}; }
};

bool same_bits(float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; }

bool same(const SampleResult& a, const SampleResult& b) {
  if (a.token != b.token || !same_bits(a.logprob, b.logprob) ||
      a.top_logprobs.size() != b.top_logprobs.size()) {
    return false;
  }
  for (size_t i = 0; i < a.top_logprobs.size(); ++i) {
    if (a.top_logprobs[i].first != b.top_logprobs[i].first ||
        !same_bits(a.top_logprobs[i].second, b.top_logprobs[i].second)) {
      return false;
    }
  }
  return true;
}

// Samples `cases` on the GPU in one step and on the host; answers how many differ.
int compare(Bench& bench, const std::vector<Case>& cases, const char* what) {
  std::vector<SampleRow> rows;
  std::vector<SampleResult> results(cases.size());
  for (size_t r = 0; r < cases.size(); ++r) {
    cuda_check(cudaMemcpy(bench.sampler.logits() + r * static_cast<size_t>(bench.vocab),
                          cases[r].logits.data(), cases[r].logits.size() * sizeof(float),
                          cudaMemcpyHostToDevice));
    rows.push_back(cases[r].row());
  }
  bench.sampler.scan(bench.context, static_cast<int>(rows.size()), bench.vocab);
  bool threw = false;
  try {
    bench.sampler.sample(bench.context, bench.vocab, rows, results);
  } catch (const Error&) {
    threw = true;
  }
  int wrong = 0;
  bool any_failed = false;
  HostSampler host;
  for (size_t r = 0; r < cases.size(); ++r) {
    std::vector<float> logits = cases[r].logits;
    SampleResult expected;
    any_failed = host.sample(logits, rows[r], expected) != SampleStatus::ok || any_failed;
    if (same(expected, results[r])) continue;
    ++wrong;
    const SamplingParams& p = cases[r].params;
    std::printf("    %s, V %lld, row %zu: token %d, host %d; logprob %.9g, host %.9g; sample %d T %g k %d p %g min %g rep %g freq %g pres %g logprobs %d\n",
                what, static_cast<long long>(bench.vocab), r, results[r].token, expected.token,
                static_cast<double>(results[r].logprob), static_cast<double>(expected.logprob), p.do_sample, static_cast<double>(p.temperature),
                p.top_k, static_cast<double>(p.top_p), static_cast<double>(p.min_p), static_cast<double>(p.repetition_penalty),
                static_cast<double>(p.frequency_penalty), static_cast<double>(p.presence_penalty), p.num_logprobs);
  }
  EXPECT_EQ(threw, any_failed);
  return wrong;
}

SamplingParams random_params(Random& random) {
  SamplingParams p;
  const auto pick = [&](std::initializer_list<float> values) { return *(values.begin() + random.below(static_cast<int>(values.size()))); };
  p.do_sample = random.below(4) != 0;
  p.temperature = pick({0.01F, 0.5F, 0.8F, 1.0F, 2.0F, 7.0F});
  p.top_k = static_cast<int>(pick({0, 0, 0, 1, 2, 40, 50, 1000, 1024, 1e6F}));
  p.top_p = pick({1.0F, 1.0F, 0.99F, 0.9F, 0.5F, 0.1F, 1e-4F});
  p.min_p = pick({0.0F, 0.0F, 0.05F, 0.5F, 0.999F});
  p.repetition_penalty = pick({1.0F, 1.0F, 1.3F, 0.7F});
  p.frequency_penalty = pick({0.0F, 0.0F, 0.5F, -1.5F});
  p.presence_penalty = pick({0.0F, 0.0F, 1.0F, -0.25F});
  p.num_logprobs = static_cast<int>(pick({0, 0, 1, 5, 20, 1024}));
  p.seed = (static_cast<uint64_t>(random.bits()) << 32) | random.bits();
  return p;
}

std::vector<float> shaped_logits(Random& random, int64_t vocab, int shape) {
  std::vector<float> logits = random.floats(static_cast<size_t>(vocab), shape == 1 ? 8.0F : 2.0F);
  for (float& value : logits) {
    if (shape == 2) value = 3.0F;                                          // all equal
    if (shape == 3) value = std::round(value);                            // many ties
    if (shape == 4 && random.below(3) != 0) value = -INFINITY;            // holes
    if (shape == 5) value = random.below(2) == 0 ? 0.0F : -0.0F;          // zeros of both signs
    if (shape == 6) value = value * 1e-6F + 20.0F;                        // nearly flat
    if (shape == 7) value = 30.0F - std::abs(value) * 40.0F;              // steep
  }
  if (shape == 4) logits[static_cast<size_t>(random.below(static_cast<int>(vocab)))] = 1.0F;
  return logits;
}

Case random_case(Random& random, int64_t vocab, int shape) {
  Case c;
  c.logits = shaped_logits(random, vocab, shape);
  c.params = random_params(random);
  const int n = random.below(300);
  const int spread = random.below(2) == 0 ? 12 : static_cast<int>(vocab);
  for (int i = 0; i < n; ++i) c.tokens.push_back(random.below(std::min<int>(spread, static_cast<int>(vocab) + 3)));
  c.completion_idx = static_cast<uint32_t>(n == 0 ? 0 : random.below(n + 1));
  if (random.below(3) == 0) c.params.logit_bias = {{0, 5.0F}, {static_cast<TokenId>(vocab / 2 + 1), -100.0F}, {static_cast<TokenId>(vocab - 1), 100.0F}};
  if (random.below(3) == 0) c.banned = {0, static_cast<TokenId>(vocab - 1), static_cast<TokenId>(vocab)};
  if (random.below(4) == 0 && n > 1) c.params.bad_words = {{c.tokens.back(), 1}, {2}};
  if (random.below(3) == 0) {
    c.allowed.resize(static_cast<size_t>(vocab / 32 + random.below(2)));
    for (uint32_t& word : c.allowed) word = random.below(3) == 0 ? ~0U : random.bits();
  }
  return c;
}

// For compute-sanitizer, which takes a hundredfold: one small and one large vocabulary, few rounds.
bool quick = false;

TEST("random rows: tokens and log-probabilities are the host's to the bit") {
  const std::vector<int64_t> all = {1, 5, 64, 1000, 4097, 151674, 152064};
  const std::vector<int64_t> few = {64, 4097};
  for (const int64_t vocab : quick ? few : all) {
    Bench bench(vocab);
    Random random(static_cast<uint32_t>(vocab));
    int wrong = 0;
    for (int round = 0; round < (quick ? 3 : vocab > 100000 ? 12 : 40); ++round) {
      std::vector<Case> cases;
      for (int r = 0; r < kRows; ++r) cases.push_back(random_case(random, vocab, (round + r) % 8));
      wrong += compare(bench, cases, "random");
    }
    EXPECT_EQ(wrong, 0);
  }
}

TEST("many draws of one row are the host's, so the distribution is") {
  const int64_t vocab = quick ? 4097 : 151674;
  Bench bench(vocab);
  Random random(11);
  const std::vector<float> logits = random.floats(static_cast<size_t>(vocab), 2.5F);
  int wrong = 0;
  for (uint32_t index = 0; index < (quick ? 2U : 24U); ++index) {
    std::vector<Case> cases(kRows);
    for (int r = 0; r < kRows; ++r) {
      cases[static_cast<size_t>(r)].logits = logits;
      SamplingParams& p = cases[static_cast<size_t>(r)].params;
      p.do_sample = true;
      p.temperature = 0.7F + 0.1F * static_cast<float>(r);
      p.top_p = r % 2 == 0 ? 0.95F : 1.0F;
      p.top_k = r % 4 < 2 ? 0 : 50;
      p.seed = 99;
      cases[static_cast<size_t>(r)].completion_idx = index * kRows + static_cast<uint32_t>(r);
    }
    wrong += compare(bench, cases, "draws");
  }
  EXPECT_EQ(wrong, 0);
}

TEST("edges: one token left, all banned, infinite and NaN logits, a penalty that overflows") {
  const int64_t vocab = 4097;
  Bench bench(vocab);
  Random random(5);
  std::vector<Case> cases(kRows);
  for (Case& c : cases) {
    c.logits = random.floats(static_cast<size_t>(vocab), 2.0F);
    c.params.do_sample = true;
    c.params.top_p = 0.9F;
    c.params.num_logprobs = 3;
  }
  cases[0].allowed.assign(129, 0);
  cases[0].allowed[128] = 1;  // the last token alone
  cases[1].allowed.assign(129, 0);
  cases[2].logits[4096] = NAN;
  cases[3].logits[7] = INFINITY;
  std::fill(cases[4].logits.begin(), cases[4].logits.end(), -INFINITY);
  cases[5].logits[9] = 3e38F;
  cases[5].tokens = {9};
  cases[5].params.repetition_penalty = 0.01F;
  cases[6].params.do_sample = false;
  cases[6].logits[100] = cases[6].logits[4000] = 50.0F;
  cases[6].params.repetition_penalty = 1.5F;
  cases[6].tokens = {100, 4000, 100};
  cases[7].params.top_k = 3;
  cases[7].params.logit_bias = {{5, 60.0F}, {6, 60.0F}};
  EXPECT_EQ(compare(bench, cases, "edges"), 0);
  for (Case& c : cases) c.params.do_sample = !c.params.do_sample;
  EXPECT_EQ(compare(bench, cases, "edges, the other way"), 0);
}

TEST("rows beyond the GPU's limits go through the host's sampler in the same step") {
  Bench bench(152064);
  Random random(6);
  std::vector<Case> cases(4);
  for (Case& c : cases) {
    c.logits = random.floats(152064, 2.0F);
    c.params.do_sample = true;
    c.params.seed = 3;
  }
  cases[0].params.top_k = 2000;
  cases[1].params.frequency_penalty = 0.5F;
  for (int i = 0; i < 7000; ++i) cases[1].tokens.push_back(random.below(152064));
  cases[1].completion_idx = 7000;
  cases[2].params.frequency_penalty = 0.5F;
  for (int i = 0; i < 6000; ++i) cases[2].tokens.push_back(random.below(152064));
  cases[2].completion_idx = 6000;
  EXPECT_EQ(compare(bench, cases, "limits"), 0);
  EXPECT_EQ(bench.sampler.rows_on_host(), 2U);
}

TEST("greedy rows need the scan alone, and say what they cannot do") {
  for (const int64_t vocab : {int64_t{151674}, int64_t{151936}, int64_t{68}}) {  // read one by one, by four
    Bench bench(vocab);
    Random random(2);
    std::vector<Case> cases(5);
    for (Case& c : cases) c.logits = random.floats(static_cast<size_t>(vocab));
    const auto last = static_cast<size_t>(vocab - 1);
    cases[0].logits[3] = cases[0].logits[last] = cases[0].logits[last / 2] = 9.0F;
    cases[1].logits[last] = 8.0F;
    cases[2].logits[last] = NAN;
    std::fill(cases[3].logits.begin(), cases[3].logits.end(), -INFINITY);
    EXPECT_EQ(compare(bench, cases, "greedy"), 0);
    const std::vector<Case> fine = {cases[4], cases[0], cases[1]};
    EXPECT_EQ(compare(bench, fine, "greedy, fewer rows"), 0);
  }
}

TEST("many rows are scanned in fewer pieces each, or in one") {
  const int64_t vocab = 6400;  // 100 blocks
  for (const int rows : {60, 300, 1100}) {
    Bench bench(vocab, rows);
    Random random(5);
    std::vector<Case> cases(static_cast<size_t>(rows));
    for (Case& c : cases) c.logits = random.floats(static_cast<size_t>(vocab));
    EXPECT_EQ(compare(bench, cases, "many rows"), 0);
  }
}

TEST("sampling again allocates nothing") {
  Bench bench(4097);
  Random random(8);
  const size_t before = bench.pool.driver_allocations();
  for (int i = 0; i < 10; ++i) {
    std::vector<Case> cases;
    for (int r = 0; r < kRows; ++r) cases.push_back(random_case(random, 4097, r));
    EXPECT_EQ(compare(bench, cases, "again"), 0);
  }
  EXPECT_EQ(bench.pool.driver_allocations(), before);
}

}  // namespace

// `cuda_sample_test quick` for compute-sanitizer.
int main(int argc, char** argv) {
  quick = argc > 1 && std::string_view(argv[1]) == "quick";
  require_device();
  return turbomind::test::run_all();
}
