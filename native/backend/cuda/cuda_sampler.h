// Turns the step's logits into tokens. Greedy rows need no more than the scan that runs with the head;
// what else a row asks for goes to the GPU in one upload, overlapped with the forward, and only ids and
// the log-probabilities asked for come back. Rows beyond the GPU's limits (kernels.h) go through
// HostSampler, which gives the same tokens. Steps take turns with two sets of host memory, so that one
// may be launched while the results of the one before are still to be read. What rows ask for is written
// by cuda_sampler_tasks.cc. Engine thread.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/cuda_memory.h"
#include "backend/cuda/cuda_sampler_sizes.h"
#include "backend/cuda/kernels/kernels.h"
#include "backend/host_sampler.h"

namespace turbomind::cuda {

// The step whose rows are sampled, as far as that concerns the sampler.
struct SampledStep {
  int slot = 0;                          // 0 | 1: where its results go; steps take turns
  const int32_t* device_slot = nullptr;  // the same on the device; null: 0
  const int32_t* token_ids = nullptr;    // [T] on the device
  // [R] or empty. Row of T of a sample row whose id the step before draws, so that the last of its
  // SampleRow::tokens is known on the device alone; -1: known.
  std::span<const int32_t> fed_rows{};
};

class CudaSampler {
 public:
  CudaSampler(const SamplerSizes& sizes, const LaunchContext& context, DevicePool& pool);

  float* logits() const { return static_cast<float*>(logits_->data()); }  // [rows, V]
  const SamplerSizes& sizes() const { return sizes_; }

  int32_t* ids() const { return static_cast<int32_t*>(ids_->data()); }  // [rows] drawn last

  // Queues the scan of `rows` rows of logits and the copy of their best tokens. May be captured.
  void scan(const LaunchContext& context, int rows, int64_t vocab, const SampledStep& step = {});
  // Draws for logits that scan() was queued for. Waits. Throws once the other rows are drawn if some
  // cannot be, their tokens left at -1. Every fed row's id is known to the host by now.
  void sample(const LaunchContext& context, int64_t vocab, std::span<const SampleRow> rows,
              std::span<SampleResult> results, const SampledStep& step = {});
  // sample() in two halves. False, having queued nothing: a row needs the host, for its limits or
  // because a ban depends on an id that is not known yet. Two may be launched, in different slots.
  bool launch(const LaunchContext& context, int64_t vocab, std::span<const SampleRow> rows,
              const SampledStep& step);
  // Of the oldest launch.
  void collect(std::span<SampleResult> results);
  size_t rows_on_host() const { return rows_on_host_; }  // so far; for tests

 private:
  enum class Way : uint8_t { greedy, device, host };
  // Host memory of a step's sampling, in use from its launch until its results are read.
  struct Slot {
    explicit Slot(const SamplerSizes& sizes);
    PinnedBuffer tasks;    // SampleTask [tasks], words
    PinnedBuffer outputs;  // SampleOutput [tasks], TopLogit
    Event done;
    std::vector<Way> ways;       // [R]
    std::vector<int> task_rows;  // row of each task
    int64_t vocab = 0;
  };
  void prepare(Slot& slot, int64_t vocab, std::span<const SampleRow> rows, const SampledStep& step);
  Way add(Slot& slot, const SampleRow& row, int row_idx, int fed_row);
  // Parts of a task; false: no room.
  bool add_tokens(Slot& slot, const SampleRow& row, SampleTask& task);
  bool add_bias(Slot& slot, const SampleRow& row, SampleTask& task);
  bool add_bans(Slot& slot, const SampleRow& row, SampleTask& task);
  bool add_allowed(Slot& slot, const SampleRow& row, SampleTask& task);
  bool reserve_best(const Slot& slot, SampleTask& task);
  bool fits(const SampleRow& row, int64_t vocab) const;
  uint32_t* take_words(Slot& slot, size_t count, int32_t* offset);
  void launch_tasks(const LaunchContext& context, Slot& slot, const SampledStep& step);
  // Result of row `row_idx`, if the device drew it.
  SampleStatus finish(const Slot& slot, size_t row_idx, int& task, SampleResult& result) const;
  SampleStatus finish_task(const Slot& slot, int task, SampleResult& result) const;
  const int32_t* greedy_ids(const Slot& slot) const;
  SampleStatus sample_on_host(const LaunchContext& context, int64_t vocab, int row_idx,
                              const SampleRow& row, SampleResult& result);

  SamplerSizes sizes_;
  SamplerBytes bytes_;
  bool kernel_fits_ = false;
  std::unique_ptr<Buffer> logits_;     // f32 [rows, V]
  std::unique_ptr<Buffer> block_max_;  // f32 [rows, V / 64]
  std::unique_ptr<Buffer> scan_;
  std::unique_ptr<Buffer> ids_;    // i32 [rows]
  std::unique_ptr<Buffer> tasks_;  // SampleTask [tasks], words
  std::unique_ptr<Buffer> spare_;  // f32 [spare_rows, V]
  PinnedBuffer host_ids_;          // i32 [2, rows]
  PinnedBuffer host_logits_;       // f32 [V]
  Slot slots_[2];
  int launched_[2] = {};  // slots, oldest first
  int num_launched_ = 0;
  std::unique_ptr<CudaStreamOwner> upload_stream_;
  Event uploaded_;
  Event tasks_read_;       // by the sample_rows queued last
  size_t used_words_ = 0;  // of the slot being prepared, as the rest
  size_t used_top_ = 0;
  int used_spare_ = 0;
  HostSampler host_sampler_;
  size_t rows_on_host_ = 0;
};

}  // namespace turbomind::cuda
