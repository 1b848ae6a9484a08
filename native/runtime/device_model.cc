#include "runtime/device_model.h"

#include <algorithm>
#include <numeric>

#include "models/weight_loader.h"
#include "runtime/measure.h"
#include "runtime/warm_up.h"

namespace turbomind {

void DeviceModel::load(const ModelSpec& spec, const MemoryPlan& steps, const ProgressFn& progress,
                       MemoryUse& use) {
  LoadProgress report;
  if (progress) {
    report = [&progress](size_t loaded, size_t total) {
      progress(total == 0 ? 1.0 : static_cast<double>(loaded) / static_cast<double>(total));
    };
  }
  WeightLoader loader(*backend_, store_, spec.quant, report);
  use.decoder = taken_by(
      [&] { decoder_ = std::make_unique<Decoder>(loader, spec.decoder, steps.max_tokens); });
  if (!spec.vision) return;
  use.vision = taken_by([&] {
    vision_ =
        std::make_unique<VisionTower>(loader, *spec.vision, spec.decoder.hidden_size,
                                      tiles_per_pass(*backend_, *spec.vision, steps.max_tiles));
  });
  use.image_embeddings = taken_by(
      [&] { image_store_ = backend_->allocate(image_store_bytes(*backend_, spec, steps)); });
  images_ = TensorView(
      image_store_->data(), backend_->activation_dtype(),
      {int64_t{steps.max_held_tiles} * vision_->tokens_per_tile(), spec.decoder.hidden_size});
}

// Calls `move` with the blocks of neighbouring slots, and where the first of them lies.
template <class Move>
void DeviceModel::for_each_run(std::span<const SwapMove> moves, Move&& move) {
  for (size_t begin = 0; begin < moves.size();) {
    moved_.clear();
    const int32_t first = moves[begin].slot;
    for (; begin < moves.size() && moves[begin].slot == first + static_cast<int32_t>(moved_.size());
         ++begin) {
      moved_.push_back(moves[begin].block);
    }
    move(std::span<const BlockId>(moved_),
         static_cast<char*>(swap_->data()) + static_cast<size_t>(first) * block_bytes_);
  }
}

void DeviceModel::save_blocks(std::span<const SwapMove> moves) {
  for_each_run(moves, [this](std::span<const BlockId> blocks, char* host) {
    backend_->save_blocks(*cache_, blocks, host);
  });
}

void DeviceModel::load_blocks(std::span<const SwapMove> moves) {
  for_each_run(moves, [this](std::span<const BlockId> blocks, const char* host) {
    backend_->load_blocks(*cache_, blocks, host);
  });
}

HostMemory DeviceModel::start_swap_space(const KvCacheSpec& spec, int num_blocks,
                                         bool device_is_host) {
  if (num_blocks == 0) return {};
  const size_t bytes = static_cast<size_t>(num_blocks) * backend_->kv_block_bytes(spec);
  return std::async(device_is_host ? std::launch::deferred : std::launch::async,
                    [backend = backend_.get(), bytes] { return backend->allocate_host(bytes); });
}

double DeviceModel::make_swap_space(int num_blocks, HostMemory taken) {
  if (num_blocks == 0) return 0;
  constexpr size_t kTimedBytes = size_t{32} << 20;
  const KvCacheSpec& spec = cache_->spec();
  block_bytes_ = backend_->kv_block_bytes(spec);
  try {
    swap_ = taken.get();
  } catch (const Error& error) {
    throw Error(
        ErrorCode::out_of_memory,
        format("swapSpaceBytes: %.1f MiB of host memory could not be taken (%s); lower it",
               static_cast<double>(num_blocks) * static_cast<double>(block_bytes_) / 1048576.0,
               error.what()));
  }
  const auto most = static_cast<int>(std::min<size_t>(
      static_cast<size_t>(spec.num_blocks), std::max<size_t>(1, kTimedBytes / block_bytes_)));
  moved_.reserve(static_cast<size_t>(spec.num_blocks));
  std::vector<BlockId> blocks(static_cast<size_t>(std::min(num_blocks, most)));
  std::iota(blocks.begin(), blocks.end(), 0);
  double ms = 0;
  for (int round = 0; round < 2; ++round) {  // the first one touches the pages
    const std::unique_ptr<OpTimer> timer = backend_->start_timer();
    backend_->save_blocks(*cache_, blocks, swap_->data());
    backend_->load_blocks(*cache_, blocks, swap_->data());
    timer->stop();
    ms = timer->ms();
  }
  return ms / static_cast<double>(2 * blocks.size());
}

void DeviceModel::warm_up(const MemoryPlan& plan) {
  const bool sees = vision_ != nullptr;
  const TensorView tile = sees ? images_.rows(0, vision_->tokens_per_tile()) : TensorView();
  turbomind::warm_up(*backend_, *decoder_, *cache_, plan, vision_.get(), tile);
}

std::unique_ptr<TileEmbeddings> DeviceModel::encode_images(ConstTensorView tiles, int first_slot) {
  TM_CHECK(vision_ != nullptr, "an image for a text model");
  const TensorView view = images_.rows(int64_t{first_slot} * vision_->tokens_per_tile(),
                                       tiles.dim(0) * vision_->tokens_per_tile());
  std::unique_ptr<OpTimer> timer = backend_->start_timer();
  vision_->encode(tiles, view);
  timer->stop();
  return std::make_unique<TileEmbeddings>(view, std::move(timer));
}

void DeviceModel::sample(std::span<const SampleRow> rows, std::span<SampleResult> results) {
  decoder_->sample(rows, results);
  // Without a row nobody waited, and the step's host arrays are about to change.
  if (rows.empty()) backend_->synchronize();
}

}  // namespace turbomind
