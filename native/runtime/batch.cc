#include "runtime/batch.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {
namespace {

const SamplingParams kPlain;  // of rows whose token nobody wants

}  // namespace

void Batch::reserve(int max_tokens, int max_sequences, int max_rows, int max_blocks_per_sequence) {
  const auto tokens = static_cast<size_t>(max_tokens);
  const auto sequences = static_cast<size_t>(max_sequences);
  token_ids_.reserve(tokens);
  fed_from_.reserve(sequences);
  positions_.reserve(tokens);
  slots_.reserve(tokens);
  query_start_.reserve(sequences + 1);
  kv_len_.reserve(sequences);
  block_table_.reserve(sequences * static_cast<size_t>(max_blocks_per_sequence));
  sample_indices_.reserve(static_cast<size_t>(max_rows));
  samples_.reserve(static_cast<size_t>(max_rows));
}

void Batch::build(const StepPlan& plan) {
  token_ids_.clear();
  fed_from_.clear();
  positions_.clear();
  slots_.clear();
  query_start_.assign(1, 0);
  kv_len_.clear();
  sample_indices_.clear();
  samples_.clear();
  image_rows_.clear();
  max_blocks_ = 0;
  for (const ScheduledRow& row : plan.rows) {
    max_blocks_ = std::max(max_blocks_, row.sequence->blocks().num_blocks());
  }
  block_table_.assign(plan.rows.size() * static_cast<size_t>(max_blocks_), -1);
  for (const ScheduledRow& row : plan.rows) add_row(row);
}

void Batch::add_row(const ScheduledRow& row) {
  const Sequence& sequence = *row.sequence;
  const int begin = sequence.num_computed() + row.ahead;
  const int end = begin + row.num_tokens;
  const std::span<const TokenId> tokens = sequence.tokens_and_drafts();
  const int first_row = static_cast<int>(token_ids_.size());
  token_ids_.insert(token_ids_.end(), tokens.begin() + begin, tokens.begin() + end);
  if (row.ahead > 0) fed_from_.push_back(row.fed_from);
  for (int i = begin; i < end; ++i) {
    positions_.push_back(i);
    slots_.push_back(sequence.blocks().slot(i));
  }
  const std::span<const BlockId> blocks = sequence.blocks().blocks();
  std::copy(blocks.begin(), blocks.end(),
            block_table_.begin() + static_cast<ptrdiff_t>(kv_len_.size()) * max_blocks_);
  query_start_.push_back(first_row + row.num_tokens);
  kv_len_.push_back(end);
  add_images(sequence, begin, end, first_row);
  for (int i = row.num_tokens - row.num_samples; i < row.num_tokens; ++i) {
    // The row of token `begin + i` draws the one behind it.
    const int known = begin + i + 1;
    const int completion_idx = known - sequence.num_prompt_tokens();
    sample_indices_.push_back(first_row + i);
    samples_.push_back({&sequence.request().sampling, tokens.first(static_cast<size_t>(known)),
                        sequence.banned(completion_idx), static_cast<uint32_t>(completion_idx)});
  }
}

void Batch::drop_ended(const StepPlan& plan) {
  size_t r = 0;
  for (const ScheduledRow& row : plan.rows) {
    for (int i = 0; i < row.num_samples; ++i, ++r) {
      if (row.sequence != nullptr) continue;
      samples_[r] = SampleRow{};
      samples_[r].params = &kPlain;
    }
  }
}

void Batch::take_masks(const StepPlan& plan) {
  size_t r = 0;
  for (const ScheduledRow& row : plan.rows) {
    for (int i = 0; i < row.num_samples; ++i) {
      SampleRow& sample = samples_[r++];
      if (row.sequence->parked()) {
        sample.params = &kPlain;
        sample.banned = {};
      } else {
        sample.allowed = row.sequence->allowed();
      }
    }
  }
}

void Batch::add_images(const Sequence& sequence, int begin, int end, int first_row) {
  for (const SequenceImage& image : sequence.images()) {
    int next = std::max(begin, image.token_offset);  // token to cover
    const int image_end = std::min(end, image.end());
    if (next >= image_end) continue;
    for (const EncodedTiles& tiles : image.encoded->runs()) {
      const int tiles_begin = image.token_offset + tiles.first_tile * image.tokens_per_tile;
      const int tiles_end = tiles_begin + tiles.num_tiles * image.tokens_per_tile;
      if (next >= image_end || next < tiles_begin || next >= tiles_end) continue;
      const int count = std::min(image_end, tiles_end) - next;
      image_rows_.push_back({first_row + next - begin, &tiles, next - tiles_begin, count});
      next += count;
    }
    TM_CHECK(next >= image_end, "token %d of an image has no embedding", next);
  }
}

StepBatch Batch::view() const {
  StepBatch batch;
  batch.token_ids = token_ids_;
  TM_CHECK(fed_from_.empty() || fed_from_.size() == token_ids_.size(), "%zu of %zu rows run ahead",
           fed_from_.size(), token_ids_.size());
  batch.fed_from = fed_from_;
  batch.positions = positions_;
  batch.slots = slots_;
  batch.query_start = query_start_;
  batch.kv_len = kv_len_;
  batch.block_table = block_table_;
  batch.max_blocks = max_blocks_;
  batch.sample_rows = sample_indices_;
  return batch;
}

}  // namespace turbomind
