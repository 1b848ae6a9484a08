// Embeddings of the images in flight, one set for each content: sequences that show the same picture
// share what the vision tower made of its tiles. Knows which tiles are there, not what they are; the
// model runner attaches the embeddings. Engine thread.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <vector>

#include "image/preprocess.h"

namespace turbomind {

// What the vision tower made of some tiles, opaque here: the model runner knows the rest.
class ImageEmbeddings {
 public:
  virtual ~ImageEmbeddings() = default;
  // Time that the device spent on them; waits until it has finished them.
  virtual double encode_ms() const { return 0; }
};

// A run of one image's tiles and their embeddings.
struct EncodedTiles {
  int first_tile = 0;
  int num_tiles = 0;
  std::unique_ptr<ImageEmbeddings> embeddings;
  bool holds(int tile) const { return tile >= first_tile && tile < first_tile + num_tiles; }
};

enum class TileState : uint8_t { absent, scheduled, encoded };

// One picture's tiles, shared by the sequences that show it.
class EncodedImage {
 public:
  explicit EncodedImage(int num_tiles) : states_(static_cast<size_t>(num_tiles)) {}

  TileState state(int tile) const { return states_[static_cast<size_t>(tile)]; }
  int num_held() const;  // scheduled and encoded tiles
  void schedule(int first_tile, int num_tiles);
  // A step that will not run: scheduled tiles are absent again.
  void unschedule();
  void add(EncodedTiles run);  // scheduled tiles
  // Drops the runs without a tile that `is_needed`.
  template <class Predicate>
  void drop_unless(Predicate is_needed);
  const std::vector<EncodedTiles>& runs() const { return runs_; }

 private:
  std::vector<TileState> states_;  // [tiles]
  std::vector<EncodedTiles> runs_;
};

template <class Predicate>
void EncodedImage::drop_unless(Predicate is_needed) {
  std::erase_if(runs_, [&](const EncodedTiles& run) {
    const int end = run.first_tile + run.num_tiles;
    for (int tile = run.first_tile; tile < end; ++tile) {
      if (is_needed(tile)) return false;
    }
    for (int tile = run.first_tile; tile < end; ++tile) {
      states_[static_cast<size_t>(tile)] = TileState::absent;
    }
    return true;
  });
}

class ImageStore {
 public:
  using Key = std::array<uint64_t, 2>;
  // An image without a content hash is nobody else's.
  std::shared_ptr<EncodedImage> open(const image::ImageTiles& tiles);
  int num_held() const;  // tiles of all images, scheduled ones included
  std::vector<std::shared_ptr<EncodedImage>> images() const;

 private:
  std::map<Key, std::weak_ptr<EncodedImage>> images_;
};

}  // namespace turbomind
