#include "runtime/loaded_model.h"

#include <algorithm>
#include <future>
#include <numeric>
#include <utility>

#include "base/host_memory_info.h"
#include "io/weights.h"
#include "models/decoder.h"
#include "models/vision_tower.h"
#include "models/weight_loader.h"
#include "runtime/measure.h"
#include "runtime/warm_up.h"

namespace turbomind {
namespace {

using HostMemory = std::future<std::unique_ptr<Buffer>>;

// The real model behind the runner's seam. Members die in reverse order: weights may view the
// store's mapping, and everything lives on the backend.
class LoadedModel final : public Model {
 public:
  LoadedModel(std::unique_ptr<Backend> backend, const CheckpointFiles& files)
      : backend_(std::move(backend)), store_(files) {}

  void load(const ModelSpec& spec, const MemoryPlan& steps, const ProgressFn& progress,
            MemoryUse& use);
  void make_cache(const KvCacheSpec& spec) { cache_ = backend_->make_kv_cache(spec); }
  // Host memory for `num_blocks` blocks. A device's is taken on a thread of its own beside what loads
  // meanwhile, since touching and pinning a GiB takes long; the CPU's when it is asked for.
  HostMemory start_swap_space(const KvCacheSpec& spec, int num_blocks, bool device_is_host);
  void warm_up(const MemoryPlan& plan) {
    const bool sees = vision_ != nullptr;
    const TensorView tile = sees ? images_.rows(0, vision_->tokens_per_tile()) : TensorView();
    turbomind::warm_up(*backend_, *decoder_, *cache_, plan, vision_.get(), tile);
  }
  // Answers what copying a block takes, either way, in ms.
  double make_swap_space(int num_blocks, HostMemory taken);
  Backend& backend() { return *backend_; }
  // Bytes on the device that `take` leaves taken.
  template <class Take>
  size_t taken_by(Take&& take) {
    const size_t before = backend_->allocated_bytes();
    take();
    return backend_->allocated_bytes() - before;
  }
  const WeightStore& store() const { return store_; }

  std::unique_ptr<TileEmbeddings> encode_images(ConstTensorView tiles, int first_slot) override {
    TM_CHECK(vision_ != nullptr, "an image for a text model");
    const TensorView view = images_.rows(int64_t{first_slot} * vision_->tokens_per_tile(),
                                         tiles.dim(0) * vision_->tokens_per_tile());
    std::unique_ptr<OpTimer> timer = backend_->start_timer();
    vision_->encode(tiles, view);
    timer->stop();
    return std::make_unique<TileEmbeddings>(view, std::move(timer));
  }
  void copy_blocks(std::span<const std::pair<BlockId, BlockId>> from_to) override {
    backend_->copy_blocks(*cache_, from_to);
  }
  void save_blocks(std::span<const SwapMove> moves) override {
    for_each_run(moves, [this](std::span<const BlockId> blocks, char* host) {
      backend_->save_blocks(*cache_, blocks, host);
    });
  }
  void load_blocks(std::span<const SwapMove> moves) override {
    for_each_run(moves, [this](std::span<const BlockId> blocks, const char* host) {
      backend_->load_blocks(*cache_, blocks, host);
    });
  }
  void forward(const StepBatch& batch, std::span<const EmbeddingOverride> overrides) override {
    decoder_->forward(batch, *cache_, overrides);
  }
  size_t allocated_bytes() const override { return backend_->allocated_bytes(); }
  size_t device_free_bytes() const override { return backend_->info().free_bytes; }
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
  template <class Move>
  void for_each_run(std::span<const SwapMove> moves, Move&& move);

