#include "backend/cuda/cuda_sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace turbomind::cuda {
namespace {

// Whether a ban depends on tokens said before.
bool has_phrases(const SamplingParams& params) {
  return std::any_of(params.bad_words.begin(), params.bad_words.end(),
                     [](const std::vector<TokenId>& word) { return word.size() > 1; });
}

// The first failure of a step's rows.
void note_failure(SampleStatus status, size_t row, size_t rows, std::optional<Error>& failure) {
  if (status == SampleStatus::ok || failure) return;
  failure.emplace(
      status == SampleStatus::all_banned ? ErrorCode::invalid_argument : ErrorCode::device_error,
      format("row %zu of %zu cannot be sampled: %s", row, rows, describe(status)));
}

}  // namespace

CudaSampler::Slot::Slot(const SamplerSizes& sizes)
    : tasks(sampler_bytes(sizes).tasks), outputs(sampler_bytes(sizes).outputs) {
  ways.reserve(static_cast<size_t>(sizes.tasks));
  task_rows.reserve(static_cast<size_t>(sizes.tasks));
}

CudaSampler::CudaSampler(const SamplerSizes& sizes, const LaunchContext& context, DevicePool& pool)
    : sizes_(sizes),
      bytes_(sampler_bytes(sizes)),
      kernel_fits_(sizes.vocab <= kMaxSampleVocab &&
                   sample_rows_shared_bytes(sizes.vocab) <=
                       static_cast<size_t>(context.max_shared_bytes)),
      host_ids_(2 * bytes_.ids),
      host_logits_(static_cast<size_t>(sizes.vocab) * sizeof(float)),
      slots_{Slot(sizes), Slot(sizes)},
      upload_stream_(std::make_unique<CudaStreamOwner>()) {
  logits_ = pool.allocate(bytes_.logits);
  block_max_ = pool.allocate(bytes_.block_max);
  scan_ = pool.allocate(bytes_.scan);
  cuda_check(cudaMemsetAsync(scan_->data(), 0, bytes_.scan, context.stream), "clearing memory");
  ids_ = pool.allocate(bytes_.ids);
  tasks_ = pool.allocate(bytes_.tasks);
  spare_ = pool.allocate(bytes_.spare);
}

void CudaSampler::scan(const LaunchContext& context, int rows, int64_t vocab,
                       const SampledStep& step) {
  TM_CHECK(rows <= sizes_.rows && vocab <= sizes_.vocab,
           "%d rows of %lld logits; made for %d of %lld", rows, static_cast<long long>(vocab),
           sizes_.rows, static_cast<long long>(sizes_.vocab));
  scan_logits(context,
              {.logits = logits(),
               .vocab = vocab,
               .scratch = scan_->data(),
               .max_rows = sizes_.rows,
               .block_max = static_cast<float*>(block_max_->data()),
               .ids = ids(),
               .host_ids = reinterpret_cast<int32_t*>(host_ids_.data()),
               .slot = step.device_slot},
              rows);
}

const int32_t* CudaSampler::greedy_ids(const Slot& slot) const {
  return reinterpret_cast<const int32_t*>(host_ids_.data()) +
         (&slot - slots_) * static_cast<ptrdiff_t>(sizes_.rows);
}

void CudaSampler::sample(const LaunchContext& context, int64_t vocab,
                         std::span<const SampleRow> rows, std::span<SampleResult> results,
                         const SampledStep& step) {
  TM_CHECK(num_launched_ == 0, "%d launched steps are not collected", num_launched_);
  Slot& slot = slots_[step.slot];
  prepare(slot, vocab, rows, step);
  launch_tasks(context, slot, step);
  cuda_check(cudaStreamSynchronize(context.stream), "waiting for the sampled tokens");

  std::optional<Error> failure;
  int task = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    results[r] = {};
    const SampleStatus status =
        slot.ways[r] == Way::host
            ? sample_on_host(context, vocab, static_cast<int>(r), rows[r], results[r])
            : finish(slot, r, task, results[r]);
    note_failure(status, r, rows.size(), failure);
  }
  if (failure) throw *failure;
}

bool CudaSampler::launch(const LaunchContext& context, int64_t vocab,
                         std::span<const SampleRow> rows, const SampledStep& step) {
  for (size_t r = 0; r < rows.size(); ++r) {
    const bool fed = !step.fed_rows.empty() && step.fed_rows[r] >= 0;
    if (fed && has_phrases(*rows[r].params)) return false;
  }
  Slot& slot = slots_[step.slot];
  prepare(slot, vocab, rows, step);
  if (std::find(slot.ways.begin(), slot.ways.end(), Way::host) != slot.ways.end()) return false;
  launch_tasks(context, slot, step);
  slot.done.record(context.stream);
  launched_[num_launched_++] = step.slot;
  return true;
}

