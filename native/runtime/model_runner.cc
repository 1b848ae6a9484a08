#include "runtime/model_runner.h"

#include "base/error.h"

namespace turbomind {

ModelRunner::ModelRunner(Model& model, const MemoryPlan& memory) : model_(model) {
  batch_.reserve(memory.max_tokens, memory.max_sequences, memory.max_rows,
                 memory.blocks_per_session);
  results_.reserve(static_cast<size_t>(memory.max_rows));
}

StepResults ModelRunner::sample(const StepPlan& plan) {
  batch_.take_masks(plan);
  results_.resize(static_cast<size_t>(plan.num_samples));
  for (SampleResult& result : results_) {
    result.token = -1;
    result.logprob = 0.0F;
    result.top_logprobs.clear();
  }
  std::optional<Error> failure;
  try {
    model_.sample(batch_.sample_rows(), results_);
  } catch (const Error& error) {
    // Not-a-number logits or a ban of all tokens are one sequence's misfortune. A device that is
    // really lost fails the next forward too.
    if (results_.empty()) throw;
    failure = error;
  }
  return {results_, failure, ms_between(begin_, Clock::now())};
}

void ModelRunner::run_logits(const StepPlan& plan, std::span<float> out) {
  forward(plan);
  model_.logits(plan.num_tokens - 1, out);
}

void ModelRunner::forward(const StepPlan& plan) {
  begin_ = Clock::now();
  for (const ScheduledTiles& tiles : plan.tiles) encode(tiles);
  batch_.build(plan);
  overrides_.clear();
  for (const ImageRows& rows : batch_.image_rows()) {
    const auto& embeddings = static_cast<const TileEmbeddings&>(*rows.tiles->embeddings);
    overrides_.push_back({rows.row, embeddings.view().rows(rows.first, rows.count)});
  }
  model_.forward(batch_.view(), overrides_);
}

void ModelRunner::encode(const ScheduledTiles& scheduled) {
  SequenceImage& image = scheduled.sequence->images()[static_cast<size_t>(scheduled.image_idx)];
  TM_CHECK(image.num_encoded() == scheduled.first_tile, "tiles from %d on after %d",
           scheduled.first_tile, image.num_encoded());
  const Clock::time_point begin = Clock::now();
  const int64_t side = image.tiles->tile_size;
  const ConstTensorView tiles(image.tiles->pixels.data(), DType::u8,
                              {image.num_tiles(), side, side, 3});
  std::unique_ptr<TileEmbeddings> embeddings =
      model_.encode_images(tiles.rows(scheduled.first_tile, scheduled.num_tiles));
  const int64_t rows = embeddings->view().dim(0);
  TM_CHECK(rows == int64_t{scheduled.num_tiles} * image.tokens_per_tile,
           "%lld embeddings for %d tiles of %d tokens", static_cast<long long>(rows),
           scheduled.num_tiles, image.tokens_per_tile);
  image.encoded.push_back({scheduled.first_tile, scheduled.num_tiles, std::move(embeddings)});
  scheduled.sequence->add_vision_ms(ms_between(begin, Clock::now()));
}

}  // namespace turbomind
