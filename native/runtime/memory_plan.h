// Decides how many KV blocks there will be, and how large a step may get, before anything is
// allocated. Pure arithmetic; measure.h asks the backend for the sizes that go in.
#pragma once

#include <cstddef>
#include <optional>

namespace turbomind {

// Bytes on the device of everything but the KV cache.
struct MemoryParts {
  size_t weights = 0;  // of the decoder, with embedding and head
  size_t vision_weights = 0;
  size_t activations = 0;  // of the largest step
  size_t vision_activations = 0;
  size_t image_embeddings = 0;  // of max_held_tiles
  size_t scratch = 0;           // Backend::WorkspaceBytes, and so on
  size_t sampling = 0;
  size_t graphs = 0;
  size_t reserve = 0;  // Backend::slack_bytes
  size_t staging = 0;  // host memory: not in total()
  size_t swap = 0;  // host memory for preempted sequences: in total() where the device uses it too
  bool device_is_host = false;

  size_t total() const {
    return weights + vision_weights + activations + vision_activations + image_embeddings +
           scratch + sampling + graphs + reserve + (device_is_host ? swap : 0);
  }
  bool operator==(const MemoryParts&) const = default;
};

// Bytes really taken, by what asked for them. On a device with a reserve each of the first five may
// exceed its plan by a part of that; their sum with the rest never exceeds the whole.
struct MemoryUse {
  size_t decoder = 0;    // weights and activations
  size_t vision = 0;     // the tower's
  size_t workspace = 0;  // scratch and sampling
  size_t kv_cache = 0;
  size_t image_embeddings = 0;
  size_t swap = 0;         // host memory
  size_t allocated = 0;    // on the device now: all of the above but host memory of its own
  size_t device_free = 0;  // as the device said after loading, or when it last ran out of work
  bool operator==(const MemoryUse&) const = default;
};

// How the KV cache is sized. At most one absolute amount is set.
struct CacheBudget {
  double share = 0.8;      // of what the parts leave of free memory, (0, 1]
  bool automatic = false;  // share is chosen for the device
  size_t kv_bytes = 0;     // > 0: the cache, to the block
  size_t total_bytes = 0;  // > 0: parts and cache together
  size_t free_bytes = 0;   // > 0: plan as if the device had so much (estimates)
  // Host memory for preempted sequences, down to whole blocks; none: what suits the device.
  std::optional<size_t> swap_bytes;
};

struct MemoryBudget {
  int session_len = 0;            // tokens
  int max_batch_size = 0;         // sequences
  int max_prefill_token_num = 0;  // tokens
  int max_drafts = 0;             // speculated tokens of a sequence in a step
  int block_size = 0;             // tokens
  CacheBudget cache = {};
  MemoryParts parts = {};
  size_t free_bytes = 0;  // before anything is taken
  size_t host_free_bytes = 0;
  size_t block_bytes = 0;   // of one KV block, all layers
  int tokens_per_tile = 0;  // 0: no vision tower
};

struct MemoryPlan {
  int num_blocks = 0;
  int blocks_per_session = 0;
  size_t kv_cache_bytes = 0;
  size_t block_bytes = 0;
  size_t free_bytes = 0;  // as the plan found it
  MemoryParts parts;
  int max_tokens = 0;     // T of a step: max_prefill_token_num and a decode row for each sequence
  int max_sequences = 0;  // S of a step
  int max_rows = 0;       // R of a step: one for each sequence, and drafts
  int max_tiles = 1;      // encoded in a step: as many as its prefill tokens can use
  int max_held_tiles =
      0;  // whose embeddings exist at a time: those of one full session; 0: no tower
  int num_swap_blocks = 0;
};

// Limits of a step alone; needs no sizes, so that workspaces can be reserved first. Throws
// Error{invalid_argument} for a value out of range.
MemoryPlan plan_steps(const MemoryBudget& budget);

// What swap space takes where nothing is said: nothing on a device that computes in host memory, where
// the same bytes are worth more in the pool; else this much, or a tenth of what the host has free.
inline constexpr size_t kDefaultSwapBytes = size_t{1} << 30;

// Also the pool and the swap space: an absolute amount as given; or min(share of what is free, max_batch_size full
// sessions). Throws Error{out_of_memory} with the numbers if the parts or the amount do not fit
// into free memory, or the pool would not hold one session; Error{invalid_argument} for two amounts.
MemoryPlan plan_memory(const MemoryBudget& budget);

}  // namespace turbomind
