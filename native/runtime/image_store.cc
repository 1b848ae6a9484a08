#include "runtime/image_store.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

int TileSlots::take(int neighbour) {
  TM_CHECK(num_taken_ < num_slots(), "all %d tile slots are taken", num_slots());
  const auto is_free = [this](int slot) { return !taken_[static_cast<size_t>(slot)]; };
  int chosen = neighbour + 1;
  if (neighbour < 0 || chosen >= num_slots() || !is_free(chosen)) {
    int longest = 0;
    for (int begin = 0; begin < num_slots();) {
      int end = begin;
      while (end < num_slots() && is_free(end)) ++end;
      if (end - begin > longest) {
        longest = end - begin;
        chosen = begin;
      }
      begin = end + 1;
    }
  }
  taken_[static_cast<size_t>(chosen)] = true;
  ++num_taken_;
  return chosen;
}

void TileSlots::give(int slot) {
  TM_CHECK(slot >= 0 && slot < num_slots() && taken_[static_cast<size_t>(slot)],
           "tile slot %d of %d is free", slot, num_slots());
  taken_[static_cast<size_t>(slot)] = false;
  --num_taken_;
}

EncodedImage::EncodedImage(int num_tiles, std::shared_ptr<TileSlots> slots)
    : slots_(std::move(slots)),
      states_(static_cast<size_t>(num_tiles), TileState::absent),
      slot_of_(static_cast<size_t>(num_tiles), -1) {}

EncodedImage::~EncodedImage() {
  for (int slot : slot_of_) {
    if (slot >= 0) slots_->give(slot);
  }
}

int EncodedImage::schedule(int tile, int neighbour) {
  TM_CHECK(state(tile) == TileState::absent, "tile %d is there already", tile);
  const int slot = slots_->take(neighbour);
  slot_of_[static_cast<size_t>(tile)] = slot;
  states_[static_cast<size_t>(tile)] = TileState::scheduled;
  return slot;
}

void EncodedImage::drop(int tile) {
  slots_->give(slot_of_[static_cast<size_t>(tile)]);
  slot_of_[static_cast<size_t>(tile)] = -1;
  states_[static_cast<size_t>(tile)] = TileState::absent;
}

void EncodedImage::unschedule() {
  for (size_t tile = 0; tile < states_.size(); ++tile) {
    if (states_[tile] == TileState::scheduled) drop(static_cast<int>(tile));
  }
}

void EncodedImage::add(EncodedTiles run) {
  const int first = run.first_tile;
  const int end = first + run.num_tiles;
  for (int tile = first; tile < end; ++tile) {
    TM_CHECK(state(tile) == TileState::scheduled, "tile %d was not scheduled", tile);
  }
  runs_.push_back(std::move(run));  // may fail, and then nothing has changed
  std::fill(states_.begin() + first, states_.begin() + end, TileState::encoded);
  std::sort(runs_.begin(), runs_.end(), [](const EncodedTiles& a, const EncodedTiles& b) {
    return a.first_tile < b.first_tile;
  });
}

std::shared_ptr<EncodedImage> ImageStore::open(const image::ImageTiles& tiles) {
  const Key key = {tiles.content_hash[0], tiles.content_hash[1]};
  if (key == Key{}) {
    std::erase_if(unnamed_, [](const auto& image) { return image.expired(); });
    auto image = std::make_shared<EncodedImage>(tiles.num_tiles, slots_);
    unnamed_.push_back(image);
    return image;
  }
  std::erase_if(shared_, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<EncodedImage>& entry = shared_[key];
  std::shared_ptr<EncodedImage> image = entry.lock();
  if (image == nullptr) {
    image = std::make_shared<EncodedImage>(tiles.num_tiles, slots_);
    entry = image;
  }
  return image;
}

std::vector<std::shared_ptr<EncodedImage>> ImageStore::images() const {
  std::vector<std::shared_ptr<EncodedImage>> images;
  const auto add = [&images](const std::weak_ptr<EncodedImage>& entry) {
    if (std::shared_ptr<EncodedImage> image = entry.lock()) images.push_back(std::move(image));
  };
  for (const auto& [key, entry] : shared_) add(entry);
  for (const auto& entry : unnamed_) add(entry);
  return images;
}

}  // namespace turbomind
