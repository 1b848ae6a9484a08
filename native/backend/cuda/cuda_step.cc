// The arrays of a step: flattened on the host, sent at once, spread by one kernel to fixed addresses;
// and execution, which replays a captured graph for decode steps. Engine thread.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "backend/cuda/cuda_backend.h"

namespace turbomind::cuda {
namespace {

constexpr int kMaxGraphRows = 256;
constexpr size_t kGemmPartialFloats = size_t{8} << 20;
constexpr size_t kGemmTickets = 4096;
// A step's arrays of up to so many bytes are read from pinned memory by the kernel that spreads them: a
// copy in front of it would take longer than the trip over the bus.
constexpr size_t kDirectBytes = size_t{16} << 10;
constexpr size_t kMaxAttentionBytes = size_t{256} << 20;

// Padded rows of a decode step: few enough graphs, little waste.
int row_bucket(int rows) {
  constexpr int kBuckets[] = {1,  2,  4,  8,  12,  16,  24,  32,  40,  48,
                              56, 64, 80, 96, 112, 128, 160, 192, 224, 256};
  for (int bucket : kBuckets) {
    if (rows <= bucket) return bucket;
  }
  return rows;
}

int pad_items(int items) { return static_cast<int>(std::bit_ceil(static_cast<unsigned>(items))); }

// Fills the blob of one step and remembers where each array goes.
class BlobWriter {
 public:
  BlobWriter(char* data, size_t bytes)
      : words_(reinterpret_cast<int32_t*>(data)), capacity_(bytes / sizeof(int32_t)) {}
  // Room for `count` words that will be copied to `destination`.
  std::span<int32_t> add(int32_t* destination, size_t count) {
    TM_CHECK(entry_ < kUnpackEntries, "array %d of a step", entry_);
    args_.entries[entry_++] = {destination, static_cast<int32_t>(used_),
                               static_cast<int32_t>(count)};
    return take(count);
  }
  // Room for the rows that `count` tokens come from; `ids` is read when the arrays are unpacked.
  std::span<int32_t> add_feed(const int32_t* ids, size_t count) {
    args_.fed_from_word = static_cast<int32_t>(used_);
    args_.ids = ids;
    return take(count);
  }
  size_t bytes() const { return used_ * sizeof(int32_t); }
  UnpackArgs& args() { return args_; }

 private:
  std::span<int32_t> take(size_t count) {
    TM_CHECK(used_ + count <= capacity_, "a step of %zu words, %zu reserved", used_ + count,
             capacity_);
    const std::span<int32_t> out(words_ + used_, count);
    used_ += count;
    return out;
  }

  int32_t* words_;
  size_t capacity_;
  size_t used_ = 0;
  int entry_ = 0;
  UnpackArgs args_;
};

// What attention runs in a step where sequences of at most `decode_rows` rows take the decode kernel
// and the others, cut into tiles of query rows, the prefill kernel. A matter of speed: both give the
// same bits.
struct AttentionWork {
  int items = 0;
  int rows = 0;  // most of a sequence with items
  int tiles = 0;
};

int query_rows(const StepBatch& batch, int s) {
  return batch.query_start[s + 1] - batch.query_start[s];
}

AttentionWork attention_work(const StepBatch& batch, int decode_rows) {
  AttentionWork work;
  for (int s = 0; s < batch.num_sequences(); ++s) {
    const int rows = query_rows(batch, s);
    if (rows <= decode_rows) {
      work.rows = std::max(work.rows, rows);
      work.items += ceil_div(batch.kv_len[s], kSplitTokens);
    } else {
      work.tiles += ceil_div(rows, kQueryTile);
    }
  }
  return work;
}

void fill(std::span<int32_t> out, std::span<const int32_t> values, int32_t padding) {
  std::copy(values.begin(), values.end(), out.begin());
  std::fill(out.begin() + static_cast<int64_t>(values.size()), out.end(), padding);
}

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
  size_t attention_out = 0;
  size_t attention_max_sum = 0;
  size_t attention_tickets = 0;
  SamplerSizes sampler;  // no rows: nothing is sampled

