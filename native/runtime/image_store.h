// Embeddings of the images in flight, one set for each content: sequences that show the same picture
// share what the vision tower made of its tiles. Every tile that is scheduled or encoded has a slot of
// a store of fixed size, which the model took at load. Knows which tiles are where, not what they are;
// the model runner attaches the embeddings. Engine thread.
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

// Places for the embeddings of a tile each.
class TileSlots {
 public:
  explicit TileSlots(int num_slots) : taken_(static_cast<size_t>(num_slots), false) {}
  int num_slots() const { return static_cast<int>(taken_.size()); }
  int num_free() const { return num_slots() - num_taken_; }
  // The slot behind `neighbour` if it is free, else the first of the longest free run; one must be.
  int take(int neighbour);
  void give(int slot);

 private:
  std::vector<bool> taken_;
  int num_taken_ = 0;
};

// A run of one image's tiles and their embeddings, in neighbouring slots.
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
  EncodedImage(int num_tiles, std::shared_ptr<TileSlots> slots);
  ~EncodedImage();
  EncodedImage(const EncodedImage&) = delete;
  EncodedImage& operator=(const EncodedImage&) = delete;

  TileState state(int tile) const { return states_[static_cast<size_t>(tile)]; }
  // Takes a slot for an absent tile, if it can the one behind `neighbour` (-1: any); answers it.
  int schedule(int tile, int neighbour);
  // A step that will not run: scheduled tiles are absent again.
  void unschedule();
  void add(EncodedTiles run);  // scheduled tiles
  // Drops the runs without a tile that `is_needed`.
  template <class Predicate>
  void drop_unless(Predicate is_needed);
  const std::vector<EncodedTiles>& runs() const { return runs_; }

 private:
  void drop(int tile);

  std::shared_ptr<TileSlots> slots_;
  std::vector<TileState> states_;  // [tiles]
  std::vector<int> slot_of_;       // [tiles], -1 where absent
  std::vector<EncodedTiles> runs_;
};

template <class Predicate>
void EncodedImage::drop_unless(Predicate is_needed) {
  std::erase_if(runs_, [&](const EncodedTiles& run) {
    const int end = run.first_tile + run.num_tiles;
    for (int tile = run.first_tile; tile < end; ++tile) {
      if (is_needed(tile)) return false;
    }
    for (int tile = run.first_tile; tile < end; ++tile) drop(tile);
    return true;
  });
}

class ImageStore {
 public:
  using Key = std::array<uint64_t, 2>;
  explicit ImageStore(int num_slots) : slots_(std::make_shared<TileSlots>(num_slots)) {}

  // An image without a content hash is nobody else's.
  std::shared_ptr<EncodedImage> open(const image::ImageTiles& tiles);
  // Tiles of all images, scheduled ones included.
  int num_held() const { return slots_->num_slots() - slots_->num_free(); }
  int num_free() const { return slots_->num_free(); }
  // Those in use.
  std::vector<std::shared_ptr<EncodedImage>> images() const;

 private:
  std::shared_ptr<TileSlots> slots_;
  std::map<Key, std::weak_ptr<EncodedImage>> shared_;
  std::vector<std::weak_ptr<EncodedImage>> unnamed_;
};

}  // namespace turbomind
