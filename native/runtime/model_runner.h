// Runs one step: image tiles through the vision tower, the plan's rows through the decoder, one token
// for each row that wants one. Talks to the model through the small seam `Model`; loaded_model.h
// puts the real one behind it, tests a scripted one. Engine thread.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "runtime/batch.h"
#include "runtime/memory_plan.h"

namespace turbomind {

class TileEmbeddings final : public ImageEmbeddings {
 public:
  TileEmbeddings(std::unique_ptr<Buffer> buffer, ConstTensorView view)
      : buffer_(std::move(buffer)), view_(view) {}
  ConstTensorView view() const { return view_; }  // [tiles * tokens per tile, H]

 private:
  std::unique_ptr<Buffer> buffer_;
  ConstTensorView view_;
};

// A loaded model with its KV cache. The result for a row depends on its own sequence alone.
class Model {
 public:
  virtual ~Model() = default;
  // tiles: [n, S, S, 3] u8 in host memory.
  virtual std::unique_ptr<TileEmbeddings> encode_images(ConstTensorView tiles) = 0;
  // K and V of all rows are written; `batch` stays valid until sample() has returned.
  virtual void forward(const StepBatch& batch, std::span<const EmbeddingOverride> overrides) = 0;
  virtual void synchronize() {}  // until the forward has run
  // Tokens of the step's sample_rows, [R], R may be 0. Waits for the step. If some rows cannot be
  // sampled, throws Error with their tokens left at -1 and the other rows drawn.
  virtual void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) = 0;
  // Of rows [first, first + n) of the step's T. Each waits.
  virtual void logits(int first_row, std::span<float> out) = 0;  // [n, V]
  // [n, H] after the last norm.
  virtual void hidden_states(int first_row, std::span<float> out) = 0;
};

class ModelRunner {
 public:
  ModelRunner(Model& model, const MemoryPlan& memory);

  // Starts the plan's step. Throws if it fails as a whole.
  void forward(const StepPlan& plan);
  // What its sampling rows drew; valid until the next forward. Masks and parked sequences are looked
  // at now. A failure of single rows is part of the results.
  StepResults sample(const StepPlan& plan);
  StepResults run(const StepPlan& plan) {
    forward(plan);
    return sample(plan);
  }
  // First row of T of the i-th row of the plan.
  int first_row(size_t plan_row) const { return batch_.query_start()[plan_row]; }
  // Like run, but answers the logits of the plan's last row: [V].
  void run_logits(const StepPlan& plan, std::span<float> out);

 private:
  void encode(const ScheduledTiles& scheduled);

  Model& model_;
  Batch batch_;
  std::vector<EmbeddingOverride> overrides_;
  std::vector<SampleResult> results_;  // [R]
  Clock::time_point begin_;            // of the last forward
};

}  // namespace turbomind
