// Runs one step: image tiles through the vision tower, the plan's rows through the decoder, one token
// for each row that wants one. Talks to the model through the small seam `Model`; device_model.h
// is the real one behind it, tests a scripted one. Engine thread.
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
  explicit TileEmbeddings(ConstTensorView view, std::unique_ptr<OpTimer> timer = nullptr)
      : view_(view), timer_(std::move(timer)) {}
  ConstTensorView view() const { return view_; }  // [tiles * tokens per tile, H]
  double encode_ms() const override { return timer_ ? timer_->ms() : 0; }

 private:
  ConstTensorView view_;  // into the model's store
  std::unique_ptr<OpTimer> timer_;
};

// A loaded model with its KV cache. The result for a row depends on its own sequence alone.
class Model {
 public:
  virtual ~Model() = default;
  // tiles: [n, S, S, 3] u8 in host memory. Their embeddings take slots [first_slot, first_slot + n) of
  // the store that the model was loaded with (MemoryPlan::max_held_tiles), and stay until others do.
  virtual std::unique_ptr<TileEmbeddings> encode_images(ConstTensorView tiles, int first_slot) = 0;
  // Copies KV block `first` over block `second` of each pair, all layers. No block is both read and
  // written, nor written twice.
  virtual void copy_blocks(std::span<const std::pair<BlockId, BlockId>> from_to) = 0;
  // Whole blocks to and from the model's host memory (as many slots as it was loaded with), in order
  // with all else. May be asynchronous.
  virtual void save_blocks(std::span<const SwapMove> moves) = 0;
  virtual void load_blocks(std::span<const SwapMove> moves) = 0;
  // MemoryUse::allocated and device_free.
  virtual size_t allocated_bytes() const { return 0; }
  virtual size_t device_free_bytes() const { return 0; }
  // K and V of all rows are written; `batch` stays valid until sample() has returned.
  virtual void forward(const StepBatch& batch, std::span<const EmbeddingOverride> overrides) = 0;
  virtual void synchronize() {}  // until the forward has run
  // Tokens of the step's sample_rows, [R], R may be 0. Waits for the step. If some rows cannot be
  // sampled, throws Error with their tokens left at -1 and the other rows drawn.
  virtual void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) = 0;
  // sample() in two halves, as Backend::launch_sample and collect_sample say. A model that waits for
  // every step leaves them as they are.
  virtual bool launch_sample(std::span<const SampleRow> rows) { return false; }
  virtual void collect_sample(std::span<SampleResult> results) {
    TM_CHECK(false, "collect_sample of %zu rows without a launch", results.size());
  }
  // Of rows [first, first + n) of the step's T. Each waits.
  virtual void logits(int first_row, std::span<float> out) = 0;  // [n, V]
  // [n, H] after the last norm.
  virtual void hidden_states(int first_row, std::span<float> out) = 0;
};

class ModelRunner {
 public:
  ModelRunner(Model& model, const MemoryPlan& memory);

  // Starts the plan's step. Throws if it fails as a whole. Two may run: the second is one that the
  // scheduler planned ahead, behind a first whose tokens are drawn without the host.
  void forward(const StepPlan& plan);
  // Has the tokens of the step just started drawn. Masks and parked sequences are looked at now.
  // True: the device draws by itself, so that the next step may be started before collect().
  bool draw(const StepPlan& plan);
  bool launch(const StepPlan& plan) {
    forward(plan);
    return draw(plan);
  }
  // What the sampling rows of the oldest started step, `plan`, drew; valid until the forward after
  // next. A failure of single rows is part of the results.
  StepResults collect(const StepPlan& plan);
  StepResults run(const StepPlan& plan) {
    launch(plan);
    return collect(plan);
  }
  int num_launched() const { return num_launched_; }
  // Waits for what is launched and forgets it, after a failure or before the end.
  void discard();
  // First row of T of the i-th row of the plan that was started last.
  int first_row(size_t plan_row) const { return newest().batch.query_start()[plan_row]; }
  // Like run, but answers the logits of the plan's last row: [V].
  void run_logits(const StepPlan& plan, std::span<float> out);

 private:
  // One launched step.
  struct Slot {
    Batch batch;
    std::vector<SampleResult> results;  // [R]
    bool drawn_on_device = false;
    Clock::time_point launched;
  };
  void encode(const ScheduledTiles& scheduled);
  Slot& oldest() { return slots_[(next_slot_ + 2 - num_launched_) % 2]; }
  Slot& newest() { return slots_[1 - next_slot_]; }
  const Slot& newest() const { return slots_[1 - next_slot_]; }

  Model& model_;
  Slot slots_[2];
  int next_slot_ = 0;
  int num_launched_ = 0;
  Clock::time_point last_collected_;
  std::vector<EmbeddingOverride> overrides_;
};

}  // namespace turbomind
