// InternVL's dynamic patches: an RGB image becomes a grid of square tiles plus a thumbnail.
// The resize is Pillow's bicubic, bit for bit. Pure functions; `TilePool` (image/tile_pool.h)
// runs them on preprocessing threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace turbomind::image {

// 8-bit pixels, row-major, no padding. channels: 1 (grey), 3 (RGB) or 4 (RGBA, alpha dropped).
struct ImageView {
  const uint8_t* pixels = nullptr;  // [height, width, channels]
  int width = 0;
  int height = 0;
  int channels = 3;
};

struct TileGrid {
  int columns = 1;
  int rows = 1;
};

struct TileOptions {
  int tile_size = 448;        // S, pixels
  int min_tiles = 1;          // LMDeploy: min_dynamic_patch
  int max_tiles = 12;         // LMDeploy: max_dynamic_patch; the thumbnail is not counted
  bool use_thumbnail = true;  // one more tile, last, when the grid has more than one
};

struct ImageTiles {
  TileGrid grid;
  int tile_size = 0;
  int num_tiles = 0;                  // thumbnail counted
  std::vector<uint8_t> pixels;        // [num_tiles, S, S, 3]
  uint64_t content_hash[2] = {0, 0};  // of grid, size and pixels: the image's identity
};

// Bounds of what is accepted. They keep every size below in 32 bits and one image's memory sane;
// lib/ applies tighter ones of its own before it decodes.
constexpr int kMaxSide = 65535;            // pixels
constexpr int64_t kMaxPixels = 1LL << 28;  // of the input
constexpr int kMaxTileSize = 4096;         // pixels
constexpr int kMaxTiles = 1024;
constexpr int64_t kMaxTileBytes = 1LL << 30;  // of all tiles together

// Throw Error{invalid_image} and Error{invalid_argument}.
void check_size(int width, int height);
void check_image(const ImageView& image);
void check_options(const TileOptions& options);

// Candidate grids in the order in which `choose_grid` looks at them.
std::vector<TileGrid> candidate_grids(int min_tiles, int max_tiles);

// The grid whose aspect ratio is nearest (InternVL `dynamic_preprocess`; ties as there).
TileGrid choose_grid(int width, int height, const TileOptions& options);

// Pillow's Image.resize(size, BICUBIC) for 8-bit RGB. out: [out_height, out_width, 3].
void resize_bicubic(const ImageView& in, int out_width, int out_height, std::span<uint8_t> out);

// Throws Error{invalid_image | invalid_argument}. Tiles row by row, thumbnail last.
ImageTiles make_tiles(const ImageView& image, const TileOptions& options);

}  // namespace turbomind::image
