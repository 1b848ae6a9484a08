// See host_sampler.h. Works on blocks of 64 logits: one pass finds each block's maximum, and later
// passes skip blocks that hold nothing of interest.
#include "backend/host_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "backend/host_sampler_blocks.h"

namespace turbomind {

using namespace blocks;

namespace {

constexpr int kHeapLimit = 4096;  // above, selecting by partition beats a heap

}  // namespace

const char* describe(SampleStatus status) {
  switch (status) {
    case SampleStatus::ok:
      return "ok";
    case SampleStatus::not_finite:
      return "the model's logits hold NaN or infinity";
    case SampleStatus::all_banned:
      return "no token of the vocabulary is left; badWords, minNewTokens and what the request's "
             "format allows exclude each other";
  }
  return "?";
}

// Fills block_max_, returns the largest logit. A NaN or +infinity clears *finite.
float HostSampler::scan(std::span<float> logits, bool* finite) {
  block_max_.resize((logits.size() + kBlock - 1) / kBlock);
  float max = kMinusInfinity;
  F4 poison = splat(0.0F);  // stays 0 unless a value is NaN or +infinity
  for_each_block(logits, kMinusInfinity, [&](size_t block, float* v) {
    F4 best = splat(kMinusInfinity);
    for (size_t i = 0; i < kBlock; i += 4) {
      const F4 x = load(v + i);
      best = best < x ? x : best;
      // -infinity is a legal "impossible"; the others turn 0 into NaN.
      poison += (x < 0.0F ? splat(0.0F) : x) * 0.0F;
    }
    block_max_[block] = largest(best);
    max = std::max(max, block_max_[block]);
  });
  *finite = poison[0] == 0.0F && poison[1] == 0.0F && poison[2] == 0.0F && poison[3] == 0.0F;
  return max;
}

bool HostSampler::adjust(std::span<float> logits, const SampleRow& row) {
  const SamplingParams& params = *row.params;
  const auto vocab = static_cast<int64_t>(logits.size());
  bool changed = params.repetition_penalty != 1.0F;
  if (changed) penalize_repetition(logits, row);
  if (params.frequency_penalty != 0.0F || params.presence_penalty != 0.0F) {
    penalize_completion(logits, row);
    changed = true;
  }
  for (const auto& [id, bias] : params.logit_bias) {
    if (id < 0 || id >= vocab) continue;
    logits[static_cast<size_t>(id)] += bias;
    changed = true;
  }
  for_each_banned(row, vocab, [&](TokenId id) {
    logits[static_cast<size_t>(id)] = kMinusInfinity;
    changed = true;
  });
  if (row.allowed.empty()) return changed;
  for (size_t begin = 0, word = 0; begin < logits.size(); begin += 32, ++word) {
    const uint32_t bits = word < row.allowed.size() ? row.allowed[word] : 0;
    if (bits == ~uint32_t{0}) continue;
    const size_t end = std::min(logits.size(), begin + 32);
    for (size_t i = begin; i < end; ++i) {
      if ((bits >> (i - begin) & 1) == 0) logits[i] = kMinusInfinity;
    }
  }
  return true;
}

void HostSampler::penalize_repetition(std::span<float> logits, const SampleRow& row) {
  const float penalty = row.params->repetition_penalty;
  const auto vocab = static_cast<int64_t>(logits.size());
  seen_.resize((logits.size() + 63) / 64, 0);
  for (TokenId id : row.tokens) {
    if (id < 0 || id >= vocab) continue;
    uint64_t& word = seen_[static_cast<size_t>(id) / 64];
    const uint64_t bit = uint64_t{1} << (id % 64);
    if ((word & bit) != 0) continue;
    word |= bit;
    float& logit = logits[static_cast<size_t>(id)];
    logit = logit > 0.0F ? logit / penalty : logit * penalty;
  }
  for (TokenId id : row.tokens) {
    if (id >= 0 && id < vocab) seen_[static_cast<size_t>(id) / 64] = 0;
  }
}

void HostSampler::penalize_completion(std::span<float> logits, const SampleRow& row) {
  const auto vocab = static_cast<int64_t>(logits.size());
  counts_.resize(logits.size(), 0);
  const std::span<const TokenId> completion = row.completion();
  for (TokenId id : completion) {
    if (id >= 0 && id < vocab) ++counts_[static_cast<size_t>(id)];
  }
  for (TokenId id : completion) {
    if (id < 0 || id >= vocab) continue;
    int32_t& count = counts_[static_cast<size_t>(id)];
    if (count == 0) continue;
    logits[static_cast<size_t>(id)] -=
        static_cast<float>(count) * row.params->frequency_penalty + row.params->presence_penalty;
    count = 0;
  }
}

void HostSampler::select_best(std::span<const float> logits, int k) {
  candidates_.clear();
  if (k > kHeapLimit) {
    for (size_t i = 0; i < logits.size(); ++i) {
      candidates_.push_back({logits[i], static_cast<TokenId>(i)});
    }
    std::nth_element(candidates_.begin(), candidates_.begin() + k - 1, candidates_.end(), better);
    candidates_.resize(static_cast<size_t>(k));
    std::sort(candidates_.begin(), candidates_.end(), better);
    return;
  }
  // A heap with the worst of the k best on top. A later id loses a tie, so a block whose largest
  // value only equals the worst holds nothing new.
  for (size_t block = 0; block < block_max_.size(); ++block) {
    const bool full = candidates_.size() == static_cast<size_t>(k);
    if (full && !(block_max_[block] > candidates_.front().logit)) continue;
    const size_t end = std::min(logits.size(), (block + 1) * kBlock);
    for (size_t i = block * kBlock; i < end; ++i) {
      if (candidates_.size() < static_cast<size_t>(k)) {
        candidates_.push_back({logits[i], static_cast<TokenId>(i)});
        std::push_heap(candidates_.begin(), candidates_.end(), better);
      } else if (logits[i] > candidates_.front().logit) {
        std::pop_heap(candidates_.begin(), candidates_.end(), better);
        candidates_.back() = {logits[i], static_cast<TokenId>(i)};
        std::push_heap(candidates_.begin(), candidates_.end(), better);
      }
    }
  }
  std::sort_heap(candidates_.begin(), candidates_.end(), better);
}

void HostSampler::report_best(int count, double normalizer, SampleResult& result) {
  select_best(raw_, std::min(count, static_cast<int>(raw_.size())));
  for (const Candidate& candidate : candidates_) {
    result.top_logprobs.emplace_back(candidate.id,
                                     static_cast<float>(candidate.logit - normalizer));
  }
}

// top-k, then the rest, over a short list that is best first.
TokenId HostSampler::draw_from_best(std::span<const float> logits, const SampleRow& row) {
  const SamplingParams& params = *row.params;
  select_best(logits, params.top_k);
  const float max = candidates_.front().logit;
  shares_.clear();
  for (const Candidate& candidate : candidates_) {
    shares_.push_back(exp_nonpositive((candidate.logit - max) / params.temperature));
  }
  const int drawn = draw_from_shares(static_cast<int>(shares_.size()), params.top_p, params.min_p,
                                     counter_uniform(params.seed, row.completion_idx),
                                     [&](int i) { return shares_[static_cast<size_t>(i)]; });
  return candidates_[static_cast<size_t>(drawn)].id;
}

// The smallest probability in the nucleus, and how many of those equal to it belong to it. Found by
// radix selection on the bits of the (non-negative) probabilities, digit by digit: no sort. After the
// first digit all sums are exact. Value 0: `values` do not reach `wanted`.
HostSampler::Border HostSampler::nucleus_border(std::span<const float> values, double wanted) {
  double above = 0.0;   // mass of what is certainly larger than the border
  uint32_t prefix = 0;  // its known high bits
  for (int d = 0; d < kNumRadixDigits; ++d) {
    const RadixDigit digit = radix_digit(d);
    const uint32_t bins = 1U << digit.bits;
    const uint32_t known = digit.shift + digit.bits == 32 ? 0U : ~0U << (digit.shift + digit.bits);
    shares_.assign(bins, 0.0);
    for (float p : values) {
      const uint32_t bits = bits_of(p);
      if ((bits & known) == prefix) shares_[(bits >> digit.shift) & (bins - 1)] += p;
    }
    uint32_t bin = bins - 1;
    double inside = 0.0;
    while (bin > 0 && above + (inside + shares_[bin]) < wanted) inside += shares_[bin--];
    if (d == 0 && bin == 0) return {};
    above += inside;
    prefix |= bin << digit.shift;
  }
  const float value = float_of(prefix);
  const double count = std::ceil((wanted - above) / value);
  return {value, std::max<int64_t>(1, static_cast<int64_t>(count))};
}

// Most nuclei hold likely tokens only, so the search runs over those first. The answer is the same,
// for what is left out is smaller than every one of them.
HostSampler::Border HostSampler::find_border(std::span<const float> values, double wanted) {
  likely_.clear();
  for (size_t block = 0; block < block_sum_.size(); ++block) {
    if (block_sum_[block] < kLikely) continue;
    const size_t end = std::min(values.size(), (block + 1) * kBlock);
    for (size_t i = block * kBlock; i < end; ++i) {
      if (values[i] >= kLikely) likely_.push_back(values[i]);
    }
  }
  const Border border = nucleus_border(likely_, wanted);
  return border.value > 0.0F ? border : nucleus_border(values, wanted);
}

// No top-k: probabilities of the whole vocabulary, in place; what the filters drop becomes 0.
TokenId HostSampler::draw_from_all(std::span<float> values, float max, const SampleRow& row) {
  const SamplingParams& params = *row.params;
  exponentials(values, max, params.temperature, block_sum_);
  double total = add_groups(block_sum_, group_sum_);
  Border border;
  if (params.top_p < 1.0F) border = find_border(values, nucleus_mass(params.top_p, total));
  if (border.value > 0.0F) {
    int64_t equal = 0;
    for (float& p : values) {
      if (p == border.value && equal++ >= border.count) p = 0.0F;
    }
  }
  const float cut = std::max(border.value, params.min_p);
  if (cut > 0.0F) {
    clear_below(values, cut, block_sum_);
    total = add_groups(block_sum_, group_sum_);
  }

  const double target = counter_uniform(params.seed, row.completion_idx) * total;
  double running = 0.0;
  const auto at = [](auto span, size_t first, size_t size) {
    return span.subspan(first, std::min(size, span.size() - first));
  };
  const auto walk = [&](auto shares) {
    return static_cast<size_t>(walk_shares(static_cast<int>(shares.size()), target, running,
                                           [&](int i) { return shares[static_cast<size_t>(i)]; }));
  };
  const size_t group = walk(std::span<const double>(group_sum_));
  const size_t first_block = group * kSumGroup;
  const size_t block =
      first_block + walk(at(std::span<const float>(block_sum_), first_block, kSumGroup));
  return static_cast<TokenId>(block * kBlock +
                              walk(at(std::span<const float>(values), block * kBlock, kBlock)));
}

TokenId HostSampler::first_equal(std::span<const float> logits, float max) const {
  size_t block = 0;
  while (block_max_[block] != max) ++block;
  size_t i = block * kBlock;
  while (logits[i] != max) ++i;
  return static_cast<TokenId>(i);
}

double HostSampler::log_sum_exp(std::span<float> logits) {
  bool finite = true;
  const float max = scan(logits, &finite);
  if (!finite) return std::numeric_limits<double>::quiet_NaN();
  exponentials(logits, max, 1.0F, block_sum_);
  return max + std::log(add_groups(block_sum_, group_sum_));
}

SampleStatus HostSampler::sample(std::span<float> logits, const SampleRow& row,
                                 SampleResult& result) {
  const SamplingParams& params = *row.params;
  result.token = -1;
  result.logprob = 0.0F;
  result.top_logprobs.clear();
  bool finite = true;
  float max = scan(logits, &finite);
  if (!finite) return SampleStatus::not_finite;
  if (max == kMinusInfinity) return SampleStatus::all_banned;

  const bool wants_logprobs = params.num_logprobs > 0;
  double normalizer = 0.0;
  if (wants_logprobs) {
    raw_.assign(logits.begin(), logits.end());
    exponentials(raw_, max, 1.0F, block_sum_);
    normalizer = max + std::log(add_groups(block_sum_, group_sum_));
    raw_.assign(logits.begin(), logits.end());
    report_best(params.num_logprobs, normalizer, result);
  }

  const auto vocab = static_cast<int64_t>(logits.size());
  if (adjust(logits, row)) {
    max = scan(logits, &finite);
    if (!finite) return SampleStatus::not_finite;
    if (max == kMinusInfinity) return SampleStatus::all_banned;
  }
  if (!params.do_sample || !(params.temperature > 0.0F)) {
    result.token = first_equal(logits, max);
  } else if (params.top_k > 0 && params.top_k < vocab) {
    result.token = draw_from_best(logits, row);
  } else {
    result.token = draw_from_all(logits, max, row);
  }
  if (wants_logprobs) {
    result.logprob = static_cast<float>(raw_[static_cast<size_t>(result.token)] - normalizer);
  }
  return SampleStatus::ok;
}

}  // namespace turbomind
