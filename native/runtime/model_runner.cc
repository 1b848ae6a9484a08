#include "runtime/model_runner.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

ModelRunner::ModelRunner(Model& model, const MemoryPlan& memory) : model_(model) {
  for (Slot& slot : slots_) {
    slot.batch.reserve(memory.max_tokens, memory.max_sequences, memory.max_rows,
                       memory.blocks_per_session);
    slot.results.reserve(static_cast<size_t>(memory.max_rows));
  }
}

void ModelRunner::forward(const StepPlan& plan) {
  TM_CHECK(num_launched_ < 2, "a third step started");
  Slot& slot = slots_[next_slot_];
  slot.launched = Clock::now();
  slot.drawn_on_device = false;
  if (!plan.saves.empty()) model_.save_blocks(plan.saves);
  if (!plan.loads.empty()) model_.load_blocks(plan.loads);
  if (!plan.copies.empty()) model_.copy_blocks(plan.copies);
  for (const ScheduledTiles& tiles : plan.tiles) encode(tiles);
  slot.batch.build(plan);
  overrides_.clear();
  for (const ImageRows& rows : slot.batch.image_rows()) {
    const auto& embeddings = static_cast<const TileEmbeddings&>(*rows.tiles->embeddings);
    overrides_.push_back({rows.row, embeddings.view().rows(rows.first, rows.count)});
  }
  model_.forward(slot.batch.view(), overrides_);
  next_slot_ = 1 - next_slot_;
  ++num_launched_;
}

bool ModelRunner::draw(const StepPlan& plan) {
  TM_CHECK(num_launched_ > 0, "no step is started");
  Slot& slot = newest();
  slot.batch.take_masks(plan);
  slot.results.resize(static_cast<size_t>(plan.num_samples));
  for (SampleResult& result : slot.results) {
    result.token = -1;
    result.logprob = 0.0F;
    result.top_logprobs.clear();
  }
  slot.drawn_on_device = plan.num_samples > 0 && model_.launch_sample(slot.batch.sample_rows());
  return slot.drawn_on_device;
}

StepResults ModelRunner::collect(const StepPlan& plan) {
  TM_CHECK(num_launched_ > 0, "no step is launched");
  Slot& slot = oldest();
  std::optional<Error> failure;
  try {
    if (slot.drawn_on_device) {
      model_.collect_sample(slot.results);
    } else {
      slot.batch.drop_ended(plan);  // the step before may have been its last
      model_.sample(slot.batch.sample_rows(), slot.results);
    }
  } catch (const Error& error) {
    // Not-a-number logits or a ban of all tokens are one sequence's misfortune. A device that is
    // really lost fails the next forward too.
    if (slot.results.empty()) throw;
    failure = error;
  }
  --num_launched_;
  const Clock::time_point begin = std::max(slot.launched, last_collected_);
  last_collected_ = Clock::now();
  return {slot.results, failure, ms_between(begin, last_collected_)};
}

void ModelRunner::discard() {
  while (num_launched_ > 0) {
    Slot& slot = oldest();
    --num_launched_;
    if (!slot.drawn_on_device) continue;
    try {
      model_.collect_sample(slot.results);
    } catch (const Error&) {
      // Whoever discards has been told of a worse one.
    }
  }
}

void ModelRunner::run_logits(const StepPlan& plan, std::span<float> out) {
  TM_CHECK(num_launched_ == 0, "%d steps are launched", num_launched_);
  forward(plan);
  model_.logits(plan.num_tokens - 1, out);
  num_launched_ = 0;
}

void ModelRunner::encode(const ScheduledTiles& scheduled) {
  const SequenceImage& image =
      scheduled.sequence->images()[static_cast<size_t>(scheduled.image_idx)];
  const int64_t side = image.tiles->tile_size;
  const ConstTensorView tiles(image.tiles->pixels.data(), DType::u8,
                              {image.num_tiles(), side, side, 3});
  std::unique_ptr<TileEmbeddings> embeddings = model_.encode_images(
      tiles.rows(scheduled.first_tile, scheduled.num_tiles), scheduled.first_slot);
  const int64_t rows = embeddings->view().dim(0);
  TM_CHECK(rows == int64_t{scheduled.num_tiles} * image.tokens_per_tile,
           "%lld embeddings for %d tiles of %d tokens", static_cast<long long>(rows),
           scheduled.num_tiles, image.tokens_per_tile);
  scheduled.image->add({scheduled.first_tile, scheduled.num_tiles, std::move(embeddings)});
}

}  // namespace turbomind
