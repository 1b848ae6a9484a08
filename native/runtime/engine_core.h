// The engine without loading: a model that is already there behind the seam `Model`. Engine::open
// (engine_open.cc) makes one from a checkpoint, tests from a scripted model.
#pragma once

#include <memory>

#include "runtime/engine.h"
#include "runtime/memory_plan.h"
#include "runtime/model_runner.h"
#include "runtime/request_check.h"

namespace turbomind {

struct EngineParts {
  std::unique_ptr<Model> model;
  MemoryPlan memory;
  RequestRules rules;
  int session_len = 0;            // tokens
  int max_prefill_token_num = 0;  // tokens
  int block_size = 0;             // tokens
  bool enable_prefix_caching = true;
  int max_queue_size = 0;         // 0: no limit
  double max_inter_token_ms = 0;  // 0: no goal
  int max_drafts = 0;             // speculated tokens of a sequence in a step
  bool measure_drafts = true;     // false (tests): draft at every match, whether it pays or not
  double swap_block_ms = 0;       // to copy one KV block to or from host memory
  EngineStats stats;              // weight, cache and workspace bytes, load time, device
};

enum class Stepping : uint8_t { own_thread, manual };

// The sink is called on the engine thread (manual: the caller of step) and must not throw.
std::unique_ptr<Engine> make_engine(EngineParts parts, EventSink sink, Stepping stepping);

}  // namespace turbomind
