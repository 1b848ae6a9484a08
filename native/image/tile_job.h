// One image on its way to tiles, cut into items that any number of threads may run: first bands of
// the resizes, then the hashes of the tiles. `make_tiles` runs them in a loop, `TilePool` on
// threads; both give the same bits, because an item's result does not depend on who runs it.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "image/content_hash.h"
#include "image/preprocess.h"
#include "image/resizer.h"

namespace turbomind::image {

class TileJob {
 public:
  // Checks everything and allocates the tiles; throws Error. `image` must outlive the job.
  // `parallelism`: threads that may take part; decides the number of bands, never the result.
  TileJob(const ImageView& image, const TileOptions& options, int parallelism,
          const ResizeKernels& kernels);
  TileJob(const TileJob&) = delete;  // bands point at the resizers
  TileJob& operator=(const TileJob&) = delete;

  // All bands must be done before the first hash runs, all hashes before `take`.
  int num_bands() const { return static_cast<int>(bands_.size()); }
  void run_band(int band_idx) const;
  int num_hashes() const { return tiles_->num_tiles; }
  void run_hash(int tile_idx);
  std::shared_ptr<const ImageTiles> take();

 private:
  struct Band {
    const Resizer* resizer;
    SegmentedOutput out;
    int begin, end;  // output rows
  };
  void add_bands(const Resizer& resizer, const SegmentedOutput& out, int count);

  std::optional<Resizer> grid_;
  std::optional<Resizer> thumbnail_;
  std::vector<Band> bands_;  // by their place in the input, so that its rows are read together
  std::shared_ptr<ImageTiles> tiles_;
  std::vector<ContentHash> hashes_;  // [num_tiles]
};

}  // namespace turbomind::image
