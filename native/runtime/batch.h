// A StepPlan as the flat host arrays that a backend takes. Its vectors keep their memory, so a
// steady state allocates nothing. Engine thread.
#pragma once

#include <span>
#include <vector>

#include "backend/backend.h"
#include "runtime/scheduler.h"

namespace turbomind {

// Rows of the step that take the embeddings of some tiles of one image.
struct ImageRows {
  int row = 0;  // first of T
  const EncodedTiles* tiles = nullptr;
  int first = 0;  // row of the tiles' embeddings
  int count = 0;
};

class Batch {
 public:
  void reserve(int max_tokens, int max_sequences, int max_rows, int max_blocks_per_sequence);
  // The plan's tiles must be encoded. Valid until the next build or a change of its sequences.
  void build(const StepPlan& plan);

  StepBatch view() const;
  std::span<const SampleRow> sample_rows() const { return samples_; }  // [R]
  // Masks that came after build; what a parked row draws is thrown away.
  void take_masks(const StepPlan& plan);
  // Rows of a plan that was started ahead whose sequences have ended since: nothing of them is read.
  void drop_ended(const StepPlan& plan);
  // Rows of T of the plan's sequences.
  std::span<const int32_t> query_start() const { return query_start_; }
  std::span<const ImageRows> image_rows() const { return image_rows_; }

 private:
  void add_row(const ScheduledRow& row);
  void add_images(const Sequence& sequence, int begin, int end, int first_row);

  std::vector<TokenId> token_ids_;       // [T]
  std::vector<int32_t> fed_from_;        // [T], or empty
  std::vector<int32_t> positions_;       // [T]
  std::vector<int32_t> slots_;           // [T]
  std::vector<int32_t> query_start_;     // [S + 1]
  std::vector<int32_t> kv_len_;          // [S]
  std::vector<int32_t> block_table_;     // [S, max_blocks_]
  std::vector<int32_t> sample_indices_;  // [R] rows of T
  std::vector<SampleRow> samples_;       // [R]
  std::vector<ImageRows> image_rows_;
  int max_blocks_ = 0;
};

}  // namespace turbomind
