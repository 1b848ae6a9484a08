#include "runtime/image_store.h"

#include <algorithm>

#include "base/error.h"

namespace turbomind {

int EncodedImage::num_held() const {
  return static_cast<int>(states_.size() -
                          std::count(states_.begin(), states_.end(), TileState::absent));
}

void EncodedImage::schedule(int first_tile, int num_tiles) {
  for (int tile = first_tile; tile < first_tile + num_tiles; ++tile) {
    TM_CHECK(state(tile) == TileState::absent, "tile %d is there already", tile);
    states_[static_cast<size_t>(tile)] = TileState::scheduled;
  }
}

void EncodedImage::unschedule() {
  std::replace(states_.begin(), states_.end(), TileState::scheduled, TileState::absent);
}

void EncodedImage::add(EncodedTiles run) {
  for (int tile = run.first_tile; tile < run.first_tile + run.num_tiles; ++tile) {
    TM_CHECK(state(tile) == TileState::scheduled, "tile %d was not scheduled", tile);
    states_[static_cast<size_t>(tile)] = TileState::encoded;
  }
  runs_.push_back(std::move(run));
  std::sort(runs_.begin(), runs_.end(), [](const EncodedTiles& a, const EncodedTiles& b) {
    return a.first_tile < b.first_tile;
  });
}

std::shared_ptr<EncodedImage> ImageStore::open(const image::ImageTiles& tiles) {
  const Key key = {tiles.content_hash[0], tiles.content_hash[1]};
  if (key == Key{}) return std::make_shared<EncodedImage>(tiles.num_tiles);
  std::erase_if(images_, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<EncodedImage>& entry = images_[key];
  std::shared_ptr<EncodedImage> image = entry.lock();
  if (image == nullptr) {
    image = std::make_shared<EncodedImage>(tiles.num_tiles);
    entry = image;
  }
  return image;
}

std::vector<std::shared_ptr<EncodedImage>> ImageStore::images() const {
  std::vector<std::shared_ptr<EncodedImage>> images;
  for (const auto& [key, entry] : images_) {
    if (std::shared_ptr<EncodedImage> image = entry.lock()) images.push_back(std::move(image));
  }
  return images;
}

int ImageStore::num_held() const {
  int held = 0;
  for (const std::shared_ptr<EncodedImage>& image : images()) held += image->num_held();
  return held;
}

}  // namespace turbomind