  explicit WorkspaceSizes(const WorkspaceSpec& spec);
};

CudaBackend::WorkspaceSizes::WorkspaceSizes(const WorkspaceSpec& spec) {
  tokens = std::max(spec.max_tokens, kMaxGraphRows);
  const int sequences = std::max(spec.max_sequences, 1);
  const auto heads = static_cast<size_t>(std::max(spec.max_heads, 1));
  const auto dim = static_cast<size_t>(std::max(spec.max_head_dim, 1));
  max_blocks = ceil_div(std::max(spec.max_kv_len, 1), kBlockTokens) + 1;
  const size_t item_bytes = 2 * heads * (dim * sizeof(float) + sizeof(float2));
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
  const auto items = static_cast<size_t>(max_items);
  attention_out = items * 2 * heads * dim * sizeof(float);
  attention_max_sum = items * 2 * heads * sizeof(float2);
  attention_tickets = static_cast<size_t>(sequences) * kMaxDecodeRows * heads * sizeof(uint32_t);
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
                      kGemmTickets * sizeof(uint32_t), sizes.attention_out, sizes.attention_max_sum,
                      sizes.attention_tickets}) {
    bytes.scratch += buffer_bytes(part);
  }
  if (spec.vision_pixel_bytes > 0) bytes.scratch += buffer_bytes(spec.vision_pixel_bytes);
  bytes.scratch += buffer_bytes(decode_record_bytes(context_));
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
  w.attention_out = pool_.allocate(sizes.attention_out);
  w.attention_max_sum = pool_.allocate(sizes.attention_max_sum);
  w.attention_tickets = zeroed(sizes.attention_tickets);
  w.attention_records = pool_.allocate(decode_record_bytes(context_));
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

void CudaBackend::begin_step(const StepBatch& batch) {
  use_device();
  Workspace& w = workspace_;
  TM_CHECK(w.blob != nullptr, "begin_step before reserve_workspace");
  const int tokens = batch.num_tokens();
  const int sequences = batch.num_sequences();
  TM_CHECK(tokens <= std::max(w.spec.max_tokens, 1) &&
               sequences <= std::max(w.spec.max_sequences, 1) &&
               static_cast<int>(batch.sample_rows.size()) <= std::max(w.spec.max_rows, 1) &&
               batch.max_blocks <= w.max_blocks,
           "a step of %d tokens, %d sequences, %zu rows, %d blocks a sequence; the workspace holds "
           "%d, %d, %d, %d",
           tokens, sequences, batch.sample_rows.size(), batch.max_blocks, w.spec.max_tokens,
           w.spec.max_sequences, w.spec.max_rows, w.max_blocks);
  split_norms_.forget();
  step_ = Step{};
  step_.tokens = tokens;
  step_.sequences = sequences;
  step_.rows = static_cast<int>(batch.sample_rows.size());

  const int decode_rows = plan_attention(batch);
  // flatten
  const int slot = w.next_staging;
  step_.slot = slot;
  w.fed_rows.clear();
  for (size_t r = 0; !batch.fed_from.empty() && r < batch.sample_rows.size(); ++r) {
    const int32_t row = batch.sample_rows[r];
    w.fed_rows.push_back(batch.fed_from[static_cast<size_t>(row)] >= 0 ? row : -1);
  }
  w.next_staging = 1 - slot;
  w.staged[slot].wait();
  BlobWriter blob(w.staging[slot]->data(), w.staging[slot]->bytes());
  const auto padded = static_cast<size_t>(step_.padded_rows);
  fill(blob.add(w.step.token_ids, padded), batch.token_ids, 0);
  if (!batch.fed_from.empty()) {
    TM_CHECK(w.sampler != nullptr, "a step fed by tokens that nobody has drawn");
    fill(blob.add_feed(w.sampler->ids(), padded), batch.fed_from, -1);
  }
  fill(blob.add(w.step.positions, padded), batch.positions, 0);
  fill(blob.add(w.step.slots, padded), batch.slots, -1);
  fill(blob.add(w.step.query_start, batch.query_start.size()), batch.query_start, 0);
  fill(blob.add(w.step.kv_len, batch.kv_len.size()), batch.kv_len, 0);
  const size_t sampled = batch.sample_rows.size();
  fill(blob.add(w.step.sample_rows, step_.decode_only ? std::max(sampled, padded) : sampled),
       batch.sample_rows, 0);
  const std::span<int32_t> split_start =
      blob.add(w.step.split_start, static_cast<size_t>(sequences));
  const std::span<int32_t> items = blob.add(reinterpret_cast<int32_t*>(w.step.decode_items),
                                            2 * static_cast<size_t>(step_.padded_items));
  const std::span<int32_t> tiles = blob.add(reinterpret_cast<int32_t*>(w.step.query_tiles),
                                            2 * static_cast<size_t>(step_.tiles));
  size_t item = 0;
  size_t tile = 0;
  for (int s = 0; s < sequences; ++s) {
    const int queries = query_rows(batch, s);
    split_start[static_cast<size_t>(s)] = static_cast<int32_t>(item / 2);
    const bool decode = queries <= decode_rows;
    for (int i = 0; decode && i < ceil_div(batch.kv_len[s], kSplitTokens); ++i) {
      items[item++] = s;
      items[item++] = i;
    }
    for (int i = 0; !decode && i < queries; i += kQueryTile) {
      tiles[tile++] = s;
      tiles[tile++] = i;
    }
  }
  std::fill(items.begin() + static_cast<int64_t>(item), items.end(), -1);
  const std::span<int32_t> sizes = blob.add(w.step.block_stride, 3);
  sizes[0] = batch.max_blocks;
  sizes[1] = step_.items;
  sizes[2] = slot;
  fill(blob.add(w.step.block_table, batch.block_table.size()), batch.block_table, -1);

  // send
  if (blob.bytes() <= kDirectBytes) {
    blob.args().blob = reinterpret_cast<const int32_t*>(w.staging[slot]->data());
  } else {
    blob.args().blob = static_cast<const int32_t*>(w.blob->data());
    cuda_check(cudaMemcpyAsync(w.blob->data(), w.staging[slot]->data(), blob.bytes(),
                               cudaMemcpyHostToDevice, context_.stream),
               "uploading a step");
  }
  unpack_step(context_, blob.args());
  w.staged[slot].record(context_.stream);
}

