// Threads that turn images into tiles: one image over several threads by bands of rows, several
// images one after another as threads come free. Owns its threads and its queue; shares nothing
// with the engine. `submit` may be called from any thread; callbacks run on the pool's threads.
#pragma once

#include <exception>
#include <functional>
#include <future>
#include <memory>

#include "image/preprocess.h"

namespace turbomind::image {

class TilePool {
 public:
  // Exactly one of the two is set. Must not throw and should not block.
  using Done = std::function<void(std::shared_ptr<const ImageTiles>, std::exception_ptr)>;

  explicit TilePool(int threads);  // >= 1
  // Runs what threads have begun to its next item, then joins; images that are not finished are
  // answered with Error{disposed}.
  ~TilePool();
  TilePool(const TilePool&) = delete;
  TilePool& operator=(const TilePool&) = delete;

  int size() const;

  // The pixels must stay as they are until `done` is called; nothing reads them afterwards.
  // Bad images and options are answered through `done` too.
  void submit(const ImageView& image, const TileOptions& options, Done done);
  std::future<std::shared_ptr<const ImageTiles>> submit(const ImageView& image,
                                                        const TileOptions& options);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace turbomind::image
