#include "runtime/speculation.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/error.h"

namespace turbomind {
namespace {

constexpr double kAcceptanceWeight = 1.0 / 8;  // of the newest guess
// Times err upwards (a late wake-up, a graph captured first): lower ones count for more.
constexpr double kLowerWeight = 1.0 / 4;
constexpr double kHigherWeight = 1.0 / 12;
// Planning, sampling and commit of a draft are not free either.
constexpr double kLeastRowShare = 0.05;
constexpr double kMargin = 1.1;
constexpr int kStepsToForget = 256;  // without drafts, until a price is lowered by kForget
constexpr double kForget = 0.8;
constexpr int kStepsBetweenPlain = 48;  // with drafts, until a step without is timed

void follow(double& value, double newest) {
  value += (newest < value ? kLowerWeight : kHigherWeight) * (newest - value);
}

}  // namespace

void Acceptance::observe(int length, int num_compared, int num_right) {
  TM_CHECK(num_right <= num_compared && num_right >= num_compared - 1, "%d of %d guesses right",
           num_right, num_compared);
  double& share = shares_[index(length)];
  for (int i = 0; i < num_compared; ++i) {
    share += kAcceptanceWeight * ((i < num_right ? 1.0 : 0.0) - share);
  }
  share = std::clamp(share, 0.001, 0.999);
}

size_t RowCost::bucket(int num_sequences) {
  const auto width =
      static_cast<size_t>(std::bit_width(static_cast<unsigned>(std::max(num_sequences, 1)) - 1));
  return std::min(width, std::tuple_size_v<decltype(measured_)> - 1);
}

void RowCost::observe(int num_sequences, int num_drafts, double ms) {
  if (!(ms > 0)) return;
  Measured& m = measured_[bucket(num_sequences)];
  if (num_drafts == 0) {
    m.drafted_in_a_row = 0;
    if (m.plain_ms <= 0) m.plain_ms = ms;
    follow(m.plain_ms, std::min(ms, 2 * m.plain_ms));
    if (++m.plain_in_a_row % kStepsToForget == 0) m.row_share *= kForget;
    return;
  }
  ++m.drafted_in_a_row;
  m.plain_in_a_row = 0;
  if (m.plain_ms <= 0) return;
  const double token_ms = m.plain_ms / num_sequences;
  const double extra_ms = std::min(ms, 4 * m.plain_ms) - m.plain_ms;
  follow(m.row_share, std::clamp(extra_ms / num_drafts / token_ms, -1.0, 2.0));
}

double RowCost::share(int num_sequences) const {
  return std::max(kLeastRowShare, kMargin * measured_[bucket(num_sequences)].row_share);
}

bool RowCost::wants_plain_step(int num_sequences) const {
  const Measured& m = measured_[bucket(num_sequences)];
  return m.plain_ms <= 0 || m.drafted_in_a_row >= kStepsBetweenPlain;
}

int drafts_that_pay(double acceptance, double row_share, int most) {
  if (row_share >= 1) return 0;
  int count = 0;
  for (double right = acceptance; count < most && right > row_share; right *= acceptance) ++count;
  return count;
}

void Drafter::look_up(std::span<const TokenId> tokens) {
  if (static_cast<int>(tokens.size()) == num_tokens_) return;
  index_.extend(tokens);
  match_ = index_.find(tokens);
  num_tokens_ = static_cast<int>(tokens.size());
}

int Drafter::num_worthwhile(const SpeculationLimits& limits, double row_share, int most) const {
  most = std::min(most, limits.max_drafts);
  if (match_.length == 0 || most <= 0) return 0;
  if (!limits.measured) return most;
  return drafts_that_pay(acceptance_.share(match_.length), row_share, most);
}

void Drafter::judge(std::span<const TokenId> tokens, int num_drafts) {
  if (match_.length == 0 || static_cast<int>(tokens.size()) <= num_tokens_) return;
  const auto before = tokens.first(static_cast<size_t>(num_tokens_));
  const auto drawn = tokens.subspan(static_cast<size_t>(num_tokens_));
  std::array<TokenId, kMaxDrafts> guessed{};
  const size_t compared =
      std::min({static_cast<size_t>(std::max(num_drafts, 1)), drawn.size(), guessed.size()});
  guess(before, std::span(guessed).first(compared));
  size_t right = 0;
  while (right < compared && guessed[right] == drawn[right]) ++right;
  acceptance_.observe(match_.length, static_cast<int>(std::min(right + 1, compared)),
                      static_cast<int>(right));
  match_ = {};  // judged once
}

}  // namespace turbomind
