// What rows ask of the sampler: which the GPU draws, and their tasks, token lists and masks in the upload.
// Engine thread.
#include <algorithm>
#include <bit>
#include <cstring>

#include "backend/cuda/cuda_sampler.h"

namespace turbomind::cuda {
namespace {

bool draws(const SamplingParams& params) { return params.do_sample && params.temperature > 0.0F; }

// Whether a logit depends on how often the completion holds its token.
bool counts_tokens(const SamplingParams& params) {
  return params.frequency_penalty != 0.0F || params.presence_penalty != 0.0F;
}

bool has_edits(const SamplingParams& params, const SampleRow& row) {
  return params.repetition_penalty != 1.0F || counts_tokens(params) || !params.logit_bias.empty() ||
         !row.banned.empty() || !params.bad_words.empty() || !row.allowed.empty();
}

SampleTask task_of(const SamplingParams& params) {
  return {.seed = params.seed,
          .do_sample = draws(params) ? 1 : 0,
          .temperature = params.temperature,
          .top_p = params.top_p,
          .min_p = params.min_p,
          .top_k = params.top_k,
          .repetition_penalty = params.repetition_penalty,
          .frequency_penalty = params.frequency_penalty,
          .presence_penalty = params.presence_penalty,
          .num_logprobs = std::max(params.num_logprobs, 0)};
}

}  // namespace

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

bool CudaSampler::fits(const SampleRow& row, int64_t vocab) const {
  const SamplingParams& params = *row.params;
  return kernel_fits_ && params.num_logprobs <= kMaxBestTokens &&
         (!draws(params) || params.top_k <= kMaxBestTokens || params.top_k >= vocab) &&
         (!counts_tokens(params) ||
          row.completion().size() <= static_cast<size_t>(kMaxSampleCompletion));
}

uint32_t* CudaSampler::take_words(Slot& slot, size_t count, int32_t* offset) {
  if (used_words_ + count > sizes_.words) return nullptr;
  *offset = static_cast<int32_t>(used_words_);
  used_words_ += count;
  return reinterpret_cast<uint32_t*>(slot.tasks.data() + bytes_.words) + *offset;
}

// How row `row_idx` is sampled; a task for the GPU is written to the upload.
CudaSampler::Way CudaSampler::add(Slot& slot, const SampleRow& row, int row_idx, int fed_row) {
  const SamplingParams& params = *row.params;
  const bool edits = has_edits(params, row);
  if (!draws(params) && !edits && params.num_logprobs <= 0) return Way::greedy;
  if (!fits(row, slot.vocab)) return Way::host;

  SampleTask task = task_of(params);
  task.completion_idx = row.completion_idx;
  task.row = row_idx;
  task.top = static_cast<int32_t>(used_top_);
  task.edits = edits ? 1 : 0;
  task.fed_row = fed_row;
  const size_t words_before = used_words_;
  if (!add_tokens(slot, row, task) || !add_bias(slot, row, task) || !add_bans(slot, row, task) ||
      !add_allowed(slot, row, task) || !reserve_best(slot, task)) {
    used_words_ = words_before;  // nothing is kept of a row that turns out not to fit
    return Way::host;
  }
  std::memcpy(slot.tasks.data() + slot.task_rows.size() * sizeof(SampleTask), &task, sizeof task);
  slot.task_rows.push_back(row_idx);
  return Way::device;
}

bool CudaSampler::add_tokens(Slot& slot, const SampleRow& row, SampleTask& task) {
  const bool completion_only = row.params->repetition_penalty == 1.0F;
  if (completion_only && !counts_tokens(*row.params)) return true;
  const std::span<const TokenId> tokens = completion_only ? row.completion() : row.tokens;
  uint32_t* out = take_words(slot, tokens.size(), &task.tokens);
  if (out == nullptr) return false;
  std::memcpy(out, tokens.data(), tokens.size_bytes());
  task.num_tokens = static_cast<int32_t>(tokens.size());
  task.num_completion = static_cast<int32_t>(row.completion().size());
  return true;
}

bool CudaSampler::add_bias(Slot& slot, const SampleRow& row, SampleTask& task) {
  const auto& biases = row.params->logit_bias;
  if (biases.empty()) return true;
  uint32_t* out = take_words(slot, 2 * biases.size(), &task.bias);
  if (out == nullptr) return false;
  for (const auto& [id, bias] : biases) {
    *out++ = static_cast<uint32_t>(id);
    *out++ = std::bit_cast<uint32_t>(bias);
  }
  task.num_bias = static_cast<int32_t>(biases.size());
  return true;
}

bool CudaSampler::add_bans(Slot& slot, const SampleRow& row, SampleTask& task) {
  bool room = true;
  task.bans = static_cast<int32_t>(used_words_);
  for_each_banned(row, slot.vocab, [&](TokenId id) {
    int32_t offset = 0;
    uint32_t* out = room ? take_words(slot, 1, &offset) : nullptr;
    room = out != nullptr;
    if (!room) return;
    *out = static_cast<uint32_t>(id);
    ++task.num_bans;
  });
  return room;
}

bool CudaSampler::add_allowed(Slot& slot, const SampleRow& row, SampleTask& task) {
  if (row.allowed.empty()) return true;
  const size_t count =
      std::min(row.allowed.size(), static_cast<size_t>(ceil_div<int64_t>(slot.vocab, 32)));
  uint32_t* out = take_words(slot, count, &task.allowed);
  if (out == nullptr) return false;
  std::memcpy(out, row.allowed.data(), count * sizeof(uint32_t));
  task.allowed_words = static_cast<int32_t>(count);
  return true;
}

// Room for the best tokens that come back, and for raw logits that edits would overwrite.
bool CudaSampler::reserve_best(const Slot& slot, SampleTask& task) {
  if (task.num_logprobs == 0) return true;
  const auto best = static_cast<size_t>(std::min<int64_t>(task.num_logprobs, slot.vocab));
  if (used_top_ + best > sizes_.top_entries) return false;
  if (task.edits != 0 && used_spare_ == sizes_.spare_rows) return false;
  used_top_ += best;
  if (task.edits != 0) task.spare = used_spare_++;
  return true;
}

}  // namespace turbomind::cuda
