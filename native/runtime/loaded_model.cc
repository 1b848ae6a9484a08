#include "runtime/loaded_model.h"

#include <algorithm>
#include <utility>

#include "io/weights.h"
#include "models/decoder.h"
#include "models/vision_tower.h"
#include "models/weight_loader.h"
#include "runtime/measure.h"

namespace turbomind {
namespace {

// The real model behind the runner's seam. Members die in reverse order: weights may view the
// store's mapping, and everything lives on the backend.
class LoadedModel final : public Model {
 public:
  LoadedModel(std::unique_ptr<Backend> backend, const CheckpointFiles& files)
      : backend_(std::move(backend)), store_(files) {}

  void load(const ModelSpec& spec, const MemoryPlan& steps, const ProgressFn& progress);
  void make_cache(const KvCacheSpec& spec) { cache_ = backend_->make_kv_cache(spec); }
  Backend& backend() { return *backend_; }
  const WeightStore& store() const { return store_; }

  std::unique_ptr<TileEmbeddings> encode_images(ConstTensorView tiles) override {
    TM_CHECK(vision_ != nullptr, "an image for a text model");
    std::unique_ptr<OpTimer> timer = backend_->start_timer();
    std::unique_ptr<Buffer> buffer = vision_->encode(tiles);
    timer->stop();
    const ConstTensorView view = vision_->embeddings(*buffer, static_cast<int>(tiles.dim(0)));
    return std::make_unique<TileEmbeddings>(std::move(buffer), view, std::move(timer));
  }
  void copy_blocks(std::span<const std::pair<BlockId, BlockId>> from_to) override {
    backend_->copy_blocks(*cache_, from_to);
  }
  void forward(const StepBatch& batch, std::span<const EmbeddingOverride> overrides) override {
    decoder_->forward(batch, *cache_, overrides);
  }
  void synchronize() override { backend_->synchronize(); }
  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    decoder_->sample(rows, results);
    // Without a row nobody waited, and the step's host arrays are about to change.
    if (rows.empty()) backend_->synchronize();
  }
  bool launch_sample(std::span<const SampleRow> rows) override {
    return decoder_->launch_sample(rows);
  }
  void collect_sample(std::span<SampleResult> results) override {
    decoder_->collect_sample(results);
  }
  void logits(int first_row, std::span<float> out) override { decoder_->logits(first_row, out); }
  void hidden_states(int first_row, std::span<float> out) override {
    decoder_->hidden_states(first_row, out);
  }

 private:
  std::unique_ptr<Backend> backend_;
  WeightStore store_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<VisionTower> vision_;  // null: text model
};

void LoadedModel::load(const ModelSpec& spec, const MemoryPlan& steps, const ProgressFn& progress) {
  LoadProgress report;
  if (progress) {
    report = [&progress](size_t loaded, size_t total) {
      progress(total == 0 ? 1.0 : static_cast<double>(loaded) / static_cast<double>(total));
    };
  }
  WeightLoader loader(*backend_, store_, spec.quant, report);
  decoder_ = std::make_unique<Decoder>(loader, spec.decoder, steps.max_tokens);
  if (spec.vision) {
    vision_ =
        std::make_unique<VisionTower>(loader, *spec.vision, spec.decoder.hidden_size,
                                      tiles_per_pass(*backend_, *spec.vision, steps.max_tiles));
  }
}

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
          .kv_bits = planned.cache.bits};
}

EngineParts load_model(const EngineOptions& options, std::unique_ptr<Backend> backend,
                       const ProgressFn& progress) {
  const Clock::time_point begin = Clock::now();
  validate(options.spec);
  auto model = std::make_unique<LoadedModel>(std::move(backend), options.files);
  Backend& device = model->backend();
  const Planned planned = plan_model(device, model->store(), options);
  EngineParts parts;
  parts.memory = planned.memory;
  parts.session_len = session_len_of(options);
  model->load(options.spec, parts.memory, progress);
  device.reserve_workspace(
      workspace_of(device, options.spec, parts.memory, planned.cache, parts.session_len));
  model->make_cache(planned.cache);

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
                        .allocated_bytes = device.allocated_bytes()};
  parts.stats.device_name = planned.device.name;
  parts.stats.device_description = planned.device.description;
  parts.stats.load_ms = ms_between(begin, Clock::now());
  parts.model = std::move(model);
  return parts;
}

}  // namespace turbomind
