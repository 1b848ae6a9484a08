// See cpu_backend.h. Checks what crosses the seam, finds scratch, and calls the kernels.
#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "backend/cpu/kernels/row_norm.h"
#include "backend/cpu/kv_cache.h"
#include "backend/cpu/pointwise.h"
#include "backend/cpu/vision_ops.h"
#include "base/host_memory_info.h"

namespace turbomind::cpu {
namespace {

constexpr int kLogitRows = 32;   // rows of logits held at once
constexpr int kMaxBestK = 1024;  // beyond, scoring the whole vocabulary is as cheap

int thread_count(int wanted) {
  if (wanted < 0 || wanted > 1024) {
    throw Error(ErrorCode::invalid_argument,
                format("threads is %d; expected 0 (all usable CPUs) to 1024", wanted));
  }
  return wanted == 0 ? usable_threads() : wanted;
}

void expect_f32(const char* what, ConstTensorView view) {
  TM_CHECK(view.dtype == DType::f32, "%s is %s; the CPU backend computes in f32", what,
           std::string(to_string(view.dtype)).c_str());
}

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

// What load_linear and load_head hand out.
class CpuBackend::Linear : public LinearWeight {
 public:
  Linear(std::unique_ptr<PackedLinear> packed, MemoryMeter meter)
      : packed_(std::move(packed)), metered_(std::move(meter), packed_->bytes()) {}
  int64_t in_features() const override { return packed_->in_features(); }
  int64_t out_features() const override { return packed_->out_features(); }
  size_t bytes() const override { return packed_->bytes(); }
  const PackedLinear* packed() const { return packed_.get(); }

 private:
  std::unique_ptr<const PackedLinear> packed_;
  Metered metered_;
};

class CpuBackend::Head : public LinearWeight {
 public:
  Head(std::unique_ptr<PackedHead> packed, MemoryMeter meter)
      : packed_(std::move(packed)), metered_(std::move(meter), packed_->bytes()) {}
  int64_t in_features() const override { return packed_->in_features(); }
  int64_t out_features() const override { return packed_->out_features(); }
  size_t bytes() const override { return packed_->bytes(); }
  const PackedHead* packed() const { return packed_.get(); }

