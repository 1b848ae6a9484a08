// How one request wants its next token chosen. Plain data shared by runtime and backends.
// Order of the filters: repetition penalty, frequency and presence penalty, logit bias, bans and
// allowed tokens, temperature, top-k, top-p, min-p, draw. host_sampler.h defines each to the bit.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/types.h"

namespace turbomind {

struct SamplingParams {
  bool do_sample = false;           // false: greedy argmax (temperature, top-k/p, min-p unused)
  float temperature = 1.0F;         // > 0 when do_sample
  int top_k = 0;                    // 0: no limit
  float top_p = 1.0F;               // (0, 1]
  float min_p = 0.0F;               // [0, 1): share of the best token's probability
  float repetition_penalty = 1.0F;  // > 0, multiplicative, over prompt and completion (CTRL paper)
  float frequency_penalty = 0.0F;   // subtracted once for each time the completion holds the token
  float presence_penalty = 0.0F;    // subtracted once if the completion holds the token
  std::vector<std::pair<TokenId, float>> logit_bias;  // added; finite, each id at most once
  uint64_t seed = 0;     // token i of a completion depends on (seed, i) alone
  int num_logprobs = 0;  // 0: none; n: the chosen token's and the n best
  std::vector<std::vector<TokenId>> bad_words;  // each banned; longer ones ban their last token
};

// One row of logits to turn into a token.
struct SampleRow {
  const SamplingParams* params = nullptr;
  std::span<const TokenId> tokens;  // prompt and completion so far
  std::span<const TokenId> banned;  // extra bans of this step (stop ids below min_new_tokens)
  uint32_t completion_idx = 0;      // index of the token to draw within the completion
  // Bit i % 32 of word i / 32: token i may be drawn; ids past the end may not. Empty: all may.
  std::span<const uint32_t> allowed{};

  // The last completion_idx of `tokens`: what frequency and presence penalty look at.
  std::span<const TokenId> completion() const {
    return tokens.last(completion_idx < tokens.size() ? completion_idx : tokens.size());
  }
};

struct SampleResult {
  TokenId token = -1;
  float logprob = 0.0F;                                 // of `token`; only if num_logprobs > 0
  std::vector<std::pair<TokenId, float>> top_logprobs;  // best first, ties by lower id
};

}  // namespace turbomind
