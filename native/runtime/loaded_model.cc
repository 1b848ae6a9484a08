#include "runtime/loaded_model.h"

#include <utility>

#include "base/host_memory_info.h"
#include "io/weights.h"
#include "models/decoder.h"
#include "runtime/device_model.h"
#include "runtime/measure.h"

namespace turbomind {
namespace {

int session_len_of(const EngineOptions& options) {
  const int positions = options.spec.decoder.max_position_embeddings;
  if (options.session_len == 0) return positions;
  if (options.session_len >= 2 && options.session_len <= positions) return options.session_len;
  throw Error(ErrorCode::invalid_argument,
              format("sessionLen is %d; the model has positions for 2 to %d tokens",
                     options.session_len, positions));
}

MemoryBudget budget_of(const EngineOptions& options) {
  MemoryBudget budget;
  budget.session_len = session_len_of(options);
  budget.max_batch_size = options.max_batch_size;
  budget.max_prefill_token_num = options.max_prefill_token_num;
  budget.block_size = options.block_size;
  budget.cache = options.cache;
  budget.max_drafts = options.max_drafts;
  if (options.spec.vision) budget.tokens_per_tile = options.spec.vision->tokens_per_tile();
  return budget;
}

RequestRules rules_of(const ModelSpec& spec) {
  RequestRules rules;
  rules.vocab_size = spec.decoder.vocab_size;
  rules.hidden_size = spec.decoder.hidden_size;
  if (!spec.vision) return rules;
  rules.image_token_id = spec.image_token_id;
  rules.tile_size = spec.vision->image_size;
  rules.tokens_per_tile = spec.vision->tokens_per_tile();
  return rules;
}

// The plan of everything, and what it was made from. `device.free_bytes` is read before anything is
// taken.
struct Planned {
  DeviceInfo device;
  MemoryPlan memory;
  KvCacheSpec cache;
};

Planned plan_model(Backend& backend, const WeightStore& store, const EngineOptions& options) {
  MemoryBudget budget = budget_of(options);
  const MemoryPlan steps = plan_steps(budget);
  Planned planned;
  planned.device = backend.info();
  planned.cache =
      Decoder::kv_cache_spec(options.spec.decoder, options.block_size, 1, options.kv_bits);
  budget.parts =
      measure_model(backend, store, options.spec, steps, planned.cache, budget.session_len);
  budget.block_bytes = backend.kv_block_bytes(planned.cache);
  budget.free_bytes =
      options.cache.free_bytes > 0 ? options.cache.free_bytes : planned.device.free_bytes;
  budget.host_free_bytes = host_memory_info().free_bytes;
  budget.parts.device_is_host = planned.device.name == "cpu";
  if (options.cache.automatic) {
    // A GPU is ours; a machine's memory is shared with everything else on it.
    budget.cache.share = planned.device.name == "cpu" ? 0.5 : 0.9;
  }
  planned.memory = plan_memory(budget);
  planned.cache.num_blocks = planned.memory.num_blocks;
  return planned;
}

}  // namespace

MemoryReport estimate_model(const EngineOptions& options, Backend& backend) {
  validate(options.spec);
  const WeightStore store(options.files);
  const Planned planned = plan_model(backend, store, options);
  return {.device_name = planned.device.name,
          .plan = planned.memory,
          .block_size = planned.cache.block_size,
          .kv_bits = planned.cache.bits,
          .use = {}};
}

EngineParts load_model(const EngineOptions& options, std::unique_ptr<Backend> backend,
                       const ProgressFn& progress) {
  const Clock::time_point begin = Clock::now();
  validate(options.spec);
  auto model = std::make_unique<DeviceModel>(std::move(backend), options.files);
  Backend& device = model->backend();
  const Planned planned = plan_model(device, model->store(), options);
  EngineParts parts;
  parts.memory = planned.memory;
  parts.session_len = session_len_of(options);
  MemoryUse use;
  HostMemory swap = model->start_swap_space(planned.cache, parts.memory.num_swap_blocks,
                                            parts.memory.parts.device_is_host);
  model->load(options.spec, parts.memory, progress, use);
  use.workspace = model->taken_by([&] {
    device.reserve_workspace(
        workspace_of(device, options.spec, parts.memory, planned.cache, parts.session_len));
  });
  use.kv_cache = model->taken_by([&] { model->make_cache(planned.cache); });
  parts.swap_block_ms = model->make_swap_space(parts.memory.num_swap_blocks, std::move(swap));
  use.swap = parts.memory.parts.swap;
  if (!parts.memory.parts.device_is_host) model->warm_up(parts.memory);
  use.allocated = model->allocated_bytes();
  use.device_free = model->device_free_bytes();

  parts.rules = rules_of(options.spec);
  parts.max_prefill_token_num = options.max_prefill_token_num;
  parts.block_size = options.block_size;
  parts.max_drafts = options.max_drafts;
  parts.enable_prefix_caching = options.enable_prefix_caching;
  parts.max_queue_size = options.max_queue_size;
  parts.max_inter_token_ms = options.max_inter_token_ms;
  const MemoryParts& bytes = parts.memory.parts;
  parts.stats.weight_bytes = bytes.weights + bytes.vision_weights;
  parts.stats.kv_cache_bytes = parts.memory.kv_cache_bytes;
  parts.stats.workspace_bytes = bytes.total() - parts.stats.weight_bytes - bytes.reserve;
  parts.stats.memory = {.device_name = planned.device.name,
                        .plan = parts.memory,
                        .block_size = planned.cache.block_size,
                        .kv_bits = planned.cache.bits,
                        .use = use};
  parts.stats.device_name = planned.device.name;
  parts.stats.device_description = planned.device.description;
  parts.stats.load_ms = ms_between(begin, Clock::now());
  parts.model = std::move(model);
  return parts;
}

}  // namespace turbomind
