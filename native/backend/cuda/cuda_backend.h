// class Backend on one NVIDIA GPU: one stream, one engine thread. Owns the pool, the workspace, the
// arrays of the current step and the captured decode graphs; leaves the kernels to kernels/ and gemm/.
// Opening, memory and timers are in cuda_backend.cc; loading in cuda_weights.cc; cuda_workspace.cc takes
// a step's memory, cuda_step.cc fills its arrays, cuda_execute.cc runs it; ops lie in cuda_*_ops.cc.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/cuda_graph.h"
#include "backend/cuda/cuda_kv_cache.h"
#include "backend/cuda/cuda_linear.h"
#include "backend/cuda/cuda_memory.h"
#include "backend/cuda/cuda_sampler.h"
#include "backend/cuda/cuda_upload.h"
#include "backend/cuda/kernels/kernels.h"
#include "backend/cuda/split_norms.h"
#include "backend/cuda/staged_upload.h"
#include "backend/cuda_api.h"

namespace turbomind::cuda {

std::unique_ptr<Backend> make_cuda_backend(const CreateOptions& options);
// Throws Error{unsupported_device} for a device older than any kernel.
void check_supported(int device, const cudaDeviceProp& properties);

// What tests and benchmarks look at.
struct CudaCounters {
  size_t driver_allocations = 0;
  size_t graph_captures = 0;
  size_t bytes_in_use = 0;
  size_t rows_on_host = 0;  // sampled by HostSampler
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const CreateOptions& options);
  ~CudaBackend() override;

  DeviceInfo info() const override;
  DType activation_dtype() const override { return dtype_; }
  int vision_rows_per_pass() const override { return 13 * 1025; }  // 12 tiles and a thumbnail
  std::unique_ptr<Buffer> allocate(size_t bytes) override;
  void upload(TensorView device, const void* host) override;
  void download(void* host, ConstTensorView device) override;
  void synchronize() override;
  std::unique_ptr<OpTimer> start_timer() override;
  std::unique_ptr<Buffer> allocate_host(size_t bytes) override;

  size_t buffer_bytes(size_t bytes) const override { return DevicePool::size_of(bytes); }
  size_t weight_bytes(const LinearSource& source, WeightUse use) const override;
  size_t slack_bytes() const override;
  size_t allocated_bytes() const override {
    return pool_.bytes_in_use() - (weight_upload_ ? weight_upload_->device_bytes() : 0);
  }

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
  void execute(const std::function<void()>& forward) override;

  void embed(const EmbedArgs& args) override;
  void norm(const Norm& norm, ConstTensorView x, TensorView y) override;
  void linear(const LinearArgs& args) override;
  void attention(const AttentionArgs& args) override;
  void start_sample(const SampleArgs& args) override;
  void sample(const SampleArgs& args) override;
  bool launch_sample(const SampleArgs& args) override;
  void collect_sample(std::span<SampleResult> results) override;
  void logits(const LogitsArgs& args, std::span<float> out) override;
  void patchify(const PatchifyArgs& args) override;
  void vision_embed(const VisionEmbedArgs& args) override;
  void vision_attention(const VisionAttentionArgs& args) override;
  void pixel_shuffle(const PixelShuffleArgs& args) override;

  CudaCounters counters() const;
  const LaunchContext& context() const { return context_; }
  // Asks for one row of the GEMM table by name where it fits (tests, benchmarks); empty: the best.
  void force_gemm(std::string_view name) { forced_gemm_ = name; }

