#include "backend/host_sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace turbomind {
namespace {

constexpr size_t kBlock = 64;  // logits behind one entry of block_max_
constexpr size_t kLanes = 16;
constexpr int kHeapLimit = 4096;  // above, selecting by partition beats a heap
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The digits of a float's bits, high to low.
struct RadixDigit {
  int shift;
  int bits;
};
constexpr RadixDigit kRadixDigits[] = {{21, 11}, {10, 11}, {0, 10}};

// exp(x) for x <= 0 in plain float arithmetic that compilers vectorise; 2 ulp; 0 below -87.
// Our own, so that a draw does not depend on the C library.
inline float exp_fast(float x) {
  const float clamped = x < -87.0F ? -87.0F : x;
  const float shifted = clamped * 1.44269504F + 12582912.0F;
  const float n = shifted - 12582912.0F;
  const float r = (clamped - n * 0.693145752F) - n * 1.42860677e-6F;
  float q = 0x1.6a2256p-10F;
  q = q * r + 0x1.123b02p-7F;
  q = q * r + 0x1.5558f8p-5F;
  q = q * r + 0x1.55549p-3F;
  q = q * r + 0x1.fffffcp-2F;
  const float y = r * r * q + r + 1.0F;
  const float power =
      std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000U);
  return x < -87.0F ? 0.0F : y * power;
}

// Probability mass the nucleus must reach. The margin is there because 0.1 is not a float: ten of
// a hundred equal tokens are enough for it.
double nucleus_mass(float top_p, double total) {
  return static_cast<double>(top_p) * total * (1.0 - 1e-7);
}

// p[i] = exp((l[i] - max) / temperature); returns the sum, added in fixed lanes.
double exponentials(std::span<float> values, float max, float temperature) {
  double lanes[kLanes] = {};
  const size_t n = values.size();
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    float* v = values.data() + i;
    for (size_t l = 0; l < kLanes; ++l) v[l] = exp_fast((v[l] - max) / temperature);
    for (size_t l = 0; l < kLanes; ++l) lanes[l] += v[l];
  }
  for (size_t l = 0; i + l < n; ++l) {
    values[i + l] = exp_fast((values[i + l] - max) / temperature);
    lanes[l] += values[i + l];
  }
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

const char* describe(SampleStatus status) {
  switch (status) {
    case SampleStatus::ok: return "ok";
    case SampleStatus::not_finite: return "the model's logits hold NaN or infinity";
    case SampleStatus::all_banned:
      return "every token of the vocabulary is banned; remove some badWords";
  }
  return "?";
}

double counter_uniform(uint64_t seed, uint32_t index) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53U;
  constexpr uint64_t kMultiplier1 = 0xCD9E8D57U;
  constexpr uint32_t kWeyl0 = 0x9E3779B9U;
  constexpr uint32_t kWeyl1 = 0xBB67AE85U;
  std::array<uint32_t, 4> x = {index, 0, 0, 0};
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = kMultiplier0 * x[0];
    const uint64_t b = kMultiplier1 * x[2];
    x = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  const uint64_t bits = (static_cast<uint64_t>(x[1]) << 32 | x[0]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

// Fills block_max_, returns the largest logit. A NaN or +infinity clears *finite.
float HostSampler::scan(std::span<const float> logits, bool* finite) {
  const size_t n = logits.size();
  block_max_.resize((n + kBlock - 1) / kBlock);
  float max = kMinusInfinity;
  float poison[kLanes] = {};  // stays 0 unless a value is NaN or +infinity
  for (size_t block = 0; block < block_max_.size(); ++block) {
    const float* v = logits.data() + block * kBlock;
    const size_t count = std::min(kBlock, n - block * kBlock);
    float best[kLanes];
    std::fill(best, best + kLanes, kMinusInfinity);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (size_t l = 0; l < kLanes; ++l) {
        const float x = v[i + l];
        best[l] = best[l] < x ? x : best[l];
        // -infinity is a legal "impossible"; the others turn 0 into NaN.
        poison[l] += (x < 0.0F ? 0.0F : x) * 0.0F;
      }
    }
    for (size_t l = 0; i + l < count; ++l) {
      const float x = v[i + l];
      best[l] = best[l] < x ? x : best[l];
      poison[l] += (x < 0.0F ? 0.0F : x) * 0.0F;
    }
    float block_max = kMinusInfinity;
    for (float b : best) block_max = block_max < b ? b : block_max;
    block_max_[block] = block_max;
    max = max < block_max ? block_max : max;
  }
  *finite = true;
  for (float p : poison) *finite = *finite && p == 0.0F;
  return max;
}

