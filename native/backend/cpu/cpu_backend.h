// The CPU as a Backend: f32 activations in host memory, ops run at once on the engine thread and a
// team of threads. Owns threads, scratch and the step's batch; leaves linear layers to
// packed_linear.h, attention to attention.h and vision_ops.h, sampling to host_sampler.h.
//
// Every op gives a row the same bits whatever the batch, the row's place in it and the thread
// count.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/attention.h"
#include "backend/cpu/cpu_weight.h"
#include "backend/cpu/host_memory.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/thread_pool.h"
#include "backend/host_sampler.h"

namespace turbomind::cpu {

struct CpuBackendOptions {
  int threads = 0;  // 0: usable_threads()
  std::string isa;  // cap, "" for the machine's best
};

class CpuBackend : public Backend {
 public:
  // Throws Error{unsupported_device | invalid_argument}.
  explicit CpuBackend(const CpuBackendOptions& options);
  ~CpuBackend() override;

  DeviceInfo info() const override;
  DType activation_dtype() const override { return DType::f32; }

  std::unique_ptr<Buffer> allocate(size_t bytes) override;
  void upload(TensorView device, const void* host) override;
  void download(void* host, ConstTensorView device) override;
  void synchronize() override {}
  std::unique_ptr<Buffer> allocate_host(size_t bytes) override;

  size_t weight_bytes(const LinearSource& source, WeightUse use) const override;
  size_t allocated_bytes() const override;

  std::unique_ptr<LinearWeight> load_linear(const LinearSource& source) override;
  std::unique_ptr<LinearWeight> load_embedding(ConstTensorView table) override;
  std::unique_ptr<LinearWeight> load_head(const LinearSource& source) override;
  std::unique_ptr<Buffer> load_vector(ConstTensorView source) override;

  size_t kv_block_bytes(const KvCacheSpec& spec) const override;
  std::unique_ptr<KvCache> make_kv_cache(const KvCacheSpec& spec) override;
  void copy_blocks(KvCache& cache, std::span<const std::pair<BlockId, BlockId>> from_to) override;
  void save_blocks(const KvCache& cache, std::span<const BlockId> blocks, void* host) override;
  void load_blocks(KvCache& cache, std::span<const BlockId> blocks, const void* host) override;
  WorkspaceBytes workspace_bytes(const WorkspaceSpec& spec) const override;
  WorkspaceBytes reserve_workspace(const WorkspaceSpec& spec) override;

  void begin_step(const StepBatch& batch) override;
  void execute(const std::function<void()>& forward) override { forward(); }

  void embed(const EmbedArgs& args) override;
  void norm(const Norm& norm, ConstTensorView x, TensorView y) override;
  void linear(const LinearArgs& args) override;
  void attention(const AttentionArgs& args) override;
  // Rows that cannot be sampled keep token -1 and the others are valid; then throws
  // Error{device_error} (logits not finite) or Error{invalid_argument} (all tokens banned).
  void sample(const SampleArgs& args) override;
  void logits(const LogitsArgs& args, std::span<float> out) override;
  void patchify(const PatchifyArgs& args) override;
  void vision_embed(const VisionEmbedArgs& args) override;
  void vision_attention(const VisionAttentionArgs& args) override;
  void pixel_shuffle(const PixelShuffleArgs& args) override;

  // Tests: score all rows in full, never through PackedHead::best_logits.
  void set_exhaustive_sampling() { exhaustive_sampling_ = true; }

 private:
  struct Sizes {
    size_t linear, vision, sample_x, scores, attention;
  };
  Sizes sizes(const WorkspaceSpec& spec) const;
  const CpuHead& head_of(const LinearWeight* weight, ConstTensorView x) const;
  void gather_sample_rows(const SampleArgs& args);
  void sample_rows(const SampleArgs& args, const PackedHead& head, std::span<const int> rows,
                   int best);
  void report_failures(std::span<const SampleStatus> statuses) const;

  Isa isa_;
  ThreadPool pool_;
  PagedAttention attention_;
  StepBatch batch_;
  MemoryMeter meter_;  // of buffers, weights and caches; the workspace is asked
  HostMemory linear_scratch_;
  HostMemory vision_scratch_;
  HostMemory sample_x_;                // [R, H] normed rows, then [kLogitRows, H] of one group
  HostMemory scores_;                  // [kLogitRows, V]
  std::vector<HostSampler> samplers_;  // one a thread
  std::vector<SampleStatus> statuses_;
  std::vector<int> best_rows_;
  std::vector<int> full_rows_;
  bool exhaustive_sampling_ = false;
};

}  // namespace turbomind::cpu
