#include "image/preprocess.h"

#include "base/error.h"
#include "image/resizer.h"
#include "image/tile_job.h"

namespace turbomind::image {

void check_size(int width, int height) {
  if (width < 1 || height < 1 || width > kMaxSide || height > kMaxSide) {
    throw Error(ErrorCode::invalid_image, format("image: %d x %d pixels; each side must be 1 to %d",
                                                 width, height, kMaxSide));
  }
  if (static_cast<int64_t>(width) * height > kMaxPixels) {
    throw Error(ErrorCode::invalid_image,
                format("image: %d x %d pixels exceed %lld; shrink the image first", width, height,
                       static_cast<long long>(kMaxPixels)));
  }
}

void check_image(const ImageView& image) {
  check_size(image.width, image.height);
  if (image.channels != 1 && image.channels != 3 && image.channels != 4) {
    throw Error(
        ErrorCode::invalid_image,
        format("image: %d channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)", image.channels));
  }
  if (image.pixels == nullptr) throw Error(ErrorCode::invalid_image, "image: no pixels");
}

void check_options(const TileOptions& options) {
  if (options.tile_size < 1 || options.tile_size > kMaxTileSize) {
    throw Error(ErrorCode::invalid_argument,
                format("tileSize %d; expected 1 to %d pixels", options.tile_size, kMaxTileSize));
  }
  if (options.max_tiles < 1 || options.max_tiles > kMaxTiles) {
    throw Error(ErrorCode::invalid_argument,
                format("maxTiles %d; expected 1 to %d", options.max_tiles, kMaxTiles));
  }
  if (options.min_tiles < 1 || options.min_tiles > options.max_tiles) {
    throw Error(ErrorCode::invalid_argument,
                format("minTiles %d; expected 1 to maxTiles, which is %d", options.min_tiles,
                       options.max_tiles));
  }
  const int64_t bytes = (options.max_tiles + 1LL) * options.tile_size * options.tile_size * 3;
  if (bytes > kMaxTileBytes) {
    throw Error(ErrorCode::invalid_argument,
                format("maxTiles %d of tileSize %d take up to %lld bytes an image; at most %lld",
                       options.max_tiles, options.tile_size, static_cast<long long>(bytes),
                       static_cast<long long>(kMaxTileBytes)));
  }
}

void resize_bicubic(const ImageView& in, int out_width, int out_height, std::span<uint8_t> out) {
  check_image(in);
  check_size(out_width, out_height);
  const size_t bytes = static_cast<size_t>(out_width) * out_height * 3;
  if (out.size() != bytes) {
    throw Error(ErrorCode::invalid_argument,
                format("resize: output of %zu bytes; %d x %d RGB needs %zu", out.size(), out_width,
                       out_height, bytes));
  }
  const Resizer resizer(in, out_width, out_height, best_resize_kernels());
  resizer.run(0, out_height, {out.data(), out_width, out_height, 1});
}

ImageTiles make_tiles(const ImageView& image, const TileOptions& options) {
  TileJob job(image, options, 1, best_resize_kernels());
  for (int i = 0; i < job.num_bands(); ++i) job.run_band(i);
  for (int i = 0; i < job.num_hashes(); ++i) job.run_hash(i);
  return *job.take();
}

}  // namespace turbomind::image