void HostSampler::penalize(std::span<float> logits, const SampleRow& row) {
  const float penalty = row.params->repetition_penalty;
  if (penalty == 1.0F) return;
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

double HostSampler::log_sum_exp(std::span<const float> logits, float max) {
  constexpr size_t kPart = 512;
  double sum = 0.0;
  for (size_t i = 0; i < logits.size(); i += kPart) {
    float part[kPart];
    const size_t count = std::min(kPart, logits.size() - i);
    std::memcpy(part, logits.data() + i, count * sizeof(float));
    sum += exponentials({part, count}, max, 1.0F);
  }
  return static_cast<double>(max) + std::log(sum);
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
  double total = 0.0;
  for (const Candidate& candidate : candidates_) {
    shares_.push_back(exp_fast((candidate.logit - max) / params.temperature));
    total += shares_.back();
  }
  size_t kept = 0;
  double mass = 0.0;
  const double wanted = nucleus_mass(params.top_p, total);
  while (kept < shares_.size()) {
    const double share = shares_[kept];
    if (params.top_p < 1.0F && kept > 0 && mass >= wanted) break;
    if (share <= 0.0 || share < static_cast<double>(params.min_p)) break;
    mass += share;
    ++kept;
  }
  const double target = counter_uniform(params.seed, row.completion_idx) * mass;
  double running = 0.0;
  for (size_t i = 0; i < kept; ++i) {
    running += shares_[i];
    if (running > target) return candidates_[i].id;
  }
  return candidates_[kept - 1].id;
}

// No top-k: probabilities of the whole vocabulary in place. The border of the nucleus is found by
// radix selection on the bits of the (positive) probabilities, 11 bits a pass: no sort.
TokenId HostSampler::draw_from_all(std::span<float> values, float max, const SampleRow& row) {
  const SamplingParams& params = *row.params;
  const double total = exponentials(values, max, params.temperature);
  float border = 0.0F;               // everything above is kept …
  int64_t border_count = -1;         // … and so many equal to it, lowest ids first; -1: all
  if (params.top_p < 1.0F) {
    const double wanted = nucleus_mass(params.top_p, total);
    double above = 0.0;   // mass of what is certainly larger than the border
    uint32_t prefix = 0;  // its known high bits
    for (const RadixDigit digit : kRadixDigits) {
      const uint32_t bins = 1U << digit.bits;
      const uint32_t known = digit.shift + digit.bits == 32 ? 0U : ~0U << (digit.shift + digit.bits);
      shares_.assign(bins, 0.0);
      for (float p : values) {
        const uint32_t bits = std::bit_cast<uint32_t>(p);
        if ((bits & known) == prefix) shares_[(bits >> digit.shift) & (bins - 1)] += p;
      }
      uint32_t bin = bins - 1;
      while (bin > 0 && above + shares_[bin] < wanted) above += shares_[bin--];
      prefix |= bin << digit.shift;
    }
    border = std::bit_cast<float>(prefix);
    border_count = border > 0.0F
                       ? std::max<int64_t>(1, static_cast<int64_t>(
                                                  std::ceil((wanted - above) / border)))
                       : 0;
  }
  const float lowest = params.min_p;
  const auto keep = [&](float p, int64_t& equal) {
    if (p <= 0.0F || p < lowest || p < border) return false;
    return p > border || border_count < 0 || equal++ < border_count;
  };
  double mass = 0.0;
  int64_t equal = 0;
  for (float p : values) {
    if (keep(p, equal)) mass += p;
  }
  const double target = counter_uniform(params.seed, row.completion_idx) * mass;
  double running = 0.0;
  equal = 0;
  TokenId last = -1;
  for (size_t i = 0; i < values.size(); ++i) {
    if (!keep(values[i], equal)) continue;
    running += values[i];
    last = static_cast<TokenId>(i);
    if (running > target) break;
  }
  return last;
}

TokenId HostSampler::first_equal(std::span<const float> logits, float max) const {
  size_t block = 0;
  while (block_max_[block] != max) ++block;
  size_t i = block * kBlock;
  while (logits[i] != max) ++i;
  return static_cast<TokenId>(i);
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
    normalizer = log_sum_exp(raw_, max);
    report_best(params.num_logprobs, normalizer, result);
  }

  const auto vocab = static_cast<int64_t>(logits.size());
  bool changed = params.repetition_penalty != 1.0F;
  penalize(logits, row);
  for_each_banned(row, vocab, [&](TokenId id) {
    logits[static_cast<size_t>(id)] = kMinusInfinity;
    changed = true;
  });
  if (changed) {
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
