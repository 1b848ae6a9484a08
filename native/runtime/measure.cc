#include "runtime/measure.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/error.h"
#include "models/decoder.h"
#include "models/vision_tower.h"
#include "models/weight_loader.h"

namespace turbomind {
namespace {

// Has a size and no memory.
class SizedBuffer final : public Buffer {
 public:
  explicit SizedBuffer(size_t bytes) : bytes_(bytes) {}
  void* data() override { return nullptr; }
  size_t bytes() const override { return bytes_; }

 private:
  size_t bytes_;
};

class SizedWeight final : public LinearWeight {
 public:
  SizedWeight(const LinearSource& source, size_t bytes)
      : k_(source.in_features), n_(source.out_features()), bytes_(bytes) {}
  int64_t in_features() const override { return k_; }
  int64_t out_features() const override { return n_; }
  size_t bytes() const override { return bytes_; }

 private:
  int64_t k_;
  int64_t n_;
  size_t bytes_;
};

[[noreturn]] void no_op() { fail_check("measuring", "an op of a backend that only measures"); }

// Answers loading with sizes and adds them up.
class MeasuringBackend final : public Backend {
 public:
  explicit MeasuringBackend(Backend& device) : device_(device) {}

  size_t take_weights() { return std::exchange(weights_, 0); }
  size_t take_buffers() { return std::exchange(buffers_, 0); }

  DeviceInfo info() const override { return device_.info(); }
  DType activation_dtype() const override { return device_.activation_dtype(); }
  int vision_rows_per_pass() const override { return device_.vision_rows_per_pass(); }

  std::unique_ptr<Buffer> allocate(size_t bytes) override {
    buffers_ += device_.buffer_bytes(bytes);
    return std::make_unique<SizedBuffer>(bytes);
  }
  void upload(TensorView, const void*) override {}
  std::unique_ptr<LinearWeight> load_linear(const LinearSource& source) override {
    return weight(source, WeightUse::linear);
  }
  std::unique_ptr<LinearWeight> load_embedding(ConstTensorView table) override {
    embedding_ = table.data;
    return weight(embedding_source(table), WeightUse::embedding);
  }
  std::unique_ptr<LinearWeight> load_head(const LinearSource& source) override {
    const bool tied = source.parts.at(0).weight.data == embedding_;
    return weight(source, tied ? WeightUse::tied_head : WeightUse::head);
  }
  std::unique_ptr<Buffer> load_vector(ConstTensorView source) override {
    const size_t bytes = static_cast<size_t>(source.elements()) * sizeof(float);
    weights_ += device_.buffer_bytes(bytes);
    return std::make_unique<SizedBuffer>(bytes);
  }

  size_t weight_bytes(const LinearSource& source, WeightUse use) const override {
    return device_.weight_bytes(source, use);
  }
  size_t allocated_bytes() const override { return 0; }
  size_t kv_block_bytes(const KvCacheSpec& spec) const override {
    return device_.kv_block_bytes(spec);
  }
  WorkspaceBytes workspace_bytes(const WorkspaceSpec& spec) const override {
    return device_.workspace_bytes(spec);
  }

  void download(void*, ConstTensorView) override { no_op(); }
  void synchronize() override {}
  std::unique_ptr<Buffer> allocate_host(size_t) override { no_op(); }
  std::unique_ptr<KvCache> make_kv_cache(const KvCacheSpec&) override { no_op(); }
  void copy_blocks(KvCache&, std::span<const std::pair<BlockId, BlockId>>) override { no_op(); }
  void save_blocks(const KvCache&, std::span<const BlockId>, void*) override { no_op(); }
  void load_blocks(KvCache&, std::span<const BlockId>, const void*) override { no_op(); }
  WorkspaceBytes reserve_workspace(const WorkspaceSpec&) override { no_op(); }
  void begin_step(const StepBatch&) override { no_op(); }
  void execute(const std::function<void()>&) override { no_op(); }
  void embed(const EmbedArgs&) override { no_op(); }
  void norm(const Norm&, ConstTensorView, TensorView) override { no_op(); }
  void linear(const LinearArgs&) override { no_op(); }
  void attention(const AttentionArgs&) override { no_op(); }
  void sample(const SampleArgs&) override { no_op(); }
  void logits(const LogitsArgs&, std::span<float>) override { no_op(); }
  void patchify(const PatchifyArgs&) override { no_op(); }
  void vision_embed(const VisionEmbedArgs&) override { no_op(); }
  void vision_attention(const VisionAttentionArgs&) override { no_op(); }
  void pixel_shuffle(const PixelShuffleArgs&) override { no_op(); }

