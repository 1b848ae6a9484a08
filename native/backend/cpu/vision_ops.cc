#include "backend/cpu/vision_ops.h"

#include <array>
#include <cstring>
#include <string>

namespace turbomind::cpu {
namespace {

constexpr int kChannels = 3;

void expect_values(const char* what, ConstTensorView view, int64_t values) {
  TM_CHECK(view.dtype == DType::f32 && view.elements() == values, "%s is %s [%lld]; expected f32 [%lld]",
           what, std::string(to_string(view.dtype)).c_str(),
           static_cast<long long>(view.elements()), static_cast<long long>(values));
}

}  // namespace

void patchify(const PatchifyArgs& args, ThreadPool& pool) {
  const int64_t tiles = args.tiles.dim(0);
  const int64_t side = args.tiles.dim(1);
  const int64_t patch = args.patch_size;
  TM_CHECK(args.tiles.dtype == DType::u8 && args.tiles.rank == 4 && args.tiles.dim(2) == side &&
               args.tiles.dim(3) == kChannels && patch > 0 && side % patch == 0,
           "patchify needs u8 [n, S, S, 3] with S a multiple of the patch size %d", args.patch_size);
  const int64_t grid = side / patch;
  const int64_t plane = patch * patch;
  expect_values("patches", args.patches, tiles * grid * grid * kChannels * plane);
  // All 256 values of each channel, rounded step by step as numpy does in float32.
  std::array<std::array<float, 256>, kChannels> value;
  for (int c = 0; c < kChannels; ++c) {
    for (int v = 0; v < 256; ++v) {
      value[c][v] = (static_cast<float>(v) / 255.0F - args.mean[c]) / args.std[c];
    }
  }
  const auto* pixels = args.tiles.as<uint8_t>();
  float* patches = args.patches.as<float>();
  pool.parallel_for(tiles * grid, 2, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {  // one row of patches
      const uint8_t* from = pixels + strip * patch * side * kChannels;
      float* to = patches + strip * grid * kChannels * plane;
      for (int64_t y = 0; y < patch; ++y) {
        for (int64_t column = 0; column < grid; ++column) {
          float* row = to + column * kChannels * plane + y * patch;
          for (int64_t x = 0; x < patch; ++x, from += kChannels) {
            row[x] = value[0][from[0]];
            row[plane + x] = value[1][from[1]];
            row[2 * plane + x] = value[2][from[2]];
          }
        }
      }
    }
  });
}

void vision_embed(const VisionEmbedArgs& args, ThreadPool& pool) {
  const int64_t width = args.cls.elements();
  const int64_t tokens = args.positions.dim(0);
  const int64_t tiles = args.num_tiles;
  TM_CHECK(width > 0 && tokens > 1, "vision_embed with width %lld and %lld positions",
           static_cast<long long>(width), static_cast<long long>(tokens));
  expect_values("class token", args.cls, width);
  expect_values("positions", args.positions, tokens * width);
  expect_values("patches", args.patches, tiles * (tokens - 1) * width);
  expect_values("vision rows", args.x, tiles * tokens * width);
  const float* cls = args.cls.as<float>();
  const float* positions = args.positions.as<float>();
  const float* patches = args.patches.as<float>();
  float* x = args.x.as<float>();
  pool.parallel_for(tiles * tokens, 32, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t tile = row / tokens;
      const int64_t token = row % tokens;
      const float* from = token == 0 ? cls : patches + (row - tile - 1) * width;
      const float* position = positions + token * width;
      float* to = x + row * width;
      for (int64_t i = 0; i < width; ++i) to[i] = from[i] + position[i];
    }
  });
}

void pixel_shuffle(const PixelShuffleArgs& args, ThreadPool& pool) {
  const int64_t factor = args.factor;
  TM_CHECK(factor > 0 && args.grid > 0 && args.grid % args.factor == 0,
           "pixel shuffle by %d over a grid of %d", args.factor, args.grid);
  const int64_t grid = args.grid;
  const int64_t out_grid = grid / factor;
  const int64_t rows = args.num_tiles * (grid * grid + 1);
  const int64_t width = rows == 0 ? 0 : args.x.elements() / rows;
  const int64_t out_rows = args.num_tiles * out_grid * out_grid;
  expect_values("pixel shuffle input", args.x, rows * width);
  expect_values("pixel shuffle output", args.y, out_rows * factor * factor * width);
  const float* x = args.x.as<float>();
  float* y = args.y.as<float>();
  pool.parallel_for(out_rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t tile = row / (out_grid * out_grid);
      const int64_t r = row / out_grid % out_grid;
      const int64_t c = row % out_grid;
      // Neighbours of one grid row lie side by side: one copy each.
      for (int64_t dy = 0; dy < factor; ++dy) {
        const int64_t from = tile * (grid * grid + 1) + 1 + (r * factor + dy) * grid + c * factor;
        std::memcpy(y + (row * factor + dy) * factor * width, x + from * width,
                    static_cast<size_t>(factor * width) * sizeof(float));
      }
    }
  });
}

}  // namespace turbomind::cpu