  std::unique_ptr<Backend> backend_;
  WeightStore store_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Buffer> image_store_;
  TensorView images_;             // of it: [slots * tokens per tile, H]
  std::unique_ptr<Buffer> swap_;  // [slots, block bytes] host memory; null: none
  size_t block_bytes_ = 0;
  std::vector<BlockId> moved_;  // of one run
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<VisionTower> vision_;  // null: text model
};

void LoadedModel::load(const ModelSpec& spec, const MemoryPlan& steps, const ProgressFn& progress,
                       MemoryUse& use) {
  LoadProgress report;
  if (progress) {
    report = [&progress](size_t loaded, size_t total) {
      progress(total == 0 ? 1.0 : static_cast<double>(loaded) / static_cast<double>(total));
    };
  }
  WeightLoader loader(*backend_, store_, spec.quant, report);
  use.decoder = taken_by(
      [&] { decoder_ = std::make_unique<Decoder>(loader, spec.decoder, steps.max_tokens); });
  if (!spec.vision) return;
  use.vision = taken_by([&] {
    vision_ =
        std::make_unique<VisionTower>(loader, *spec.vision, spec.decoder.hidden_size,
                                      tiles_per_pass(*backend_, *spec.vision, steps.max_tiles));
  });
  use.image_embeddings = taken_by(
      [&] { image_store_ = backend_->allocate(image_store_bytes(*backend_, spec, steps)); });
  images_ = TensorView(
      image_store_->data(), backend_->activation_dtype(),
      {int64_t{steps.max_held_tiles} * vision_->tokens_per_tile(), spec.decoder.hidden_size});
}

// Calls `move` with the blocks of neighbouring slots, and where the first of them lies.
template <class Move>
void LoadedModel::for_each_run(std::span<const SwapMove> moves, Move&& move) {
  for (size_t begin = 0; begin < moves.size();) {
    moved_.clear();
    const int32_t first = moves[begin].slot;
    for (; begin < moves.size() && moves[begin].slot == first + static_cast<int32_t>(moved_.size());
         ++begin) {
      moved_.push_back(moves[begin].block);
    }
    move(std::span<const BlockId>(moved_),
         static_cast<char*>(swap_->data()) + static_cast<size_t>(first) * block_bytes_);
  }
}

HostMemory LoadedModel::start_swap_space(const KvCacheSpec& spec, int num_blocks,
                                         bool device_is_host) {
  if (num_blocks == 0) return {};
  const size_t bytes = static_cast<size_t>(num_blocks) * backend_->kv_block_bytes(spec);
  return std::async(device_is_host ? std::launch::deferred : std::launch::async,
                    [backend = backend_.get(), bytes] { return backend->allocate_host(bytes); });
}

double LoadedModel::make_swap_space(int num_blocks, HostMemory taken) {
  if (num_blocks == 0) return 0;
  constexpr size_t kTimedBytes = size_t{32} << 20;
  const KvCacheSpec& spec = cache_->spec();
  block_bytes_ = backend_->kv_block_bytes(spec);
  try {
    swap_ = taken.get();
  } catch (const Error& error) {
    throw Error(
        ErrorCode::out_of_memory,
        format("swapSpaceBytes: %.1f MiB of host memory could not be taken (%s); lower it",
               static_cast<double>(num_blocks) * static_cast<double>(block_bytes_) / 1048576.0,
               error.what()));
  }
  const auto most = static_cast<int>(std::min<size_t>(
      static_cast<size_t>(spec.num_blocks), std::max<size_t>(1, kTimedBytes / block_bytes_)));
  moved_.reserve(static_cast<size_t>(spec.num_blocks));
  std::vector<BlockId> blocks(static_cast<size_t>(std::min(num_blocks, most)));
  std::iota(blocks.begin(), blocks.end(), 0);
  double ms = 0;
  for (int round = 0; round < 2; ++round) {  // the first one touches the pages
    const std::unique_ptr<OpTimer> timer = backend_->start_timer();
    backend_->save_blocks(*cache_, blocks, swap_->data());
    backend_->load_blocks(*cache_, blocks, swap_->data());
    timer->stop();
    ms = timer->ms();
  }
  return ms / static_cast<double>(2 * blocks.size());
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
  auto model = std::make_unique<LoadedModel>(std::move(backend), options.files);
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