 private:
  std::unique_ptr<LinearWeight> weight(const LinearSource& source, WeightUse use) {
    const size_t bytes = device_.weight_bytes(source, use);
    weights_ += bytes;
    return std::make_unique<SizedWeight>(source, bytes);
  }

  Backend& device_;
  const void* embedding_ = nullptr;
  size_t weights_ = 0;
  size_t buffers_ = 0;
};

}  // namespace

int tiles_per_pass(const Backend& backend, const VisionSpec& spec, int max_tiles) {
  return std::min(max_tiles, VisionTower::tiles_per_pass(spec, backend.vision_rows_per_pass()));
}

size_t image_store_bytes(const Backend& backend, const ModelSpec& spec, const MemoryPlan& steps) {
  return static_cast<size_t>(steps.max_held_tiles) *
         static_cast<size_t>(spec.vision->tokens_per_tile()) *
         static_cast<size_t>(spec.decoder.hidden_size) * dtype_bytes(backend.activation_dtype());
}

Backend::WorkspaceSpec workspace_of(const Backend& backend, const ModelSpec& spec,
                                    const MemoryPlan& steps, const KvCacheSpec& cache,
                                    int session_len) {
  Backend::WorkspaceSpec workspace = Decoder::workspace(
      spec.decoder, steps.max_tokens, steps.max_sequences, steps.max_rows, session_len);
  workspace.kv_bits = cache.bits;
  workspace.kv_block_size = cache.block_size;
  if (!spec.vision) return workspace;
  Backend::WorkspaceSpec vision =
      VisionTower::workspace(*spec.vision, spec.decoder.hidden_size,
                             tiles_per_pass(backend, *spec.vision, steps.max_tiles));
  vision.kv_block_size = cache.block_size;
  return merge(workspace, vision);
}

MemoryParts measure_model(Backend& backend, const WeightStore& store, const ModelSpec& spec,
                          const MemoryPlan& steps, const KvCacheSpec& cache, int session_len) {
  MeasuringBackend measuring(backend);
  WeightLoader loader(measuring, store, spec.quant, nullptr, WeightLoader::Mode::measure);
  MemoryParts parts;
  const Decoder decoder(loader, spec.decoder, steps.max_tokens);
  parts.weights = measuring.take_weights();
  parts.activations = measuring.take_buffers();
  if (spec.vision) {
    const VisionSpec& vision = *spec.vision;
    const VisionTower tower(loader, vision, spec.decoder.hidden_size,
                            tiles_per_pass(backend, vision, steps.max_tiles));
    parts.vision_weights = measuring.take_weights();
    parts.vision_activations = measuring.take_buffers();
    parts.image_embeddings = backend.buffer_bytes(image_store_bytes(backend, spec, steps));
  }
  const WorkspaceBytes workspace =
      backend.workspace_bytes(workspace_of(backend, spec, steps, cache, session_len));
  parts.scratch = workspace.scratch;
  parts.sampling = workspace.sampling;
  parts.graphs = workspace.graphs;
  parts.staging = workspace.staging;
  parts.reserve = backend.slack_bytes();
  return parts;
}

}  // namespace turbomind
