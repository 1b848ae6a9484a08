// The arrays of a step: flattened on the host, sent at once, spread by one kernel to fixed addresses.
// Which attention kernel takes which sequence is decided here. Engine thread.
#include <algorithm>
#include <bit>

#include "backend/cuda/cuda_backend.h"

namespace turbomind::cuda {
namespace {

// A step's arrays of up to so many bytes are read from pinned memory by the kernel that spreads them: a
// copy in front of it would take longer than the trip over the bus.
constexpr size_t kDirectBytes = size_t{16} << 10;

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

// SampledStep::fed_rows of a step.
void list_fed_rows(const StepBatch& batch, std::vector<int32_t>& fed_rows) {
  fed_rows.clear();
  for (size_t r = 0; !batch.fed_from.empty() && r < batch.sample_rows.size(); ++r) {
    const int32_t row = batch.sample_rows[r];
    fed_rows.push_back(batch.fed_from[static_cast<size_t>(row)] >= 0 ? row : -1);
  }
}

void fill(std::span<int32_t> out, std::span<const int32_t> values, int32_t padding) {
  std::copy(values.begin(), values.end(), out.begin());
  std::fill(out.begin() + static_cast<int64_t>(values.size()), out.end(), padding);
}

// The work items of decode attention and the query tiles of prefill attention, sequence by sequence.
void write_work(const StepBatch& batch, int decode_rows, const StepArrays& step, int padded_items,
                int num_tiles, BlobWriter& blob) {
  const std::span<int32_t> split_start =
      blob.add(step.split_start, static_cast<size_t>(batch.num_sequences()));
  const std::span<int32_t> items = blob.add(reinterpret_cast<int32_t*>(step.decode_items),
                                            2 * static_cast<size_t>(padded_items));
  const std::span<int32_t> tiles =
      blob.add(reinterpret_cast<int32_t*>(step.query_tiles), 2 * static_cast<size_t>(num_tiles));
  size_t item = 0;
  size_t tile = 0;
  for (int s = 0; s < batch.num_sequences(); ++s) {
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
}

}  // namespace

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
  list_fed_rows(batch, w.fed_rows);
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
  write_work(batch, decode_rows, w.step, step_.padded_items, step_.tiles, blob);
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

}  // namespace turbomind::cuda
