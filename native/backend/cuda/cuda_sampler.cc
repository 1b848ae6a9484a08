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
  return bytes.ids + bytes.tasks + bytes.outputs + row_bytes(sizes);
}

CudaSampler::CudaSampler(const SamplerSizes& sizes, const LaunchContext& context, DevicePool& pool)
    : sizes_(sizes),
      kernel_fits_(sizes.vocab <= kMaxSampleVocab &&
                   sample_rows_shared_bytes(sizes.vocab) <=
                       static_cast<size_t>(context.max_shared_bytes)),
      host_ids_(device_bytes(sizes).ids),
      host_tasks_(device_bytes(sizes).tasks),
      host_outputs_(device_bytes(sizes).outputs),
      host_logits_(row_bytes(sizes)),
      upload_stream_(std::make_unique<CudaStreamOwner>()) {
  const DeviceBytes bytes = device_bytes(sizes);
  logits_ = pool.allocate(bytes.logits);
  block_max_ = pool.allocate(bytes.block_max);
  scan_ = pool.allocate(bytes.scan);
  cuda_check(cudaMemsetAsync(scan_->data(), 0, bytes.scan, context.stream), "clearing memory");
  ids_ = pool.allocate(bytes.ids);
  tasks_ = pool.allocate(bytes.tasks);
  spare_ = pool.allocate(bytes.spare);
  ways_.reserve(static_cast<size_t>(sizes.tasks));
  task_rows_.reserve(static_cast<size_t>(sizes.tasks));
}

void CudaSampler::scan(const LaunchContext& context, int rows, int64_t vocab) {
  TM_CHECK(rows <= sizes_.rows && vocab <= sizes_.vocab,
           "%d rows of %lld logits; made for %d of %lld", rows, static_cast<long long>(vocab),
           sizes_.rows, static_cast<long long>(sizes_.vocab));
  scan_logits(context, logits(), rows, vocab, scan_->data(), sizes_.rows,
              static_cast<float*>(block_max_->data()), static_cast<int32_t*>(ids_->data()),
              reinterpret_cast<int32_t*>(host_ids_.data()));
}

void CudaSampler::sample(const LaunchContext& context, int64_t vocab,
                         std::span<const SampleRow> rows, std::span<SampleResult> results) {
  TM_CHECK(static_cast<int>(rows.size()) <= sizes_.tasks, "%zu rows to sample; made for %d",
           rows.size(), sizes_.tasks);
  ways_.clear();
  task_rows_.clear();
  used_words_ = used_top_ = 0;
  used_spare_ = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    ways_.push_back(add(rows[r], static_cast<int>(r), vocab));
  }
  if (!task_rows_.empty()) launch_tasks(context, vocab);
  cuda_check(cudaStreamSynchronize(context.stream), "waiting for the sampled tokens");

  std::optional<Error> failure;
  int task = 0;
  const auto* greedy = reinterpret_cast<const int32_t*>(host_ids_.data());
  for (size_t r = 0; r < rows.size(); ++r) {
    SampleResult& result = results[r];
    result = {};
    SampleStatus status = SampleStatus::ok;
    if (ways_[r] == Way::device) {
      status = finish(task++, vocab, result);
    } else if (ways_[r] == Way::host) {
      status = sample_on_host(context, vocab, static_cast<int>(r), rows[r], result);
    } else if (greedy[r] < 0) {
      status = greedy[r] == kNoTokenLeft ? SampleStatus::all_banned : SampleStatus::not_finite;
    } else {
      result.token = greedy[r];
    }
    if (status == SampleStatus::ok || failure) continue;
    failure.emplace(
        status == SampleStatus::all_banned ? ErrorCode::invalid_argument : ErrorCode::device_error,
        format("row %zu of %zu cannot be sampled: %s", r, rows.size(), describe(status)));
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

uint32_t* CudaSampler::take_words(size_t count, int32_t* offset) {
  if (used_words_ + count > sizes_.words) return nullptr;
  *offset = static_cast<int32_t>(used_words_);
  used_words_ += count;
  return reinterpret_cast<uint32_t*>(host_tasks_.data() + task_bytes(sizes_)) + *offset;
}

// How row `row_idx` is sampled; a task for the GPU is written to the upload.
CudaSampler::Way CudaSampler::add(const SampleRow& row, int row_idx, int64_t vocab) {
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
                  .edits = edits ? 1 : 0};
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
    uint32_t* out = take_words(tokens.size(), &task.tokens);
    if (out == nullptr) return give_up();
    std::memcpy(out, tokens.data(), tokens.size_bytes());
    task.num_tokens = static_cast<int32_t>(tokens.size());
    task.num_completion = static_cast<int32_t>(row.completion().size());
  }
  if (!params.logit_bias.empty()) {
    uint32_t* out = take_words(2 * params.logit_bias.size(), &task.bias);
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
    uint32_t* out = room ? take_words(1, &offset) : nullptr;
    room = out != nullptr;
    if (!room) return;
    *out = static_cast<uint32_t>(id);
    ++task.num_bans;
  });
  if (!room) return give_up();
  if (!row.allowed.empty()) {
    const size_t count =
        std::min(row.allowed.size(), static_cast<size_t>(ceil_div<int64_t>(vocab, 32)));
    uint32_t* out = take_words(count, &task.allowed);
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
  std::memcpy(host_tasks_.data() + task_rows_.size() * sizeof(SampleTask), &task, sizeof task);
  task_rows_.push_back(row_idx);
  return Way::device;
}

