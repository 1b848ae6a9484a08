// Finds what followed when a sequence's last tokens stood in it before: the source of drafts for
// speculative decoding without a draft model (prompt lookup). An index of 2- to 4-grams that grows
// with the sequence; O(1) work a token, memory bounded at construction. Pure. Engine thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/types.h"

namespace turbomind {

// The latest earlier place of a sequence's last `length` tokens.
struct NgramMatch {
  int length = 0;  // tokens that agree, 0: none
  int next = 0;    // index of the token that followed them there
};

class NgramIndex {
 public:
  static constexpr int kShortest = 2;
  static constexpr int kLongest = 4;
  static constexpr int kLengths = kLongest - kShortest + 1;
  // Places a table remembers at most: 3 tables of 4 bytes each = 384 KiB a sequence.
  static constexpr int kMaxPlaces = 1 << 15;

  // `max_tokens`: tokens the sequence may have.
  explicit NgramIndex(int max_tokens);

  // Indexes what is new in `tokens`, the whole sequence. It must begin with what was given before.
  void extend(std::span<const TokenId> tokens);
  // Of `tokens` as given to extend() last. Longer matches win, then later ones.
  NgramMatch find(std::span<const TokenId> tokens) const;
  size_t bytes() const { return places_.size() * sizeof(int32_t); }

 private:
  size_t entry(std::span<const TokenId> tokens, int end, int length) const;

  // [kLengths][mask_ + 1]: index of the token after an n-gram; 0: none (nothing precedes token 0).
  // An n-gram takes over the entry of another with the same hash, so find() compares the tokens.
  std::vector<int32_t> places_;
  uint32_t mask_ = 0;
  int num_indexed_ = 0;  // tokens that are the successor of indexed n-grams, or precede them
};

// Writes the `count` tokens that should follow if the text goes on as it did after `match`. Where
// that place itself runs into the end, the guess goes on with its own tokens: a loop of any period
// is guessed whole.
void continue_match(std::span<const TokenId> tokens, const NgramMatch& match,
                    std::span<TokenId> drafts);

}  // namespace turbomind
