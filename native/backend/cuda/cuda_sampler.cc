#include "backend/cuda/cuda_sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace turbomind::cuda {
namespace {

constexpr size_t kMaxWords = size_t{4} << 20;
constexpr size_t kMaxTopEntries = size_t{1} << 17;
constexpr int kMaxSpareRows = 16;

size_t block_count(const SamplerSizes& sizes) {
  return static_cast<size_t>(ceil_div<int64_t>(sizes.vocab, 64));
}
size_t row_bytes(const SamplerSizes& sizes) {
  return static_cast<size_t>(sizes.vocab) * sizeof(float);
}
size_t task_bytes(const SamplerSizes& sizes) {
  return round_up<size_t>(static_cast<size_t>(sizes.tasks) * sizeof(SampleTask), 256);
}
size_t output_bytes(const SamplerSizes& sizes) {
  return round_up<size_t>(static_cast<size_t>(sizes.tasks) * sizeof(SampleOutput), 256);
}

// Bytes of each device buffer, in the order of the constructor.
struct DeviceBytes {
  size_t logits, block_max, scan, ids, tasks, outputs, spare;
};
DeviceBytes device_bytes(const SamplerSizes& sizes) {
  const auto rows = static_cast<size_t>(sizes.rows);
  return {.logits = rows * row_bytes(sizes),
          .block_max = rows * block_count(sizes) * sizeof(float),
          .scan = scan_scratch_bytes(sizes.rows),
          .ids = rows * sizeof(int32_t),
          .tasks = task_bytes(sizes) + sizes.words * sizeof(uint32_t),
          .outputs = output_bytes(sizes) + sizes.top_entries * sizeof(TopLogit),
          .spare = static_cast<size_t>(sizes.spare_rows) * row_bytes(sizes)};
}

bool has_edits(const SamplingParams& params, const SampleRow& row) {
  return params.repetition_penalty != 1.0F || params.frequency_penalty != 0.0F ||
         params.presence_penalty != 0.0F || !params.logit_bias.empty() || !row.banned.empty() ||
         !params.bad_words.empty() || !row.allowed.empty();
}

bool draws(const SamplingParams& params) { return params.do_sample && params.temperature > 0.0F; }

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

SamplerSizes sampler_sizes(const Backend::WorkspaceSpec& spec, int logit_rows) {
  SamplerSizes sizes;
  sizes.rows = logit_rows;
  sizes.vocab = spec.vocab_size;
  sizes.tasks = std::max(spec.max_rows, 1);
  sizes.spare_rows = std::min(sizes.tasks, kMaxSpareRows);
  const size_t words_a_row = static_cast<size_t>(std::max(spec.max_kv_len, 1)) +
                             static_cast<size_t>(spec.vocab_size) / 32 + 64;
  sizes.words = std::min(static_cast<size_t>(sizes.tasks) * words_a_row, kMaxWords);
  sizes.top_entries = std::min(
      static_cast<size_t>(sizes.tasks) * static_cast<size_t>(kMaxBestTokens), kMaxTopEntries);
  return sizes;
}

std::array<size_t, 6> sampler_buffers(const SamplerSizes& sizes) {
  const DeviceBytes bytes = device_bytes(sizes);
  return {bytes.logits, bytes.block_max, bytes.scan, bytes.ids, bytes.tasks, bytes.spare};
}

size_t sampler_host_bytes(const SamplerSizes& sizes) {
  const DeviceBytes bytes = device_bytes(sizes);
  return 2 * (bytes.ids + bytes.tasks + bytes.outputs) + row_bytes(sizes);
}

CudaSampler::Slot::Slot(const SamplerSizes& sizes)
    : tasks(device_bytes(sizes).tasks), outputs(device_bytes(sizes).outputs) {
  ways.reserve(static_cast<size_t>(sizes.tasks));
  task_rows.reserve(static_cast<size_t>(sizes.tasks));
}

CudaSampler::CudaSampler(const SamplerSizes& sizes, const LaunchContext& context, DevicePool& pool)
    : sizes_(sizes),
      kernel_fits_(sizes.vocab <= kMaxSampleVocab &&
                   sample_rows_shared_bytes(sizes.vocab) <=
                       static_cast<size_t>(context.max_shared_bytes)),
      host_ids_(2 * device_bytes(sizes).ids),
      host_logits_(row_bytes(sizes)),
      slots_{Slot(sizes), Slot(sizes)},
      upload_stream_(std::make_unique<CudaStreamOwner>()) {
  const DeviceBytes bytes = device_bytes(sizes);
  logits_ = pool.allocate(bytes.logits);
  block_max_ = pool.allocate(bytes.block_max);
  scan_ = pool.allocate(bytes.scan);
  cuda_check(cudaMemsetAsync(scan_->data(), 0, bytes.scan, context.stream), "clearing memory");
  ids_ = pool.allocate(bytes.ids);
  tasks_ = pool.allocate(bytes.tasks);
  spare_ = pool.allocate(bytes.spare);
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

// Decides how each row is sampled and writes the tasks of those that the GPU draws.
void CudaSampler::prepare(Slot& slot, int64_t vocab, std::span<const SampleRow> rows,
                          const SampledStep& step) {
  TM_CHECK(static_cast<int>(rows.size()) <= sizes_.tasks, "%zu rows to sample; made for %d",
           rows.size(), sizes_.tasks);
  TM_CHECK(step.fed_rows.empty() || step.fed_rows.size() == rows.size(), "%zu fed rows of %zu",
           step.fed_rows.size(), rows.size());
  for (int i = 0; i < num_launched_; ++i) {
    TM_CHECK(&slots_[launched_[i]] != &slot, "a third step is sampled");
  }
  slot.vocab = vocab;
  slot.ways.clear();
  slot.task_rows.clear();
  used_words_ = used_top_ = 0;
  used_spare_ = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int fed_row = step.fed_rows.empty() ? -1 : step.fed_rows[r];
    slot.ways.push_back(add(slot, rows[r], static_cast<int>(r), fed_row));
  }
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

bool CudaSampler::fits(const SampleRow& row, int64_t vocab) const {
  const SamplingParams& params = *row.params;
  const bool counts = params.frequency_penalty != 0.0F || params.presence_penalty != 0.0F;
  return kernel_fits_ && params.num_logprobs <= kMaxBestTokens &&
         (!draws(params) || params.top_k <= kMaxBestTokens || params.top_k >= vocab) &&
         (!counts || row.completion().size() <= static_cast<size_t>(kMaxSampleCompletion));
}

uint32_t* CudaSampler::take_words(Slot& slot, size_t count, int32_t* offset) {
  if (used_words_ + count > sizes_.words) return nullptr;
  *offset = static_cast<int32_t>(used_words_);
  used_words_ += count;
  return reinterpret_cast<uint32_t*>(slot.tasks.data() + task_bytes(sizes_)) + *offset;
}

// How row `row_idx` is sampled; a task for the GPU is written to the upload.
CudaSampler::Way CudaSampler::add(Slot& slot, const SampleRow& row, int row_idx, int fed_row) {
  const int64_t vocab = slot.vocab;
  const SamplingParams& params = *row.params;
  const bool edits = has_edits(params, row);
  if (!draws(params) && !edits && params.num_logprobs <= 0) return Way::greedy;
  if (!fits(row, vocab)) return Way::host;

  SampleTask task{.seed = params.seed,
                  .completion_idx = row.completion_idx,
                  .row = row_idx,
                  .do_sample = draws(params) ? 1 : 0,
                  .temperature = params.temperature,
                  .top_p = params.top_p,
                  .min_p = params.min_p,
                  .top_k = params.top_k,
                  .repetition_penalty = params.repetition_penalty,
                  .frequency_penalty = params.frequency_penalty,
                  .presence_penalty = params.presence_penalty,
                  .num_logprobs = std::max(params.num_logprobs, 0),
                  .top = static_cast<int32_t>(used_top_),
                  .edits = edits ? 1 : 0,
                  .fed_row = fed_row};
  // Nothing is kept of a row that turns out not to fit.
  const size_t words_before = used_words_;
  const auto give_up = [&] {
    used_words_ = words_before;
    return Way::host;
  };
  const bool completion_only = params.repetition_penalty == 1.0F;
  const bool counted = params.frequency_penalty != 0.0F || params.presence_penalty != 0.0F;
  if (!completion_only || counted) {
    const std::span<const TokenId> tokens = completion_only ? row.completion() : row.tokens;
    uint32_t* out = take_words(slot, tokens.size(), &task.tokens);
    if (out == nullptr) return give_up();
    std::memcpy(out, tokens.data(), tokens.size_bytes());
    task.num_tokens = static_cast<int32_t>(tokens.size());
    task.num_completion = static_cast<int32_t>(row.completion().size());
  }
  if (!params.logit_bias.empty()) {
    uint32_t* out = take_words(slot, 2 * params.logit_bias.size(), &task.bias);
    if (out == nullptr) return give_up();
    for (const auto& [id, bias] : params.logit_bias) {
      *out++ = static_cast<uint32_t>(id);
      *out++ = std::bit_cast<uint32_t>(bias);
    }
    task.num_bias = static_cast<int32_t>(params.logit_bias.size());
  }
  bool room = true;
  task.bans = static_cast<int32_t>(used_words_);
  for_each_banned(row, vocab, [&](TokenId id) {
    int32_t offset = 0;
    uint32_t* out = room ? take_words(slot, 1, &offset) : nullptr;
    room = out != nullptr;
    if (!room) return;
    *out = static_cast<uint32_t>(id);
    ++task.num_bans;
  });
  if (!room) return give_up();
  if (!row.allowed.empty()) {
    const size_t count =
        std::min(row.allowed.size(), static_cast<size_t>(ceil_div<int64_t>(vocab, 32)));
    uint32_t* out = take_words(slot, count, &task.allowed);
    if (out == nullptr) return give_up();
    std::memcpy(out, row.allowed.data(), count * sizeof(uint32_t));
    task.allowed_words = static_cast<int32_t>(count);
  }
  if (task.num_logprobs > 0) {
    const auto best = static_cast<size_t>(std::min<int64_t>(task.num_logprobs, vocab));
    if (used_top_ + best > sizes_.top_entries) return give_up();
    if (edits && used_spare_ == sizes_.spare_rows) return give_up();
    used_top_ += best;
    if (edits) task.spare = used_spare_++;
  }
  std::memcpy(slot.tasks.data() + slot.task_rows.size() * sizeof(SampleTask), &task, sizeof task);
  slot.task_rows.push_back(row_idx);
  return Way::device;
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
    const size_t at = task_bytes(sizes_);
    cuda_check(cudaMemcpyAsync(device + at, slot.tasks.data() + at, used_words_ * sizeof(uint32_t),
                               cudaMemcpyHostToDevice, upload),
               "uploading token lists");
  }
  uploaded_.record(upload);
  uploaded_.make_wait(context.stream);
  char* outputs = slot.outputs.data();  // written by the kernel itself: no copy to wait for
  sample_rows(context,
              {.tasks = reinterpret_cast<const SampleTask*>(device),
               .words = reinterpret_cast<const uint32_t*>(device + task_bytes(sizes_)),
               .logits = logits(),
               .vocab = slot.vocab,
               .block_max = static_cast<const float*>(block_max_->data()),
               .ids = ids(),
               .token_ids = step.token_ids,
               .spare = static_cast<float*>(spare_->data()),
               .outputs = reinterpret_cast<SampleOutput*>(outputs),
               .top = reinterpret_cast<TopLogit*>(outputs + output_bytes(sizes_))},
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
    const auto* top = reinterpret_cast<const TopLogit*>(slot.outputs.data() + output_bytes(sizes_));
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
