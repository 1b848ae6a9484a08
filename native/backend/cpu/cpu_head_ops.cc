// The head and sampling: hidden states of the step's sample rows, their scores in full or only where they
// can matter, and the draw, a HostSampler a thread.
#include <algorithm>
#include <atomic>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/cpu_weight.h"
#include "backend/cpu/kernels/row_norm.h"

namespace turbomind::cpu {
namespace {

constexpr int kMaxBestK = 1024;  // beyond, scoring the whole vocabulary is as cheap

// Entries that must be exact for this row, or 0 where its token depends on all logits.
int exact_entries(const SampleRow& row, int64_t vocab) {
  const SamplingParams& params = *row.params;
  if (params.repetition_penalty != 1.0F || params.num_logprobs > 0) return 0;
  if (params.frequency_penalty != 0.0F || params.presence_penalty != 0.0F) return 0;
  if (!params.logit_bias.empty() || !row.allowed.empty()) return 0;
  const bool greedy = !params.do_sample || !(params.temperature > 0.0F);
  if (!greedy && params.top_k <= 0) return 0;
  int64_t needed = greedy ? 1 : params.top_k;
  for_each_banned(row, vocab, [&](TokenId) { ++needed; });
  return needed <= kMaxBestK && needed < vocab ? static_cast<int>(needed) : 0;
}

bool all_finite(const float* x, int64_t n) {
  float poison = 0.0F;
  for (int64_t i = 0; i < n; ++i) poison += x[i] * 0.0F;
  return poison == 0.0F;
}

}  // namespace

const CpuHead& CpuBackend::head_of(const LinearWeight* weight, ConstTensorView x) const {
  const auto* head = dynamic_cast<const CpuHead*>(weight);
  TM_CHECK(head != nullptr, "sampling needs a weight made by load_head");
  expect_f32("hidden states", x);
  TM_CHECK(x.row_elements() == head->in_features(),
           "hidden states of width %lld, the head takes %lld",
           static_cast<long long>(x.row_elements()), static_cast<long long>(head->in_features()));
  return *head;
}

// The step's sample_rows of x, final norm applied, side by side in sample_x_.
void CpuBackend::gather_sample_rows(const SampleArgs& args) {
  const int64_t hidden = args.x.row_elements();
  const size_t rows = batch_.sample_rows.size();
  sample_x_.reserve((rows + kLogitRows) * hidden * sizeof(float), "sampled rows");
  for (size_t r = 0; r < rows; ++r) {
    const int32_t row = batch_.sample_rows[r];
    TM_CHECK(row >= 0 && row < args.x.dim(0), "sampled row %d of %lld", row,
             static_cast<long long>(args.x.dim(0)));
    const float* from = args.x.as<float>() + row * hidden;
    float* to = sample_x_.floats() + static_cast<int64_t>(r) * hidden;
    if (args.norm != nullptr) {
      row_norm(row_norm_of(*args.norm, hidden), from, to, hidden, isa_);
    } else {
      std::copy(from, from + hidden, to);
    }
  }
}

// Scores `rows` (indices into args.rows), kLogitRows at a time, and draws their tokens.
// best > 0: only that many entries of a row need be exact.
void CpuBackend::sample_rows(const SampleArgs& args, const PackedHead& head,
                             std::span<const int> rows, int best) {
  const int64_t hidden = head.in_features();
  const int64_t vocab = head.out_features();
  float* group_x = sample_x_.floats() + static_cast<int64_t>(args.rows.size()) * hidden;
  for (size_t begin = 0; begin < rows.size(); begin += kLogitRows) {
    const auto group = rows.subspan(begin, std::min<size_t>(kLogitRows, rows.size() - begin));
    const auto count = static_cast<int64_t>(group.size());
    for (int64_t i = 0; i < count; ++i) {
      const float* x = sample_x_.floats() + group[i] * hidden;
      std::copy(x, x + hidden, group_x + i * hidden);
    }
    scores_.reserve(static_cast<size_t>(count * vocab) * sizeof(float), "logits");
    linear_scratch_.reserve(head.scratch_bytes(count), "linear layer scratch");
    if (best > 0) {
      head.best_logits(group_x, count, best, 0.0F, scores_.floats(), linear_scratch_.data(), pool_);
    } else {
      head.logits(group_x, count, scores_.floats(), linear_scratch_.data(), pool_);
    }
    std::atomic<int64_t> next{0};
    const auto draw = [&](int thread) {
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
        const int row = group[i];
        // Scoring by shares may lose a NaN, so the hidden state is looked at as well.
        statuses_[row] = all_finite(group_x + i * hidden, hidden)
                             ? samplers_[thread].sample(
                                   {scores_.floats() + i * vocab, static_cast<size_t>(vocab)},
                                   args.rows[row], args.results[row])
                             : SampleStatus::not_finite;
      }
    };
    if (count == 1) {
      draw(0);
    } else {
      pool_.run(draw);
    }
  }
}