// How attention is split; answers the most rows of a sequence that is decoded.
int CudaBackend::plan_attention(const StepBatch& batch) {
  const Workspace& w = workspace_;
  // Parts of many rows take more memory: where they do not fit, fewer rows are decoded.
  int decode_rows = kMaxDecodeRows;
  AttentionWork work = attention_work(batch, decode_rows);
  while (work.items * work.rows > w.max_items && decode_rows > 1) {
    decode_rows /= 2;
    work = attention_work(batch, decode_rows);
  }
  step_.items = work.items;
  step_.decode_rows = work.rows;
  step_.tiles = work.tiles;
  TM_CHECK(step_.tiles <= w.max_tiles, "%d query tiles, %d reserved", step_.tiles, w.max_tiles);
  if (step_.items > w.max_items) {
    throw Error(ErrorCode::out_of_memory,
                format("decode attention of this step needs %d work items, the workspace holds %d; "
                       "lower maxBatchSize or sessionLen",
                       step_.items, w.max_items));
  }
  // Decode rows, and drafts behind them: all of them are sampled. Others pass once and would only
  // crowd out graphs that are worth keeping.
  const int tokens = step_.tokens;
  step_.decode_only = step_.tiles == 0 && tokens > 0 && tokens <= kMaxGraphRows &&
                      (tokens == step_.sequences || tokens == step_.rows);
  step_.padded_rows = step_.decode_only ? row_bucket(tokens) : tokens;
  step_.padded_items = step_.items == 0 ? 0 : std::min(pad_items(step_.items), w.max_items);
  // Few sizes of captured steps; where the parts would not fit, the rows there are.
  const int padded = static_cast<int>(std::bit_ceil(static_cast<unsigned>(work.rows)));
  if (step_.items * padded <= w.max_items) step_.decode_rows = padded;
  return decode_rows;
}

void CudaBackend::execute(const std::function<void()>& forward) {
  use_device();
  if (!use_graphs_ || !step_.decode_only) {
    forward();
    return;
  }
  // Restores the plain mode whatever happens in forward.
  struct Restore {
    CudaBackend& backend;
    ~Restore() {
      backend.mode_ = Mode::run;
      backend.graph_rows_ = 0;
    }
  } restore{*this};
  signature_ = 0xcbf29ce484222325ULL;
  capacity_rows_ = kMaxGraphRows;
  capturable_ = true;
  mode_ = Mode::sign;
  forward();
  mode_ = Mode::run;
  if (!capturable_) {
    forward();
    return;
  }
  const int rows = step_.padded_rows <= capacity_rows_ ? step_.padded_rows : step_.tokens;
  const GraphKey key{signature_, rows, step_.padded_items, step_.decode_rows};
  graph_rows_ = rows;
  graphs_.run(key, context_.stream, forward);
}

int CudaBackend::launch_rows(int64_t rows) const {
  return graph_rows_ > 0 && rows == step_.tokens ? graph_rows_ : static_cast<int>(rows);
}

void CudaBackend::sign(std::initializer_list<uint64_t> values) {
  for (uint64_t value : values) {
    signature_ = (signature_ ^ value) * 0x9e3779b97f4a7c15ULL;
    signature_ ^= signature_ >> 29;
  }
}

void CudaBackend::sign_view(const void* data, int64_t row_bytes) {
  sign({address(data), static_cast<uint64_t>(row_bytes)});
  const auto known = live_buffers_->find(data);
  // A view that does not start a buffer holds the rows it says and no more.
  const int64_t rows = known == live_buffers_->end()
                           ? step_.tokens
                           : static_cast<int64_t>(known->second) / std::max<int64_t>(row_bytes, 1);
  capacity_rows_ = std::min(capacity_rows_, rows);
}

}  // namespace turbomind::cuda