void CudaSampler::collect(std::span<SampleResult> results) {
  TM_CHECK(num_launched_ > 0, "collecting %zu rows without a launch", results.size());
  Slot& slot = slots_[launched_[0]];
  launched_[0] = launched_[1];
  --num_launched_;
  slot.done.wait();
  TM_CHECK(results.size() == slot.ways.size(), "%zu results for %zu rows", results.size(),
           slot.ways.size());
  std::optional<Error> failure;
  int task = 0;
  for (size_t r = 0; r < results.size(); ++r) {
    results[r] = {};
    note_failure(finish(slot, r, task, results[r]), r, results.size(), failure);
  }
  if (failure) throw *failure;
}

// The upload runs beside the forward that is still under way, once the tasks of the step before have
// been read; the kernel waits for both.
void CudaSampler::launch_tasks(const LaunchContext& context, Slot& slot, const SampledStep& step) {
  if (slot.task_rows.empty()) return;
  char* device = static_cast<char*>(tasks_->data());
  const CudaStream upload = upload_stream_->get();
  const size_t tasks = slot.task_rows.size();
  tasks_read_.make_wait(upload);
  cuda_check(cudaMemcpyAsync(device, slot.tasks.data(), tasks * sizeof(SampleTask),
                             cudaMemcpyHostToDevice, upload),
             "uploading what rows ask for");
  if (used_words_ > 0) {
    const size_t at = bytes_.words;
    cuda_check(cudaMemcpyAsync(device + at, slot.tasks.data() + at, used_words_ * sizeof(uint32_t),
                               cudaMemcpyHostToDevice, upload),
               "uploading token lists");
  }
  uploaded_.record(upload);
  uploaded_.make_wait(context.stream);
  char* outputs = slot.outputs.data();  // written by the kernel itself: no copy to wait for
  sample_rows(context,
              {.tasks = reinterpret_cast<const SampleTask*>(device),
               .words = reinterpret_cast<const uint32_t*>(device + bytes_.words),
               .logits = logits(),
               .vocab = slot.vocab,
               .block_max = static_cast<const float*>(block_max_->data()),
               .ids = ids(),
               .token_ids = step.token_ids,
               .spare = static_cast<float*>(spare_->data()),
               .outputs = reinterpret_cast<SampleOutput*>(outputs),
               .top = reinterpret_cast<TopLogit*>(outputs + bytes_.top)},
              static_cast<int>(tasks));
  tasks_read_.record(context.stream);
}

SampleStatus CudaSampler::finish(const Slot& slot, size_t row_idx, int& task,
                                 SampleResult& result) const {
  if (slot.ways[row_idx] == Way::device) return finish_task(slot, task++, result);
  const int32_t id = greedy_ids(slot)[row_idx];
  if (id == kNoTokenLeft) return SampleStatus::all_banned;
  if (id < 0) return SampleStatus::not_finite;
  result.token = id;
  return SampleStatus::ok;
}

SampleStatus CudaSampler::finish_task(const Slot& slot, int task_idx, SampleResult& result) const {
  SampleTask task;
  SampleOutput output;
  const auto at = static_cast<size_t>(task_idx);
  std::memcpy(&task, slot.tasks.data() + at * sizeof task, sizeof task);
  std::memcpy(&output, slot.outputs.data() + at * sizeof output, sizeof output);
  const bool known = output.raw_total > 0;  // the raw logits were finite
  if (task.num_logprobs > 0 && known) {
    const double normalizer = output.raw_max + std::log(output.raw_total);
    const auto* top = reinterpret_cast<const TopLogit*>(slot.outputs.data() + bytes_.top);
    const auto count = static_cast<size_t>(std::min<int64_t>(task.num_logprobs, slot.vocab));
    for (size_t i = 0; i < count; ++i) {
      const TopLogit& best = top[static_cast<size_t>(task.top) + i];
      result.top_logprobs.emplace_back(best.id, static_cast<float>(best.logit - normalizer));
    }
    if (output.status == SampleOutcome::ok) {
      result.logprob = static_cast<float>(output.raw_logit - normalizer);
    }
  }
  if (output.status == SampleOutcome::not_finite) return SampleStatus::not_finite;
  if (output.status == SampleOutcome::all_banned) return SampleStatus::all_banned;
  result.token = output.token;
  return SampleStatus::ok;
}

SampleStatus CudaSampler::sample_on_host(const LaunchContext& context, int64_t vocab, int row_idx,
                                         const SampleRow& row, SampleResult& result) {
  ++rows_on_host_;
  const auto count = static_cast<size_t>(vocab);
  cuda_check(cudaMemcpyAsync(host_logits_.data(), logits() + static_cast<size_t>(row_idx) * count,
                             count * sizeof(float), cudaMemcpyDeviceToHost, context.stream),
             "reading logits");
  cuda_check(cudaStreamSynchronize(context.stream), "waiting for logits");
  const std::span<float> host(reinterpret_cast<float*>(host_logits_.data()), count);
  return host_sampler_.sample(host, row, result);
}

}  // namespace turbomind::cuda