 private:
  std::unique_ptr<const PackedHead> packed_;
  Metered metered_;
};

CpuBackend::CpuBackend(const CpuBackendOptions& options)
    : isa_(parse_isa(options.isa)),
      pool_(thread_count(options.threads)),
      attention_(isa_, pool_),
      meter_(std::make_shared<std::atomic<size_t>>(0)),
      samplers_(static_cast<size_t>(pool_.size())) {}

CpuBackend::~CpuBackend() = default;

DeviceInfo CpuBackend::info() const {
  const HostMemoryInfo memory = host_memory_info();
  std::string features;
  for (const std::string& name : feature_names()) features += (features.empty() ? "" : " ") + name;
  return {.name = "cpu",
          .description = format("%d threads, kernels %s (CPU has %s)", pool_.size(),
                                to_string(isa_), features.c_str()),
          .total_bytes = memory.total_bytes,
          .free_bytes = memory.free_bytes};
}

std::unique_ptr<Buffer> CpuBackend::allocate(size_t bytes) {
  return std::make_unique<HostBuffer>(bytes, "a buffer", meter_);
}

std::unique_ptr<Buffer> CpuBackend::allocate_host(size_t bytes) {
  return std::make_unique<HostBuffer>(bytes, "host memory", meter_);
}

void CpuBackend::upload(TensorView device, const void* host) {
  std::memcpy(device.data, host, device.bytes());
}

void CpuBackend::download(void* host, ConstTensorView device) {
  std::memcpy(host, device.data, device.bytes());
}

std::unique_ptr<LinearWeight> CpuBackend::load_linear(const LinearSource& source) {
  return std::make_unique<Linear>(pack_linear(source, isa_, pool_), meter_);
}

std::unique_ptr<LinearWeight> CpuBackend::load_embedding(ConstTensorView table) {
  return std::make_unique<CpuEmbedding>(table);
}

std::unique_ptr<LinearWeight> CpuBackend::load_head(const LinearSource& source) {
  return std::make_unique<Head>(pack_head(source, isa_, pool_), meter_);
}

std::unique_ptr<Buffer> CpuBackend::load_vector(ConstTensorView source) {
  const int64_t count = source.elements();
  auto buffer = std::make_unique<HostBuffer>(static_cast<size_t>(count) * sizeof(float),
                                             "a weight vector", meter_);
  to_float(source.data, source.dtype, count, static_cast<float*>(buffer->data()));
  return buffer;
}

size_t CpuBackend::kv_block_bytes(const KvCacheSpec& spec) const {
  return CpuKvCache::block_bytes(spec);
}

std::unique_ptr<KvCache> CpuBackend::make_kv_cache(const KvCacheSpec& spec) {
  return std::make_unique<CpuKvCache>(spec, meter_);
}

void CpuBackend::copy_blocks(KvCache& cache, std::span<const std::pair<BlockId, BlockId>> from_to) {
  const auto& kv = static_cast<const CpuKvCache&>(cache);
  const size_t bytes = CpuKvCache::block_bytes(kv.spec());
  for (const auto& [from, to] : from_to) {
    TM_CHECK(from != to, "KV block %d copied over itself", from);
    std::memcpy(kv.block(to), kv.block(from), bytes);
  }
}

void CpuBackend::save_blocks(const KvCache& cache, std::span<const BlockId> blocks, void* host) {
  const auto& kv = static_cast<const CpuKvCache&>(cache);
  const size_t bytes = CpuKvCache::block_bytes(kv.spec());
  for (size_t i = 0; i < blocks.size(); ++i) {
    std::memcpy(static_cast<char*>(host) + i * bytes, kv.block(blocks[i]), bytes);
  }
}

void CpuBackend::load_blocks(KvCache& cache, std::span<const BlockId> blocks, const void* host) {
  const auto& kv = static_cast<const CpuKvCache&>(cache);
  const size_t bytes = CpuKvCache::block_bytes(kv.spec());
  for (size_t i = 0; i < blocks.size(); ++i) {
    std::memcpy(kv.block(blocks[i]), static_cast<const char*>(host) + i * bytes, bytes);
  }
}

size_t CpuBackend::weight_bytes(const LinearSource& source, WeightUse use) const {
  switch (use) {
    case WeightUse::linear:
      return packed_linear_bytes(source, isa_);
    case WeightUse::embedding:
      return 0;  // rows are read from the file
    case WeightUse::head:
    case WeightUse::tied_head:
      return packed_head_bytes(source);
  }
  return 0;
}

size_t CpuBackend::allocated_bytes() const {
  return meter_->load(std::memory_order_relaxed) + linear_scratch_.bytes() +
         vision_scratch_.bytes() + sample_x_.bytes() + scores_.bytes() +
         attention_.reserved_bytes();
}

namespace {

AttentionLimits attention_limits(const Backend::WorkspaceSpec& spec) {
  return {.max_tokens = spec.max_tokens,
          .max_sequences = spec.max_sequences,
          .max_kv_len = spec.max_kv_len,
          .max_heads = spec.max_heads,
          .max_head_dim = spec.max_head_dim,
          .block_size = spec.kv_block_size,
          .quantized = spec.kv_bits != 16};
}

}  // namespace

CpuBackend::Sizes CpuBackend::sizes(const WorkspaceSpec& spec) const {
  const int64_t hidden = spec.hidden_size > 0 ? spec.hidden_size : spec.max_in_features;
  const auto rows = static_cast<size_t>(std::min(spec.max_rows, kLogitRows));
  Sizes sizes{};
  sizes.linear = std::max(linear_scratch_bound(spec.max_tokens, spec.max_in_features),
                          head_scratch_bound(kLogitRows, spec.vocab_size, hidden));
  if (spec.vision_tile_tokens > 0) {
    sizes.vision =
        vision_attention_scratch_bytes(spec.vision_tile_tokens, spec.vision_head_dim, pool_.size());
  }
  sizes.sample_x = (static_cast<size_t>(spec.max_rows) + kLogitRows) * static_cast<size_t>(hidden) *
                   sizeof(float);
  sizes.scores = rows * static_cast<size_t>(spec.vocab_size) * sizeof(float);
  sizes.attention = attention_.scratch_bytes(attention_limits(spec));
  return sizes;
}

WorkspaceBytes CpuBackend::workspace_bytes(const WorkspaceSpec& spec) const {
  const Sizes bytes = sizes(spec);
  return {.scratch = bytes.linear + bytes.vision + bytes.attention,
          .sampling = bytes.sample_x + bytes.scores};
}

WorkspaceBytes CpuBackend::reserve_workspace(const WorkspaceSpec& spec) {
  const Sizes bytes = sizes(spec);
  linear_scratch_.reserve(bytes.linear, "linear layer scratch");
  vision_scratch_.reserve(bytes.vision, "vision attention scratch");
  sample_x_.reserve(bytes.sample_x, "sampled rows");
  scores_.reserve(bytes.scores, "logits");
  attention_.reserve(attention_limits(spec));
  statuses_.reserve(static_cast<size_t>(spec.max_rows));
  best_rows_.reserve(static_cast<size_t>(spec.max_rows));
  full_rows_.reserve(static_cast<size_t>(spec.max_rows));
  return workspace_bytes(spec);
}

void CpuBackend::begin_step(const StepBatch& batch) {
  const auto tokens = static_cast<size_t>(batch.num_tokens());
  const auto sequences = static_cast<size_t>(batch.num_sequences());
  TM_CHECK(batch.positions.size() == tokens && batch.slots.size() == tokens &&
               batch.query_start.size() == sequences + 1 &&
               batch.block_table.size() >= sequences * static_cast<size_t>(batch.max_blocks) &&
               static_cast<size_t>(batch.query_start[sequences]) == tokens,
           "a step of %zu tokens and %zu sequences has %zu positions, %zu slots and %zu starts",
           tokens, sequences, batch.positions.size(), batch.slots.size(), batch.query_start.size());
  batch_ = batch;
  attention_.begin_step(batch);
}

void CpuBackend::embed(const EmbedArgs& args) { cpu::embed(args, batch_.token_ids, pool_); }

void CpuBackend::norm(const Norm& norm, ConstTensorView x, TensorView y) {
  expect_f32("norm input", x);
  expect_f32("norm output", y);
  TM_CHECK(x.elements() == y.elements() && x.row_elements() == norm.weight.elements(),
           "norm of %lld values a row with a weight of %lld",
           static_cast<long long>(x.row_elements()),
           static_cast<long long>(norm.weight.elements()));
  normalize_rows(norm, x.as<float>(), y.as<float>(), x.dim(0), x.row_elements(), isa_, pool_);
}

void CpuBackend::linear(const LinearArgs& args) {
  const auto* linear = dynamic_cast<const Linear*>(args.weight);
  TM_CHECK(linear != nullptr, "linear needs a weight made by load_linear");
  expect_f32("linear input", args.x);
  expect_f32("linear output", args.y);
  const int64_t rows = args.x.dim(0);
  const int64_t columns =
      args.epilogue == Epilogue::silu_mul ? linear->out_features() / 2 : linear->out_features();
  TM_CHECK(args.x.elements() == rows * linear->in_features() && args.y.elements() == rows * columns,
           "linear of %lld rows: x has %lld values (K = %lld), y has %lld (N = %lld)",
           static_cast<long long>(rows), static_cast<long long>(args.x.elements()),
           static_cast<long long>(linear->in_features()), static_cast<long long>(args.y.elements()),
           static_cast<long long>(columns));
  // next_norm stays unused: here a norm is a pass over rows that are in the cache, and costs no launch.
  linear_scratch_.reserve(linear->packed()->scratch_bytes(rows), "linear layer scratch");
  linear->packed()->run({.x = args.x.as<float>(),
                         .y = args.y.as<float>(),
                         .rows = rows,
                         .norm = args.norm,
                         .epilogue = args.epilogue,
                         .scale = args.scale ? args.scale.as<float>() : nullptr},
                        linear_scratch_.data(), pool_);
}

void CpuBackend::attention(const AttentionArgs& args) { attention_.run(args); }

const CpuBackend::Head& CpuBackend::head_of(const LinearWeight* weight, ConstTensorView x) const {
  const auto* head = dynamic_cast<const Head*>(weight);
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
  const Head& head = head_of(args.head, args.x);
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

void CpuBackend::patchify(const PatchifyArgs& args) { cpu::patchify(args, pool_); }

void CpuBackend::vision_embed(const VisionEmbedArgs& args) { cpu::vision_embed(args, pool_); }

void CpuBackend::vision_attention(const VisionAttentionArgs& args) {
  cpu::vision_attention(args, isa_, vision_scratch_, pool_);
}

void CpuBackend::pixel_shuffle(const PixelShuffleArgs& args) { cpu::pixel_shuffle(args, pool_); }

}  // namespace turbomind::cpu