 private:
  // Everything sized by reserve_workspace.
  struct Workspace {
    WorkspaceSpec spec;
    std::unique_ptr<Buffer> arrays;  // StepArrays
    std::unique_ptr<Buffer> blob;    // one step's upload
    std::unique_ptr<PinnedBuffer> staging[2];
    Event staged[2];
    int next_staging = 0;
    std::unique_ptr<Buffer> scratch;  // T [max_tokens, max_in_features padded]
    size_t scratch_row_elements = 0;
    std::unique_ptr<Buffer> gemm_partials;
    std::unique_ptr<Buffer> gemm_tickets;
    int max_items = 0;
    int max_tiles = 0;
    int max_blocks = 0;
    std::unique_ptr<Buffer> attention_records;
    std::unique_ptr<CudaSampler> sampler;  // null without a vocabulary
    std::vector<int32_t> fed_rows;         // see SampledStep
    StepArrays step;
  };
  struct WorkspaceSizes;
  // Sizes of the current step.
  struct Step {
    int tokens = 0;
    int sequences = 0;
    int rows = 0;  // sampled
    int items = 0;
    int decode_rows = 0;  // most rows of a sequence with decode items, rounded up
    int tiles = 0;
    int padded_rows = 0;  // of a decode step: its bucket; else tokens
    int padded_items = 0;
    bool decode_only = false;
    int slot = 0;                        // of the staging, and of the sampler's results
    const void* started_head = nullptr;  // whose logits start_sample has launched
  };

  void use_device() const { cuda_check(cudaSetDevice(device_), "selecting the device"); }
  std::unique_ptr<Buffer> zeroed(size_t bytes);
  bool is_ready() const { return workspace_.blob != nullptr; }
  WeightUpload& weight_upload();
  void finish_loading();
  std::unique_ptr<CudaLinear> load_dense(const LinearSource& source);
  std::unique_ptr<CudaLinear> load_awq(const LinearSource& source);
  void load_bias(const LinearSource& source, CudaLinear& linear);
  void load_dense_part(const LinearSource& source, size_t part_idx, int64_t base,
                       const CudaLinear& linear);

  // All pieces of one block, between the cache and itself or packed host memory.
  void copy_pieces(const CudaKvCache& cache, char* to, size_t to_pitch, const char* from,
                   size_t from_pitch, cudaMemcpyKind kind);

  // While a graph is recorded, an op over the step's tokens runs over the padded rows.
  int launch_rows(int64_t rows) const;
  // Signature pass: mixes an op's identity, and learns how many rows its buffers could hold.
  void sign(std::initializer_list<uint64_t> values);
  void sign_view(const void* data, int64_t row_bytes);
  static uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

  // `args`: all but the matrix and the workspace.
  void run_gemm(const CudaLinear& weight, GemmArgs args);
  const void* padded_input(const CudaLinear& weight, const void* x, int rows, int64_t* ldx);
  // Rows of x that `gather` lists (device memory; null: the first `rows`) to the sampler's logits.
  void compute_logits(const LogitsArgs& args, const int32_t* gather, int rows);
  // Logits of the step's sample rows and their greedy tokens, on the way to the host.
  void launch_head(const SampleArgs& args, int rows);
  // The head if start_sample has not launched it. What the sampler needs to know of the step.
  SampledStep ready_to_sample(const SampleArgs& args);
  SampledStep sampled_step() const;
  int plan_attention(const StepBatch& batch);

  int device_ = 0;
  DType dtype_ = DType::bf16;
  bool use_graphs_ = true;
  cudaDeviceProp properties_{};
  DevicePool pool_;
  std::unique_ptr<CudaStreamOwner> stream_;
  LaunchContext context_;
  std::unique_ptr<StagedUpload> staged_upload_;
  std::unique_ptr<WeightUpload> weight_upload_;  // while weights are loaded
  std::unordered_map<const void*, std::weak_ptr<Buffer>> dense_by_source_;
  Workspace workspace_;
  SplitNorms split_norms_;  // z lies in the workspace's scratch
  Step step_;
  GraphCache graphs_;
  std::unique_ptr<Buffer> tiles_;  // u8 pixels of a vision batch
  std::string_view forced_gemm_;

  enum class Mode { run, sign };
  Mode mode_ = Mode::run;
  int graph_rows_ = 0;  // > 0 while recording
  uint64_t signature_ = 0;
  int64_t capacity_rows_ = 0;
  bool capturable_ = true;
  // Live buffers handed out by allocate: their bytes, for sign_view.
  std::shared_ptr<std::unordered_map<const void*, size_t>> live_buffers_;
};

}  // namespace turbomind::cuda
