// Decides how many KV blocks there will be, and how large a step may get, before anything of it is
// allocated. Pure arithmetic; the engine asks the backend for the sizes that go in.
#pragma once

#include <cstddef>

namespace turbomind {

struct MemoryBudget {
  int session_len = 0;                 // tokens
  int max_batch_size = 0;              // sequences
  int max_prefill_token_num = 0;       // tokens
  int max_drafts = 0;                  // speculated tokens of a sequence in a step
  int block_size = 0;                  // tokens
  double cache_max_entry_count = 0.8;  // share of free_bytes for KV blocks, (0, 1]
  size_t free_bytes = 0;               // after weights and workspace
  size_t block_bytes = 0;              // of one KV block, all layers
  int tokens_per_tile = 0;             // 0: no vision tower
};

struct MemoryPlan {
  int num_blocks = 0;
  int blocks_per_session = 0;
  size_t kv_cache_bytes = 0;
  int max_tokens = 0;     // T of a step: max_prefill_token_num and a decode row for each sequence
  int max_sequences = 0;  // S of a step
  int max_rows = 0;       // R of a step: one for each sequence, and drafts
  int max_tiles = 1;      // encoded in a step: as many as its prefill tokens can use
};

// Limits of a step alone; needs no sizes, so that workspaces can be reserved first. Throws
// Error{invalid_argument} for a value out of range.
MemoryPlan plan_steps(const MemoryBudget& budget);

// Also the pool: min(share of free memory, max_batch_size full sessions). Throws
// Error{out_of_memory} if it would not hold one session.
MemoryPlan plan_memory(const MemoryBudget& budget);

}  // namespace turbomind
