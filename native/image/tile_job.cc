#include "image/tile_job.h"

#include <algorithm>
#include <new>

#include "base/error.h"
#include "image/pixel_buffer.h"

namespace turbomind::image {
namespace {

// A band repeats the horizontal pass for the rows it shares with the band before, about four at
// the output's scale; at 64 output rows that is a few per cent.
constexpr int kMinBandRows = 64;
constexpr int kBandsPerThread = 4;

std::vector<uint8_t> allocate_tiles(size_t bytes) {
  try {
    std::vector<uint8_t> pixels;
    pixels.reserve(bytes);
    prefer_huge_pages(pixels.data(), bytes);
    pixels.resize(bytes);
    return pixels;
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory,
                format("image: no memory for %zu bytes of tiles; lower maxTiles", bytes));
  }
}

}  // namespace

TileJob::TileJob(const ImageView& image, const TileOptions& options, int parallelism,
                 const ResizeKernels& kernels) {
  check_image(image);
  const TileGrid grid = choose_grid(image.width, image.height, options);
  const int side = options.tile_size;
  const int grid_tiles = grid.columns * grid.rows;
  const bool adds_thumbnail = options.use_thumbnail && grid_tiles > 1;
  const size_t tile_bytes = static_cast<size_t>(side) * side * 3;

  tiles_ = std::make_shared<ImageTiles>();
  tiles_->grid = grid;
  tiles_->tile_size = side;
  tiles_->num_tiles = grid_tiles + (adds_thumbnail ? 1 : 0);
  tiles_->pixels = allocate_tiles(tile_bytes * tiles_->num_tiles);
  hashes_.resize(tiles_->num_tiles);

  const int most_bands = parallelism == 1 ? 1 : parallelism * kBandsPerThread;
  grid_.emplace(image, side * grid.columns, side * grid.rows, kernels);
  add_bands(*grid_, {tiles_->pixels.data(), side, side, grid.columns}, most_bands);
  if (adds_thumbnail) {
    thumbnail_.emplace(image, side, side, kernels);
    add_bands(*thumbnail_, {tiles_->pixels.data() + tile_bytes * grid_tiles, side, side, 1},
              most_bands);
  }
  std::stable_sort(bands_.begin(), bands_.end(), [](const Band& a, const Band& b) {
    return a.resizer->first_input_row(a.begin) < b.resizer->first_input_row(b.begin);
  });
}

void TileJob::add_bands(const Resizer& resizer, const SegmentedOutput& out, int count) {
  const int height = resizer.out_height();
  count = std::clamp(height / kMinBandRows, 1, count);
  for (int i = 0; i < count; ++i) {
    const auto edge = [&](int n) {
      return static_cast<int>(static_cast<int64_t>(height) * n / count);
    };
    bands_.push_back({&resizer, out, edge(i), edge(i + 1)});
  }
}

void TileJob::run_band(int band_idx) const {
  const Band& band = bands_[band_idx];
  band.resizer->run(band.begin, band.end, band.out);
}

void TileJob::run_hash(int tile_idx) {
  const size_t bytes = tiles_->pixels.size() / tiles_->num_tiles;
  hashes_[tile_idx] = content_hash(tiles_->pixels.data() + tile_idx * bytes, bytes);
}

std::shared_ptr<const ImageTiles> TileJob::take() {
  std::vector<uint64_t> words = {
      static_cast<uint64_t>(tiles_->grid.columns), static_cast<uint64_t>(tiles_->grid.rows),
      static_cast<uint64_t>(tiles_->tile_size), static_cast<uint64_t>(tiles_->num_tiles)};
  for (const ContentHash& hash : hashes_) words.insert(words.end(), hash.words, hash.words + 2);
  const ContentHash hash = content_hash(words.data(), words.size() * sizeof(uint64_t));
  tiles_->content_hash[0] = hash.words[0];
  tiles_->content_hash[1] = hash.words[1];
  return std::move(tiles_);
}

}  // namespace turbomind::image
