// Who runs in one step: rows of tokens, what must happen to blocks and image tiles before they run,
// and the limits they were granted under. Made by the scheduler, run by the model runner.
// Engine thread.
#pragma once

#include <span>
#include <utility>
#include <vector>

#include "runtime/sequence.h"

namespace turbomind {

// What is left of a step's limits while it is planned.
struct StepBudget {
  int tokens = 0;       // prefill tokens
  int tiles = 0;        // image tiles to encode
  int tile_tokens = 0;  // prefill tokens that take as long as a tile; 0: tiles cost none
};

struct ScheduledRow {
  Sequence* sequence = nullptr;  // null: ended since; its results are dropped
  int num_tokens = 0;            // from num_computed() + ahead on
  int num_samples = 0;           // the last so many of them are sampled; 0: a chunk inside the
                                 // prompt, or the end of one without a completion
  // 1: runs ahead of a step that is not committed yet; its token is the one drawn by row
  // `fed_from` (of R) of that step.
  int ahead = 0;
  int fed_from = -1;

  // All sampled tokens but the first are drafts, behind the sequence's known tokens.
  int num_drafts() const { return num_samples > 1 ? num_samples - 1 : 0; }
};

// Tiles to encode before the rows run.
struct ScheduledTiles {
  Sequence* sequence = nullptr;  // that the time counts for; null: ended since
  int image_idx = 0;
  int first_tile = 0;
  int num_tiles = 0;
  int first_slot = 0;  // where the embeddings go: neighbouring slots
  std::shared_ptr<EncodedImage> image;
};

// A block and its place in host memory.
struct SwapMove {
  BlockId block = -1;
  int32_t slot = -1;
};

// Valid until the next call of the scheduler that made it. Blocks are saved before any is written,
// and all moves come before tiles and rows.
struct StepPlan {
  std::vector<SwapMove> saves;  // of preempted sequences, to host memory
  std::vector<SwapMove> loads;  // of sequences that join again, from host memory
  std::vector<std::pair<BlockId, BlockId>> copies;  // (from, to)
  std::vector<ScheduledTiles> tiles;
  std::vector<ScheduledRow> rows;  // decode rows first
  int num_decode = 0;              // decode rows
  int num_tokens = 0;
  int num_prefill_tokens = 0;
  int num_samples = 0;  // R: those of all rows

  bool empty() const { return rows.empty(); }
  // Tiles that were not encoded may be scheduled again.
  void clear();
  // A sequence that draws its next token; also one that joins with all others found in the cache.
  void add_decode(Sequence& sequence);
  // A decode row of the token that row `fed_from` of the step before will draw.
  void add_ahead(Sequence& sequence, int fed_from);
  // Leaves the sequence's row, which may be on the device, without an owner.
  void forget(const Sequence& sequence);
  // Appends drafts to the decode row rows[row]; their blocks must have been granted.
  void add_drafts(size_t row, std::span<const TokenId> drafts);
  // The next prefill chunk of `sequence` and the tiles it needs that nobody has encoded; answers its
  // tokens, 0 if the budget allows none. A chunk may end anywhere, but not in a tile that is not
  // encoded yet.
  int add_prefill(Sequence& sequence, StepBudget& budget);
  // Whether `sequence` would get a row if its first `num_computed` tokens were in the cache.
  static bool can_start(const Sequence& sequence, int num_computed, const StepBudget& budget);

 private:
  int grant_tiles(Sequence& sequence, int image_idx, int begin, int end, StepBudget& budget);
};

}  // namespace turbomind
