// One row of logits → one token, on the host: the sampler of the CPU backend and the judge of any
// device sampler. A pure function of (logits, row); scratch is only memory kept between calls.
// Any thread, one HostSampler a thread.
//
// Order, each in f32, every operation rounded by itself (no fma):
//   1. repetition penalty: l > 0 ? l / p : l * p, once per distinct token of prompt and completion;
//   2. frequency and presence penalty: l - (count * frequency + presence) for each token that the
//      completion (SampleRow::completion()) holds count > 0 times, OpenAI's formula;
//   3. logit bias: l + bias;
//   4. bans, and what `allowed` leaves out: -infinity, whatever the bias;
//   5. temperature, top-k, top-p, min-p, draw.
// - Greedy: the largest logit after 1 to 4, ties to the lowest id.
// - top-k keeps exactly k tokens, ordered by (logit, then lower id). top-p keeps the shortest run
//   of the best tokens whose share of what top-k left is at least top_p (always one). min-p keeps
//   tokens of at least min_p times the best token's probability.
// - The draw: u = 53 bits of Philox4x32-10 with key = seed and counter = (completion_idx, 0, 0, 0);
//   the token where the kept tokens' running sum of probabilities passes u times their total. So a
//   token depends on (seed, completion_idx, logits) alone.
// - Log-probabilities are the model's own: log-softmax of the raw logits, before penalties,
//   bias, bans, temperature and filters, as OpenAI's API reports them. They do not change with the sampling
//   options, and a banned token may stand among the best.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "backend/sampling_math.h"
#include "base/sampling.h"

namespace turbomind {

enum class [[nodiscard]] SampleStatus{
    ok,
    not_finite,  // a logit is NaN or +infinity
    all_banned   // no token is left
};
const char* describe(SampleStatus status);

class HostSampler {
 public:
  // `logits` [V] is overwritten. On failure result.token is -1.
  SampleStatus sample(std::span<float> logits, const SampleRow& row, SampleResult& result);
  // log(sum(exp(logits))), what a log-probability subtracts; `logits` is overwritten. NaN if one of
  // them is NaN or +infinity.
  double log_sum_exp(std::span<float> logits);

 private:
  struct Candidate {
    float logit;
    TokenId id;
  };
  static bool better(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  }
  // The k best of `logits`, best first; needs block_max_.
  void select_best(std::span<const float> logits, int k);
  struct Border {
    float value = 0.0F;
    int64_t count = 0;
  };
  float scan(std::span<float> logits, bool* finite);  // changes nothing
  // Steps 1 to 4 of the order above; whether any of them may have changed a logit.
  bool adjust(std::span<float> logits, const SampleRow& row);
  void penalize_repetition(std::span<float> logits, const SampleRow& row);
  void penalize_completion(std::span<float> logits, const SampleRow& row);
  void report_best(int count, double normalizer, SampleResult& result);
  TokenId first_equal(std::span<const float> logits, float max) const;
  TokenId draw_from_best(std::span<const float> logits, const SampleRow& row);
  TokenId draw_from_all(std::span<float> logits, float max, const SampleRow& row);
  Border nucleus_border(std::span<const float> values, double wanted);
  Border find_border(std::span<const float> values, double wanted);

  std::vector<float> block_max_;       // of kBlock logits each
  std::vector<float> block_sum_;       // of kBlock probabilities each
  std::vector<double> group_sum_;      // of kSumGroup blocks each
  std::vector<uint64_t> seen_;         // bit per token, zero between calls
  std::vector<int32_t> counts_;        // of each token in the completion, zero between calls
  std::vector<Candidate> candidates_;  // best first after select_best
  std::vector<double> shares_;         // of candidates, or of radix bins
  std::vector<float> likely_;          // probabilities of likely tokens
  std::vector<float> raw_;             // the model's own logits, kept for log-probabilities
};

// Ids that `row` forbids now (with repeats): single bad words, the last token of longer bad words
// whose beginning has just been said, and row.banned. Calls body(id) for those within [0, vocab).
template <class Body>
void for_each_banned(const SampleRow& row, int64_t vocab, Body&& body) {
  const auto visit = [&](TokenId id) {
    if (id >= 0 && id < vocab) body(id);
  };
  for (TokenId id : row.banned) visit(id);
  for (const std::vector<TokenId>& word : row.params->bad_words) {
    if (word.empty() || word.size() - 1 > row.tokens.size()) continue;
    const size_t said = word.size() - 1;
    const auto tail = row.tokens.last(said);
    bool matches = true;
    for (size_t i = 0; i < said; ++i) matches = matches && tail[i] == word[i];
    if (matches) visit(word.back());
  }
}

}  // namespace turbomind
