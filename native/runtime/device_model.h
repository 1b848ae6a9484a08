// The real model behind the runner's seam: backend, weights, decoder, vision tower, KV cache, pictures'
// embeddings and swap space. Taken part by part by the thread that opens the engine (loaded_model.h), used
// by the engine's.
#pragma once

#include <future>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "io/weights.h"
#include "models/decoder.h"
#include "models/vision_tower.h"
#include "runtime/engine.h"
#include "runtime/memory_plan.h"
#include "runtime/model_runner.h"

namespace turbomind {

using HostMemory = std::future<std::unique_ptr<Buffer>>;  // on its way

// Members die in reverse order: weights may view the store's mapping, and everything lives on the backend.
class DeviceModel final : public Model {
 public:
  DeviceModel(std::unique_ptr<Backend> backend, const CheckpointFiles& files)
      : backend_(std::move(backend)), store_(files) {}

  void load(const ModelSpec& spec, const MemoryPlan& steps, const ProgressFn& progress,
            MemoryUse& use);
  void make_cache(const KvCacheSpec& spec) { cache_ = backend_->make_kv_cache(spec); }
  // Host memory for `num_blocks` blocks. A device's is taken on a thread of its own beside what loads
  // meanwhile, since touching and pinning a GiB takes long; the CPU's when it is asked for.
  HostMemory start_swap_space(const KvCacheSpec& spec, int num_blocks, bool device_is_host);
  void warm_up(const MemoryPlan& plan);
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

  std::unique_ptr<TileEmbeddings> encode_images(ConstTensorView tiles, int first_slot) override;
  void copy_blocks(std::span<const std::pair<BlockId, BlockId>> from_to) override {
    backend_->copy_blocks(*cache_, from_to);
  }
  void save_blocks(std::span<const SwapMove> moves) override;
  void load_blocks(std::span<const SwapMove> moves) override;
  void forward(const StepBatch& batch, std::span<const EmbeddingOverride> overrides) override {
    decoder_->forward(batch, *cache_, overrides);
  }
  size_t allocated_bytes() const override { return backend_->allocated_bytes(); }
  size_t device_free_bytes() const override { return backend_->info().free_bytes; }
  void synchronize() override { backend_->synchronize(); }
  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) override;
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

}  // namespace turbomind
