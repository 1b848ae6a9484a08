// Opening, memory, and the ops but for the head: checks what crosses the seam, finds scratch, and calls the
// kernels.
#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "backend/cpu/cpu_weight.h"
#include "backend/cpu/kv_cache.h"
#include "backend/cpu/pointwise.h"
#include "backend/cpu/vision_ops.h"
#include "base/host_memory_info.h"

namespace turbomind::cpu {
namespace {

int thread_count(int wanted) {
  if (wanted < 0 || wanted > 1024) {
    throw Error(ErrorCode::invalid_argument,
                format("threads is %d; expected 0 (all usable CPUs) to 1024", wanted));
  }
  return wanted == 0 ? usable_threads() : wanted;
}

}  // namespace

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
  return std::make_unique<CpuLinear>(pack_linear(source, isa_, pool_), meter_);
}

std::unique_ptr<LinearWeight> CpuBackend::load_embedding(ConstTensorView table) {
  return std::make_unique<CpuEmbedding>(table);
}

std::unique_ptr<LinearWeight> CpuBackend::load_head(const LinearSource& source) {
  return std::make_unique<CpuHead>(pack_head(source, isa_, pool_), meter_);
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
  const auto* linear = dynamic_cast<const CpuLinear*>(args.weight);
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

void CpuBackend::patchify(const PatchifyArgs& args) { cpu::patchify(args, pool_); }

void CpuBackend::vision_embed(const VisionEmbedArgs& args) { cpu::vision_embed(args, pool_); }

void CpuBackend::vision_attention(const VisionAttentionArgs& args) {
  cpu::vision_attention(args, isa_, vision_scratch_, pool_);
}

void CpuBackend::pixel_shuffle(const PixelShuffleArgs& args) { cpu::pixel_shuffle(args, pool_); }

}  // namespace turbomind::cpu
