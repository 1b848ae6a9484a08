// The workspace: every size, and the memory of a step's arrays, of partial sums and of the sampler.
// Engine thread (or the thread that opens the pipeline), between steps.
#include <algorithm>
#include <array>

#include "backend/cuda/cuda_backend.h"

namespace turbomind::cuda {
namespace {

constexpr size_t kGemmPartialFloats = size_t{8} << 20;
constexpr size_t kGemmTickets = 4096;
constexpr size_t kMaxAttentionBytes = size_t{288} << 20;

}  // namespace

// Every size of a workspace, from which it is both planned and made.
struct CudaBackend::WorkspaceSizes {
  int max_items = 0;
  int max_tiles = 0;
  int max_blocks = 0;
  std::array<size_t, kUnpackEntries> words{};  // of the step's arrays
  size_t step_bytes = 0;                       // of all of them
  size_t scratch_row_elements = 0;
  size_t scratch = 0;
  int tokens = 0;
  int64_t norm_columns = 0;  // of rows whose norm may be split
  size_t attention_records = 0;
  SamplerSizes sampler;  // no rows: nothing is sampled

  explicit WorkspaceSizes(const WorkspaceSpec& spec);
};

CudaBackend::WorkspaceSizes::WorkspaceSizes(const WorkspaceSpec& spec) {
  tokens = std::max(spec.max_tokens, kMaxGraphRows);
  const int sequences = std::max(spec.max_sequences, 1);
  const auto heads = static_cast<size_t>(std::max(spec.max_heads, 1));
  const auto dim = static_cast<size_t>(std::max(spec.max_head_dim, 1));
  max_blocks = ceil_div(std::max(spec.max_kv_len, 1), kBlockTokens) + 1;
  const size_t item_bytes = decode_record_bytes(static_cast<int>(heads), static_cast<int>(dim));
  const int64_t all_items =
      static_cast<int64_t>(sequences) * ceil_div(std::max(spec.max_kv_len, 1), kSplitTokens);
  max_items = pad_items(static_cast<int>(
      std::min<int64_t>(all_items, static_cast<int64_t>(kMaxAttentionBytes / item_bytes))));
  max_tiles = ceil_div(tokens, kQueryTile) + sequences;
  words = {static_cast<size_t>(tokens),
           static_cast<size_t>(tokens),
           static_cast<size_t>(tokens),
           static_cast<size_t>(sequences) + 1,
           static_cast<size_t>(sequences),
           static_cast<size_t>(tokens),
           static_cast<size_t>(sequences),
           2 * static_cast<size_t>(max_items),
           2 * static_cast<size_t>(max_tiles),
           3,
           static_cast<size_t>(sequences) * static_cast<size_t>(max_blocks)};
  for (size_t count : words) step_bytes += round_up<size_t>(count, 64) * sizeof(int32_t);
  step_bytes += static_cast<size_t>(kMaxGraphRows + sequences) * sizeof(int32_t);  // the feed
  scratch_row_elements = static_cast<size_t>(
      round_up<int64_t>(std::max<int64_t>(spec.max_in_features, 1), kChunkColumns));
  scratch = static_cast<size_t>(tokens) * scratch_row_elements * 2;
  norm_columns =
      std::max<int64_t>(spec.hidden_size > 0 ? spec.hidden_size : spec.max_in_features, 1);
  attention_records = static_cast<size_t>(max_items) * item_bytes;
  if (spec.vocab_size <= 0 || spec.max_rows <= 0) return;
  // Captured steps compute the logits of padding rows too.
  sampler = sampler_sizes(spec, row_bucket(spec.max_rows));
}

WorkspaceBytes CudaBackend::workspace_bytes(const WorkspaceSpec& spec) const {
  const WorkspaceSizes sizes(spec);
  WorkspaceBytes bytes;
  for (size_t part : {sizes.step_bytes, sizes.step_bytes, sizes.scratch,
                      SplitNorms::strip_bytes(sizes.tokens, sizes.norm_columns),
                      SplitNorms::scale_bytes(sizes.tokens), kGemmPartialFloats * sizeof(float),
                      kGemmTickets * sizeof(uint32_t), sizes.attention_records}) {
    bytes.scratch += buffer_bytes(part);
  }
  if (spec.vision_pixel_bytes > 0) bytes.scratch += buffer_bytes(spec.vision_pixel_bytes);
  bytes.staging = 2 * sizes.step_bytes;
  if (sizes.sampler.rows > 0) {
    bytes.staging += sampler_host_bytes(sizes.sampler);
    for (size_t part : sampler_buffers(sizes.sampler)) bytes.sampling += buffer_bytes(part);
  }
  if (use_graphs_) bytes.graphs = GraphCache::kMaxGraphs * GraphCache::kGraphBytes;
  return bytes;
}

WorkspaceBytes CudaBackend::reserve_workspace(const WorkspaceSpec& spec) {
  use_device();
  finish_loading();
  graphs_.clear();
  workspace_ = Workspace{};
  split_norms_.release();
  Workspace& w = workspace_;
  const WorkspaceSizes sizes(spec);
  w.spec = spec;
  w.max_blocks = sizes.max_blocks;
  w.max_items = sizes.max_items;
  w.max_tiles = sizes.max_tiles;

  w.arrays = zeroed(sizes.step_bytes);
  auto* cursor = static_cast<int32_t*>(w.arrays->data());
  size_t array = 0;
  const auto take = [&] {
    int32_t* at = cursor;
    cursor += round_up<size_t>(sizes.words[array++], 64);
    return at;
  };
  w.step.token_ids = take();
  w.step.positions = take();
  w.step.slots = take();
  w.step.query_start = take();
  w.step.kv_len = take();
  w.step.sample_rows = take();
  w.step.split_start = take();
  w.step.decode_items = reinterpret_cast<int2*>(take());
  w.step.query_tiles = reinterpret_cast<int2*>(take());
  w.step.block_stride = take();
  w.step.block_table = take();
  w.blob = pool_.allocate(sizes.step_bytes);
  for (auto& staging : w.staging) staging = std::make_unique<PinnedBuffer>(sizes.step_bytes);

  w.scratch_row_elements = sizes.scratch_row_elements;
  w.scratch = pool_.allocate(sizes.scratch);
  split_norms_.reserve(pool_, sizes.tokens, sizes.norm_columns);
  w.gemm_partials = pool_.allocate(kGemmPartialFloats * sizeof(float));
  w.gemm_tickets = zeroed(kGemmTickets * sizeof(uint32_t));
  w.attention_records = pool_.allocate(sizes.attention_records);
  cuda_check(cudaMemsetAsync(w.attention_records->data(), 0xff, w.attention_records->bytes(),
                             context_.stream),
             "marking the records of decode attention as absent");
  if (sizes.sampler.rows > 0) {
    w.sampler = std::make_unique<CudaSampler>(sizes.sampler, context_, pool_);
    w.fed_rows.reserve(static_cast<size_t>(sizes.sampler.tasks));
  }
  tiles_.reset();
  if (spec.vision_pixel_bytes > 0) tiles_ = pool_.allocate(spec.vision_pixel_bytes);
  synchronize();
  return workspace_bytes(spec);
}

}  // namespace turbomind::cuda