void CpuBackend::sample(const SampleArgs& args) {
  const CpuHead& head = head_of(args.head, args.x);
  const size_t rows = batch_.sample_rows.size();
  TM_CHECK(args.rows.size() == rows && args.results.size() == rows,
           "%zu rows to sample with %zu parameter sets and %zu results", rows, args.rows.size(),
           args.results.size());
  gather_sample_rows(args);
  statuses_.assign(rows, SampleStatus::ok);
  best_rows_.clear();
  full_rows_.clear();
  int best = 0;
  for (size_t r = 0; r < rows; ++r) {
    args.results[r] = SampleResult{};
    const int needed = exhaustive_sampling_ ? 0 : exact_entries(args.rows[r], head.out_features());
    (needed > 0 ? best_rows_ : full_rows_).push_back(static_cast<int>(r));
    best = std::max(best, needed);
  }
  sample_rows(args, *head.packed(), best_rows_, best);
  sample_rows(args, *head.packed(), full_rows_, 0);
  report_failures(statuses_);
}

void CpuBackend::report_failures(std::span<const SampleStatus> statuses) const {
  for (size_t r = 0; r < statuses.size(); ++r) {
    if (statuses[r] == SampleStatus::ok) continue;
    const ErrorCode code = statuses[r] == SampleStatus::all_banned ? ErrorCode::invalid_argument
                                                                   : ErrorCode::device_error;
    throw Error(code, format("row %zu of %zu cannot be sampled: %s", r, statuses.size(),
                             describe(statuses[r])));
  }
}

void CpuBackend::logits(const LogitsArgs& args, std::span<float> out) {
  const PackedHead& head = *head_of(args.head, args.x).packed();
  const int64_t vocab = head.out_features();
  const int64_t hidden = head.in_features();
  const int64_t rows = args.x.dim(0);
  TM_CHECK(static_cast<int64_t>(out.size()) == rows * vocab,
           "logits of %lld rows need %lld values, %zu given", static_cast<long long>(rows),
           static_cast<long long>(rows * vocab), out.size());
  sample_x_.reserve(static_cast<size_t>(kLogitRows * hidden) * sizeof(float), "sampled rows");
  for (int64_t begin = 0; begin < rows; begin += kLogitRows) {
    const int64_t count = std::min<int64_t>(kLogitRows, rows - begin);
    const float* x = args.x.as<float>() + begin * hidden;
    for (int64_t i = 0; i < count && args.norm != nullptr; ++i) {
      row_norm(row_norm_of(*args.norm, hidden), x + i * hidden, sample_x_.floats() + i * hidden,
               hidden, isa_);
    }
    linear_scratch_.reserve(head.scratch_bytes(count), "linear layer scratch");
    head.logits(args.norm != nullptr ? sample_x_.floats() : x, count, out.data() + begin * vocab,
                linear_scratch_.data(), pool_);
  }
}

}  // namespace turbomind::cpu
