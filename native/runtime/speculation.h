// Decides how many drafted tokens a sequence puts into its next step. Two measurements decide:
//   - acceptance: how often a guess after a match of n tokens was the token drawn, for each sequence
//     and n. Guesses are compared also while none is run, so that a sequence that begins to repeat
//     itself is noticed at no cost;
//   - row cost: what one more row adds to the time of a decode step, as a share of what a token costs
//     without drafts. Next to nothing while a step waits for memory, 1 and more once it computes.
// A draft at depth i pays while acceptance^i exceeds the row cost. Drafts never change results, so
// that times may decide. Pure but for the clock values it is given. Engine thread.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <vector>

#include "base/types.h"
#include "runtime/ngram.h"

namespace turbomind {

struct SpeculationLimits {
  int max_drafts = 0;    // of a sequence in a step; 0: never speculate
  int max_rows = 0;      // drafts of all sequences of a step together
  bool measured = true;  // false (tests): every match is drafted in full, whatever it costs
};

// Most drafts of one sequence, and of one step: more would rarely be accepted, and every row of a
// step needs room for its logits.
constexpr int kMaxDrafts = 7;
constexpr int kMaxDraftRows = 32;

// How good one sequence's guesses have been.
class Acceptance {
 public:
  // Of a guess after a match of `length` tokens: the probability that it is right, (0, 1).
  double share(int length) const { return shares_[index(length)]; }
  // `num_compared` guesses in a row were compared with the tokens drawn, all right but perhaps the
  // last one: num_right >= num_compared - 1.
  void observe(int length, int num_compared, int num_right);

 private:
  static size_t index(int length) { return static_cast<size_t>(length - NgramIndex::kShortest); }
  // Longer matches are more often right: where text repeats itself, about this often.
  std::array<double, NgramIndex::kLengths> shares_{0.4, 0.55, 0.7};
};

// What rows cost, by size of the batch.
class RowCost {
 public:
  // A step of decode rows alone took `ms`: one row of each sequence and `num_drafts` more.
  void observe(int num_sequences, int num_drafts, double ms);
  // One more row, in tokens without drafts. Starts as a guess; while no drafts run a high price is
  // forgotten after some time, so that drafts get another chance.
  double share(int num_sequences) const;
  // The price of a step without drafts is out of date: the next one should have none.
  bool wants_plain_step(int num_sequences) const;

 private:
  static constexpr double kGuess = 0.25;
  struct Measured {
    double plain_ms = 0;        // of a step; 0: not seen
    double row_share = kGuess;  // see share()
    int drafted_in_a_row = 0;
    int plain_in_a_row = 0;
  };
  static size_t bucket(int num_sequences);
  std::array<Measured, 8> measured_{};  // batches of 1, 2, 3..4, 5..8, …, 65 and more
};

// Drafts to run for a guess of which each token is right with probability `acceptance`.
int drafts_that_pay(double acceptance, double row_share, int most);

// The drafting side of one sequence. Made when it first decodes, of its prompt and completion.
class Drafter {
 public:
  explicit Drafter(int max_tokens) : index_(max_tokens) {}

  // Looks up a guess of how `tokens` go on. Call it once for every new length.
  void look_up(std::span<const TokenId> tokens);
  // Drafts of that guess that pay at this price; at most `most`.
  int num_worthwhile(const SpeculationLimits& limits, double row_share, int most) const;
  // The first tokens of the guess.
  void guess(std::span<const TokenId> tokens, std::span<TokenId> drafts) const {
    continue_match(tokens, match_, drafts);
  }
  // What became of the guess: `tokens` has grown by the tokens drawn since look_up. `num_drafts`
  // ran; without any, the first token guessed is judged nevertheless.
  void judge(std::span<const TokenId> tokens, int num_drafts);
  const Acceptance& acceptance() const { return acceptance_; }

 private:
  NgramIndex index_;
  Acceptance acceptance_;
  NgramMatch match_;
  int num_tokens_ = 0;  // at look_up
};

}  // namespace turbomind
