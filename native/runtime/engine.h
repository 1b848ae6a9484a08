// Owns a model, its KV cache and one thread that plans and runs steps. All public functions may be
// called from any thread; the event sink is called on the engine thread.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/backends.h"
#include "models/model_spec.h"
#include "runtime/memory_plan.h"
#include "runtime/request.h"

namespace turbomind {

struct EngineOptions {
  ModelSpec spec;
  CheckpointFiles files;
  BackendOptions backend;
  std::optional<DType> dtype;       // of a GPU's activations: f16 or bf16; none: the checkpoint's
  int session_len = 0;              // tokens of prompt and completion; 0: the model's positions
  int max_batch_size = 128;         // sequences in one step
  int max_prefill_token_num = 512;  // token budget of one step
  int block_size = 64;              // tokens a KV block
  CacheBudget cache;
  bool enable_prefix_caching = true;  // equal prefixes are computed once
  int max_queue_size = 0;             // requests that may wait for their first step; 0: no limit
  double max_inter_token_ms = 0;      // goal for steps of running streams; 0: none
  int max_drafts = 0;                 // speculated tokens of a sequence in a step, 0 to 7; 0: none
  int kv_bits = 16;                   // 16: the backend's unquantised cache; 8 | 4
  bool manual_stepping = false;       // tests: no thread; the owner calls step()
};

// What was planned before loading, and what is really taken; nothing more is taken after loading.
struct MemoryReport {
  std::string device_name;
  MemoryPlan plan;
  int block_size = 0;  // tokens
  int kv_bits = 16;
  MemoryUse use;  // all 0 for an estimate
};

// How long steps took, from the launch to their tokens: counts of those up to each bound and past the
// one before, the last count past all bounds.
struct StepTimes {
  static constexpr std::array<double, 20> kBoundsMs{
      0.5, 1, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2500};
  std::array<uint64_t, kBoundsMs.size() + 1> counts{};
  double sum_ms = 0;

  void observe(double ms) {
    const auto bound = std::lower_bound(kBoundsMs.begin(), kBoundsMs.end(), ms);
    ++counts[static_cast<size_t>(bound - kBoundsMs.begin())];
    sum_ms += ms;
  }
};

struct EngineStats {
  int running = 0;  // sequences holding blocks
  int waiting = 0;  // sequences queued
  int total_blocks = 0;
  int free_blocks = 0;
  int cached_blocks = 0;  // of the free ones, those that can still be found by their content
  uint64_t steps = 0;
  StepTimes step_times;
  int swap_blocks = 0;  // of host memory
  int free_swap_blocks = 0;
  uint64_t preemptions = 0;
  uint64_t swaps_out = 0;  // of these, by saving blocks to host memory instead of computing again
  uint64_t swaps_in = 0;   // of these, that have gone on with those blocks
  uint64_t prompt_tokens = 0;  // computed, preempted work counted again
  uint64_t completion_tokens = 0;
  uint64_t drafted_tokens = 0;   // run as guesses
  uint64_t accepted_tokens = 0;  // of these, that were right
  uint64_t prefix_queries = 0;   // prompt tokens of the requests that began
  uint64_t prefix_hits = 0;      // of these, found in the cache
  size_t weight_bytes = 0;
  size_t kv_cache_bytes = 0;
  size_t workspace_bytes = 0;
  MemoryReport memory;
  double load_ms = 0;
  int session_len = 0;
  std::string device_name;
  std::string device_description;
};

using EventSink = std::function<void(std::vector<Event>)>;
using ProgressFn = std::function<void(double)>;  // share of weight bytes loaded, 0..1

class Engine {
 public:
  // Blocks while weights load (call it off the JS thread). Throws Error.
  static std::unique_ptr<Engine> open(EngineOptions options, EventSink sink, ProgressFn progress);
  virtual ~Engine() = default;  // close()
  // The memory plan of an engine that is not opened. Reads no weights. Throws Error as open would.
  static MemoryReport estimate(EngineOptions options);

  // Never throws for a bad request: it is answered by an error event. After close: Error{disposed}.
  virtual void submit(Request request) = 0;
  virtual void abort(RequestId id) = 0;
  // Which tokens a guided request may draw as token `completion_idx` of its completion; nothing: all
  // of them. The first may be said at once after submit, each later one once the token before it has
  // been reported. Anything that is not about the next token of a guided request is passed over. A
  // request whose mask is late is left out of steps until it is there.
  virtual void set_mask(RequestId id, uint32_t completion_idx, TokenMask mask) = 0;
  // The answer to an offer of Request::edits_logits: [V]; a token is drawn from them at once.
  // Throws Error{invalid_argument} for another number of logits.
  virtual void set_logits(RequestId id, uint32_t completion_idx, std::vector<float> logits) = 0;
  virtual EngineStats stats() const = 0;
  // Aborts what runs, joins the thread, frees everything. Idempotent.
  virtual void close() = 0;
  virtual bool step() = 0;  // manual_stepping only; false when there was nothing to do
  // Logits of the token after `request`'s prompt, [V] f32; runs alone, for parity tests.
  virtual std::vector<float> prompt_logits(const Request& request) = 0;
};

}  // namespace turbomind