// The upload runs beside the forward that is still under way; the kernel waits for both.
void CudaSampler::launch_tasks(const LaunchContext& context, int64_t vocab) {
  char* device = static_cast<char*>(tasks_->data());
  const CudaStream upload = upload_stream_->get();
  const size_t tasks = task_rows_.size();
  cuda_check(cudaMemcpyAsync(device, host_tasks_.data(), tasks * sizeof(SampleTask),
                             cudaMemcpyHostToDevice, upload),
             "uploading what rows ask for");
  if (used_words_ > 0) {
    const size_t at = task_bytes(sizes_);
    cuda_check(cudaMemcpyAsync(device + at, host_tasks_.data() + at, used_words_ * sizeof(uint32_t),
                               cudaMemcpyHostToDevice, upload),
               "uploading token lists");
  }
  uploaded_.record(upload);
  uploaded_.make_wait(context.stream);
  char* outputs = host_outputs_.data();  // written by the kernel itself: no copy to wait for
  sample_rows(context,
              {.tasks = reinterpret_cast<const SampleTask*>(device),
               .words = reinterpret_cast<const uint32_t*>(device + task_bytes(sizes_)),
               .logits = logits(),
               .vocab = vocab,
               .block_max = static_cast<const float*>(block_max_->data()),
               .greedy = static_cast<const int32_t*>(ids_->data()),
               .spare = static_cast<float*>(spare_->data()),
               .outputs = reinterpret_cast<SampleOutput*>(outputs),
               .top = reinterpret_cast<TopLogit*>(outputs + output_bytes(sizes_))},
              static_cast<int>(tasks));
}

SampleStatus CudaSampler::finish(int task_idx, int64_t vocab, SampleResult& result) const {
  SampleTask task;
  SampleOutput output;
  const auto at = static_cast<size_t>(task_idx);
  std::memcpy(&task, host_tasks_.data() + at * sizeof task, sizeof task);
  std::memcpy(&output, host_outputs_.data() + at * sizeof output, sizeof output);
  const bool known = output.raw_total > 0;  // the raw logits were finite
  if (task.num_logprobs > 0 && known) {
    const double normalizer = output.raw_max + std::log(output.raw_total);
    const auto* top =
        reinterpret_cast<const TopLogit*>(host_outputs_.data() + output_bytes(sizes_));
    const auto count = static_cast<size_t>(std::min<int64_t>(task.num_logprobs, vocab));
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
