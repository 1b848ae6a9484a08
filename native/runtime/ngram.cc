#include "runtime/ngram.h"

#include <algorithm>
#include <bit>

#include "base/error.h"

namespace turbomind {

NgramIndex::NgramIndex(int max_tokens) {
  const int places = std::clamp(2 * std::min(max_tokens, kMaxPlaces), 16, kMaxPlaces);
  mask_ = std::bit_ceil(static_cast<uint32_t>(places)) - 1;
  places_.assign(static_cast<size_t>(kLengths) * (size_t{mask_} + 1), 0);
}

// Entry of the n-gram whose last token is tokens[end - 1].
size_t NgramIndex::entry(std::span<const TokenId> tokens, int end, int length) const {
  uint64_t hash = static_cast<uint64_t>(length);
  for (int i = end - length; i < end; ++i) {
    hash = (hash ^ static_cast<uint32_t>(tokens[static_cast<size_t>(i)])) * 0x9E3779B97F4A7C15ULL;
    hash ^= hash >> 32;
  }
  return static_cast<size_t>(length - kShortest) * (size_t{mask_} + 1) +
         (static_cast<uint32_t>(hash) & mask_);
}

void NgramIndex::extend(std::span<const TokenId> tokens) {
  const auto size = static_cast<int>(tokens.size());
  TM_CHECK(size >= num_indexed_, "%d tokens after %d", size, num_indexed_);
  // The last n-gram is what find() looks for; it goes in once its successor is known.
  for (int next = std::max(num_indexed_, kShortest); next < size; ++next) {
    for (int length = kShortest; length <= std::min(kLongest, next); ++length) {
      places_[entry(tokens, next, length)] = next;
    }
  }
  num_indexed_ = size;
}

NgramMatch NgramIndex::find(std::span<const TokenId> tokens) const {
  const auto size = static_cast<int>(tokens.size());
  TM_CHECK(size == num_indexed_, "%d tokens, %d indexed", size, num_indexed_);
  for (int length = std::min(kLongest, size); length >= kShortest; --length) {
    const int next = places_[entry(tokens, size, length)];
    if (next == 0) continue;
    const auto here = tokens.last(static_cast<size_t>(length));
    const auto there =
        tokens.subspan(static_cast<size_t>(next - length), static_cast<size_t>(length));
    if (std::equal(here.begin(), here.end(), there.begin())) return {length, next};
  }
  return {};
}

void continue_match(std::span<const TokenId> tokens, const NgramMatch& match,
                    std::span<TokenId> drafts) {
  TM_CHECK(match.length > 0 && match.next < static_cast<int>(tokens.size()),
           "a continuation from token %d of %zu", match.next, tokens.size());
  for (size_t i = 0; i < drafts.size(); ++i) {
    const size_t from = static_cast<size_t>(match.next) + i;
    drafts[i] = from < tokens.size() ? tokens[from] : drafts[from - tokens.size()];
  }
}

}  // namespace turbomind
