// Turns the step's logits into tokens. Greedy rows need no more than the scan that runs with the head;
// what else a row asks for goes to the GPU in one upload, overlapped with the forward, and only ids and
// the log-probabilities asked for come back. Rows beyond the GPU's limits (kernels.h) go through
// HostSampler, which gives the same tokens. Engine thread.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/cuda_memory.h"
#include "backend/cuda/kernels/kernels.h"
#include "backend/host_sampler.h"

namespace turbomind::cuda {

// Sizes of a sampler, a pure function of the workspace it is for.
struct SamplerSizes {
  int rows = 0;  // of logits
  int64_t vocab = 0;
  int tasks = 0;           // rows that one step may sample
  int spare_rows = 0;      // raw logits kept beside edited ones
  size_t words = 0;        // of uploaded token lists and masks
  size_t top_entries = 0;  // of best tokens that come back
};
SamplerSizes sampler_sizes(const Backend::WorkspaceSpec& spec, int logit_rows);
// Bytes of each device buffer.
std::array<size_t, 6> sampler_buffers(const SamplerSizes& sizes);
size_t sampler_host_bytes(const SamplerSizes& sizes);

class CudaSampler {
 public:
  CudaSampler(const SamplerSizes& sizes, const LaunchContext& context, DevicePool& pool);

  float* logits() const { return static_cast<float*>(logits_->data()); }  // [rows, V]
  const SamplerSizes& sizes() const { return sizes_; }

  // Queues the scan of `rows` rows of logits and the copy of their best tokens. May be captured.
  void scan(const LaunchContext& context, int rows, int64_t vocab);
  // Draws for logits that scan() was queued for. Waits. Throws once the other rows are drawn if some
  // cannot be, their tokens left at -1.
  void sample(const LaunchContext& context, int64_t vocab, std::span<const SampleRow> rows,
              std::span<SampleResult> results);
  size_t rows_on_host() const { return rows_on_host_; }  // so far; for tests

 private:
  enum class Way : uint8_t { greedy, device, host };
  Way add(const SampleRow& row, int row_idx, int64_t vocab);
  bool fits(const SampleRow& row, int64_t vocab) const;
  uint32_t* take_words(size_t count, int32_t* offset);
  void launch_tasks(const LaunchContext& context, int64_t vocab);
  SampleStatus finish(int task, int64_t vocab, SampleResult& result) const;
  SampleStatus sample_on_host(const LaunchContext& context, int64_t vocab, int row_idx,
                              const SampleRow& row, SampleResult& result);

  SamplerSizes sizes_;
  bool kernel_fits_ = false;
  std::unique_ptr<Buffer> logits_;     // f32 [rows, V]
  std::unique_ptr<Buffer> block_max_;  // f32 [rows, V / 64]
  std::unique_ptr<Buffer> scan_;
  std::unique_ptr<Buffer> ids_;    // i32 [rows]
  std::unique_ptr<Buffer> tasks_;  // SampleTask [tasks], words
  std::unique_ptr<Buffer> spare_;  // f32 [spare_rows, V]
  PinnedBuffer host_ids_;
  PinnedBuffer host_tasks_;
  PinnedBuffer host_outputs_;
  PinnedBuffer host_logits_;  // f32 [V]
  std::unique_ptr<CudaStreamOwner> upload_stream_;
  Event uploaded_;
  std::vector<Way> ways_;       // [R]
  std::vector<int> task_rows_;  // row of each task
  size_t used_words_ = 0;
  size_t used_top_ = 0;
  int used_spare_ = 0;
  HostSampler host_sampler_;
  size_t rows_on_host_ = 0;
};

}  // namespace turbomind::cuda
