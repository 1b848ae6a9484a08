// Grids against the golden table and against what CPython did; every SIMD row of the resize against
// the scalar reference over random and edge sizes; tiles, thumbnail, hash; bad input; the pool.
#include "image/preprocess.h"

#include <atomic>
#include <bit>
#include <cstring>
#include <fstream>
#include <random>
#include <set>
#include <string>

#include "image/content_hash.h"
#include "image/resizer.h"
#include "image/tile_job.h"
#include "image/tile_pool.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::image;

namespace {

constexpr uint32_t kSeed = 20260711;

std::vector<uint8_t> random_pixels(std::mt19937& rng, size_t count) {
  std::vector<uint8_t> pixels(count);
  // Half of the images are black and white: they drive the sums to both ends of their range.
  const bool extreme = rng() % 2 == 0;
  for (uint8_t& pixel : pixels) {
    const uint32_t value = rng();
    pixel = static_cast<uint8_t>(extreme ? (value & 1U) * 255U : value >> 24);
  }
  return pixels;
}

std::vector<uint8_t> resize_with(const ResizeKernels& kernels, const ImageView& in, int width,
                                 int height, int bands) {
  std::vector<uint8_t> out(static_cast<size_t>(width) * height * 3);
  const Resizer resizer(in, width, height, kernels);
  for (int i = 0; i < bands; ++i) {
    const int begin = height * i / bands;
    const int end = height * (i + 1) / bands;
    if (begin < end) resizer.run(begin, end, {out.data(), width, height, 1});
  }
  return out;
}

void expect_rows_agree(std::mt19937& rng, int width, int height, int channels, int out_width,
                       int out_height) {
  // Exactly as large as it must be, so that a sanitizer sees any read beyond it.
  const std::vector<uint8_t> pixels =
      random_pixels(rng, static_cast<size_t>(width) * height * channels);
  const ImageView in{pixels.data(), width, height, channels};
  const std::vector<uint8_t> want = resize_with(kScalarKernels, in, out_width, out_height, 1);
  for (const ResizeKernels* kernels : resize_kernel_table()) {
    if (!kernels->supported()) continue;
    const int bands = 1 + static_cast<int>(rng() % 4);
    if (resize_with(*kernels, in, out_width, out_height, bands) == want) continue;
    test::report(false, "SIMD equals scalar", __FILE__, __LINE__,
                 format("%s: %dx%dx%d -> %dx%d, %d bands", kernels->name.data(), width, height,
                        channels, out_width, out_height, bands));
  }
}

std::string grid_name(const TileGrid& grid) {
  return std::to_string(grid.columns) + "x" + std::to_string(grid.rows);
}

// The "sizes" of the golden file: five integers each, in a fixed order.
struct GoldenSize {
  int width, height, columns, rows, tiles;
};
std::vector<GoldenSize> golden_sizes() {
  std::ifstream file(TM_SOURCE_DIR "/test/fixtures/tiny-internvl/preprocess.json");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t end = text.find("\"images\"");
  std::vector<GoldenSize> sizes;
  size_t at = 0;
  const auto number_after = [&](const char* key) {
    at = text.find(key, at);
    if (at == std::string::npos || at > end) return -1;
    at = text.find(':', at) + 1;
    return std::atoi(text.c_str() + at);
  };
  while (true) {
    GoldenSize size{};
    size.width = number_after("\"width\"");
    if (size.width < 0) return sizes;
    size.height = number_after("\"height\"");
    size.columns = number_after("\"columns\"");
    size.rows = number_after("\"rows\"");
    size.tiles = number_after("\"tiles\"");
    sizes.push_back(size);
  }
}

}  // namespace

TEST("the grid of every golden size is the reference's") {
  const std::vector<GoldenSize> sizes = golden_sizes();
  EXPECT_EQ(sizes.size(), 40U);
  for (const GoldenSize& size : sizes) {
    const TileGrid grid = choose_grid(size.width, size.height, {.tile_size = 224});
    EXPECT_EQ(grid_name(grid), grid_name({size.columns, size.rows}));
    const int grid_tiles = grid.columns * grid.rows;
    EXPECT_EQ(grid_tiles + (grid_tiles > 1 ? 1 : 0), size.tiles);
  }
}

TEST("candidate grids come in the order of a CPython set") {
  // Printed by CPython 3.11: sorted(set(...), key=lambda x: x[0] * x[1]) for 1..12 and for 4..8.
  const char* up_to_12 =
      "1x1 1x2 2x1 3x1 1x3 2x2 4x1 1x4 5x1 1x5 1x6 6x1 3x2 2x3 7x1 1x7 4x2 2x4 1x8 8x1 1x9 3x3 9x1 "
      "2x5 5x2 10x1 1x10 11x1 1x11 12x1 3x4 4x3 1x12 6x2 2x6 ";
  const char* from_4_to_8 = "1x4 2x2 4x1 1x5 5x1 6x1 2x3 1x6 3x2 7x1 1x7 2x4 8x1 1x8 4x2 ";
  const auto names = [](int min_tiles, int max_tiles) {
    std::string text;
    for (const TileGrid& grid : candidate_grids(min_tiles, max_tiles)) {
      text += grid_name(grid) + " ";
    }
    return text;
  };
  EXPECT_EQ(names(1, 12), up_to_12);
  EXPECT_EQ(names(4, 8), from_4_to_8);
  // Each pair once, whatever the bounds.
  for (int min_tiles = 1; min_tiles <= 40; min_tiles += 3) {
    std::set<std::pair<int, int>> seen;
    for (const TileGrid& grid : candidate_grids(min_tiles, 40)) {
      seen.insert({grid.columns, grid.rows});
    }
    size_t expected = 0;
    for (int columns = 1; columns <= 40; ++columns) {
      for (int rows = 1; rows <= 40; ++rows) {
        if (columns * rows >= min_tiles && columns * rows <= 40) ++expected;
      }
    }
    EXPECT_EQ(seen.size(), expected);
    EXPECT_EQ(candidate_grids(min_tiles, 40).size(), expected);
  }
}

TEST("ties between equally many tiles follow the reference") {
  // Aspect 1.25 lies 0.75 from 1:2 and from 2:1: the set's order decides. Values from CPython 3.11.
  const struct {
    int width, height, min_tiles, max_tiles;
    const char* grid;
  } cases[] = {{500, 400, 2, 2, "1x2"}, {125, 100, 2, 2, "1x2"},  {2000, 1600, 2, 2, "2x1"},
               {500, 400, 2, 3, "1x2"}, {125, 100, 2, 3, "1x2"},  {2000, 1600, 2, 3, "2x1"},
               {250, 100, 4, 4, "4x1"}, {2500, 1000, 4, 4, "2x2"}};
  for (const auto& c : cases) {
    const TileGrid grid = choose_grid(
        c.width, c.height, {.tile_size = 448, .min_tiles = c.min_tiles, .max_tiles = c.max_tiles});
    EXPECT_EQ(grid_name(grid), c.grid);
  }
}

TEST("all instruction sets give the scalar reference's bytes over random sizes") {
  std::printf("    seed %u, rows:", kSeed);
  for (const ResizeKernels* kernels : resize_kernel_table()) {
    std::printf(" %s%s", kernels->name.data(), kernels->supported() ? "" : " (not on this CPU)");
  }
  std::printf("\n");
  std::mt19937 rng(kSeed);
  const auto side = [&] { return 1 + static_cast<int>(rng() % (rng() % 4 == 0 ? 400 : 70)); };
  const int channels[] = {1, 3, 4};
  for (int i = 0; i < 400; ++i) {
    const int width = side();
    const int height = side();
    const int out_width = rng() % 8 == 0 ? width : side();
    const int out_height = rng() % 8 == 0 ? height : side();
    expect_rows_agree(rng, width, height, channels[i % 3], out_width, out_height);
  }
}

TEST("all instruction sets give the scalar reference's bytes at the edges") {
  std::mt19937 rng(kSeed + 1);
  const int shapes[][4] = {{1, 1, 1, 1},     {1, 1, 448, 448}, {1, 3000, 7, 5},  {3000, 1, 5, 7},
                           {1, 65535, 3, 9}, {65535, 1, 9, 3}, {2, 2, 1, 1},     {3, 3, 64, 1},
                           {64, 1, 21, 1},   {65, 2, 22, 2},   {5, 60, 17, 204}, {900, 17, 11, 500},
                           {2048, 3, 10, 3}, {21, 33, 43, 33}, {43, 33, 43, 21}};
  for (const auto& shape : shapes) {
    for (const int channels : {1, 3, 4}) {
      expect_rows_agree(rng, shape[0], shape[1], channels, shape[2], shape[3]);
    }
  }
}

TEST("a constant image stays constant at any size") {
  const std::vector<uint8_t> pixels(37 * 91 * 3, 201);
  for (const auto& [width, height] : {std::pair{5, 7}, {91, 37}, {400, 300}}) {
    std::vector<uint8_t> out(static_cast<size_t>(width) * height * 3);
    resize_bicubic({pixels.data(), 37, 91, 3}, width, height, out);
    EXPECT(out == std::vector<uint8_t>(out.size(), 201));
  }
}

TEST("grey equals its RGB copy and alpha is dropped") {
  std::mt19937 rng(kSeed + 2);
  const std::vector<uint8_t> grey = random_pixels(rng, 50 * 40);
  std::vector<uint8_t> rgb, rgba;
  for (const uint8_t value : grey) {
    rgb.insert(rgb.end(), 3, value);
    rgba.insert(rgba.end(), {value, value, value, static_cast<uint8_t>(rng())});
  }
  const TileOptions options{.tile_size = 32, .max_tiles = 6};
  const ImageTiles want = make_tiles({rgb.data(), 50, 40, 3}, options);
  EXPECT(make_tiles({grey.data(), 50, 40, 1}, options).pixels == want.pixels);
  EXPECT(make_tiles({rgba.data(), 50, 40, 4}, options).pixels == want.pixels);
}

TEST("tiles are crops of the resized image, row by row, thumbnail last") {
  std::mt19937 rng(kSeed + 3);
  const std::vector<uint8_t> pixels = random_pixels(rng, 70 * 50 * 3);
  const ImageView image{pixels.data(), 70, 50, 3};
  const ImageTiles tiles = make_tiles(image, {.tile_size = 20, .max_tiles = 6});
  EXPECT_EQ(grid_name(tiles.grid), std::string("3x2"));
  EXPECT_EQ(tiles.num_tiles, 7);
  EXPECT_EQ(tiles.tile_size, 20);
  EXPECT_EQ(tiles.pixels.size(), size_t{7 * 20 * 20 * 3});
  std::vector<uint8_t> whole(60 * 40 * 3), thumbnail(20 * 20 * 3);
  resize_bicubic(image, 60, 40, whole);
  resize_bicubic(image, 20, 20, thumbnail);
  for (int tile = 0; tile < 6; ++tile) {
    for (int y = 0; y < 20; ++y) {
      const uint8_t* want = &whole[((tile / 3 * 20 + y) * 60 + tile % 3 * 20) * 3];
      EXPECT(std::memcmp(&tiles.pixels[(tile * 20 + y) * 60], want, 60) == 0);
    }
  }
  EXPECT(std::memcmp(&tiles.pixels[6 * 20 * 60], thumbnail.data(), thumbnail.size()) == 0);
  const TileOptions plain{.tile_size = 20, .max_tiles = 6, .use_thumbnail = false};
  EXPECT_EQ(make_tiles(image, plain).num_tiles, 6);
  EXPECT_EQ(make_tiles(image, {.tile_size = 20, .max_tiles = 1}).num_tiles, 1);
}

TEST("the content hash sees every byte, the length and the grid") {
  std::vector<uint8_t> bytes(200, 0);
  std::set<std::pair<uint64_t, uint64_t>> seen;
  const auto add = [&](const ContentHash& hash) { seen.insert({hash.words[0], hash.words[1]}); };
  for (size_t length = 0; length <= bytes.size(); ++length) add(content_hash(bytes.data(), length));
  EXPECT_EQ(seen.size(), 201U);
  for (size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      bytes[i] = static_cast<uint8_t>(1 << bit);
      add(content_hash(bytes.data(), bytes.size()));
    }
    bytes[i] = 0;
  }
  EXPECT_EQ(seen.size(), 201U + 1600U);
  // The same pixels as 2 x 1 and as 1 x 2 tiles are different images.
  const std::vector<uint8_t> grey(16 * 8, 77);
  const TileOptions options{.tile_size = 8, .max_tiles = 2, .use_thumbnail = false};
  const ImageTiles wide = make_tiles({grey.data(), 16, 8, 1}, options);
  const ImageTiles tall = make_tiles({grey.data(), 8, 16, 1}, options);
  EXPECT(wide.pixels == tall.pixels);
  EXPECT(wide.content_hash[0] != tall.content_hash[0]);
}

// The definition of the head of content_hash.h, word by word; multiplication is doubling and adding.
ContentHash hash_by_definition(std::vector<uint8_t> bytes, const ContentHash& previous,
                               const HashKey& key) {
  __extension__ using Wide = unsigned __int128;
  const Wide prime = (static_cast<Wide>(1) << 127) - 1;
  const Wide point = static_cast<Wide>(key.point[1]) << 64 | key.point[0];
  Wide value = static_cast<Wide>(previous.words[1]) << 64 | previous.words[0];
  const auto append = [&](Wide coefficient) {
    Wide product = 0;
    for (int bit = 126; bit >= 0; --bit) {
      product = product * 2 % prime;
      if ((point >> bit & 1U) != 0) product = (product + value) % prime;
    }
    value = (product + coefficient) % prime;
  };
  const size_t length = bytes.size();
  bytes.resize((length + kHashGroup - 1) / kHashGroup * kHashGroup);
  for (size_t unit = 0; unit < bytes.size(); unit += kHashUnit) {
    uint64_t words[kHashWords] = {};
    const size_t end = std::min(bytes.size(), unit + kHashUnit);
    for (size_t at = unit; at < end; at += 8) {
      uint32_t x, y;
      std::memcpy(&x, &bytes[at], 4);
      std::memcpy(&y, &bytes[at + 4], 4);
      for (size_t p = 0; p < kHashWords; ++p) {
        const uint32_t* own = &key.sums[(at - unit) / 4 + p * kHashGroup / 4];
        words[p] += static_cast<uint64_t>(x + own[0]) * static_cast<uint32_t>(y + own[1]);
      }
    }
    append(static_cast<Wide>(words[3] & 0x1FFFFF) << 64 | words[0]);
    append(static_cast<Wide>(words[3] >> 21 & 0x3FFFFF) << 64 | words[1]);
    append(static_cast<Wide>(words[3] >> 43) << 64 | words[2]);
  }
  append(static_cast<Wide>(length) + 1);
  return {{static_cast<uint64_t>(value), static_cast<uint64_t>(value >> 64)}};
}

TEST("every hash kernel gives what the definition gives, under any key") {
  std::mt19937 rng(kSeed + 7);
  for (const size_t length : {0, 1, 63, 64, 65, 4095, 4096, 4097, 8192, 10'000, 12'352}) {
    for (const bool ones : {false, true}) {
      HashKey key = random_hash_key();
      std::vector<uint8_t> bytes = random_pixels(rng, length);
      if (ones) {  // all sums and products at the top of their range
        std::fill(bytes.begin(), bytes.end(), 0xFF);
        std::memset(key.sums, 0, sizeof(key.sums));
        key.point[0] = UINT64_MAX;
        key.point[1] = UINT64_MAX >> 2;
      }
      const ContentHash previous = {{UINT64_MAX - length, UINT64_MAX >> 1}};
      const ContentHash want = hash_by_definition(bytes, previous, key);
      for (const HashKernel* kernel : hash_kernel_table()) {
        if (!kernel->supported()) continue;
        EXPECT(content_hash_with(*kernel, bytes.data(), length, previous, key) == want);
      }
      EXPECT(content_hash(bytes.data(), length, previous, key) == want);
    }
  }
}

TEST("a hash depends on the key, on what came before and on where it was cut") {
  const std::vector<uint8_t> bytes(10'000, 5);
  const ContentHash whole = content_hash(bytes.data(), bytes.size());
  EXPECT(content_hash(bytes.data(), bytes.size()) == whole);
  EXPECT(!(content_hash(bytes.data(), bytes.size(), {}, random_hash_key()) == whole));
  const auto in_two = [&](size_t first) {
    const ContentHash before = content_hash(bytes.data(), first);
    return content_hash(bytes.data() + first, bytes.size() - first, before);
  };
  EXPECT(in_two(4096) == in_two(4096));
  EXPECT(!(in_two(4096) == in_two(8192)));
  EXPECT(!(in_two(4096) == whole));
}

// Two messages that a chain of products from known constants, the hash used before, mapped to the same
// value: the first step's zero factor leaves the difference in one word, the second's adds it away.
TEST("messages made to collide without the key do not") {
  constexpr uint64_t lo = 0x243F6A8885A308D3ULL, hi = 0x13198A2E03707344ULL;
  constexpr uint64_t mix = 0x9216D5D98979FB1BULL;
  const auto message = [&](uint64_t a) {
    std::vector<uint64_t> words(16);
    words[0] = a;
    words[1] = hi ^ mix;
    const uint64_t lo_then = std::rotl(words[1], 29) + hi;
    const uint64_t hi_then = std::rotl(a, 31) ^ lo;
    words[8] = lo_then;
    words[9] = std::rotr(lo - hi_then, 29);
    return words;
  };
  const std::vector<uint64_t> one = message(1);
  const std::vector<uint64_t> two = message(2);
  EXPECT(!(content_hash(one.data(), 128) == content_hash(two.data(), 128)));
}

TEST("bad images and options are refused with a code") {
  const std::vector<uint8_t> pixels(300, 0);
  const auto image = [&](int width, int height, int channels) {
    return ImageView{pixels.data(), width, height, channels};
  };
  EXPECT_ERROR(make_tiles(image(0, 10, 3), {}), ErrorCode::invalid_image);
  EXPECT_ERROR(make_tiles(image(10, -1, 3), {}), ErrorCode::invalid_image);
  EXPECT_ERROR(make_tiles(image(65536, 1, 3), {}), ErrorCode::invalid_image);
  EXPECT_ERROR(make_tiles(image(65535, 65535, 3), {}), ErrorCode::invalid_image);
  EXPECT_ERROR(make_tiles(image(10, 10, 2), {}), ErrorCode::invalid_image);
  EXPECT_ERROR(make_tiles({nullptr, 10, 10, 3}, {}), ErrorCode::invalid_image);
  EXPECT_ERROR(make_tiles(image(10, 10, 3), {.tile_size = 0}), ErrorCode::invalid_argument);
  EXPECT_ERROR(make_tiles(image(10, 10, 3), {.tile_size = 5000}), ErrorCode::invalid_argument);
  EXPECT_ERROR(make_tiles(image(10, 10, 3), {.max_tiles = 0}), ErrorCode::invalid_argument);
  EXPECT_ERROR(make_tiles(image(10, 10, 3), {.max_tiles = 1 << 30}), ErrorCode::invalid_argument);
  EXPECT_ERROR(make_tiles(image(10, 10, 3), {.min_tiles = 0}), ErrorCode::invalid_argument);
  EXPECT_ERROR(make_tiles(image(10, 10, 3), {.min_tiles = 7, .max_tiles = 6}),
               ErrorCode::invalid_argument);
  EXPECT_ERROR(make_tiles(image(10, 10, 3), {.tile_size = 4096, .max_tiles = 1024}),
               ErrorCode::invalid_argument);
  EXPECT_ERROR(choose_grid(0, 1, {}), ErrorCode::invalid_image);
  std::vector<uint8_t> out(10);
  EXPECT_ERROR(resize_bicubic(image(10, 10, 3), 2, 2, out), ErrorCode::invalid_argument);
  EXPECT_ERROR(resize_bicubic(image(10, 10, 3), 0, 2, out), ErrorCode::invalid_image);
}

TEST("a pool of any size gives the tiles of one thread, for many images at once") {
  std::mt19937 rng(kSeed + 4);
  std::vector<std::vector<uint8_t>> images;
  std::vector<ImageTiles> want;
  for (int i = 0; i < 12; ++i) {
    images.push_back(random_pixels(rng, static_cast<size_t>(300 + 10 * i) * 200 * 3));
    want.push_back(make_tiles({images.back().data(), 300 + 10 * i, 200, 3}, {.tile_size = 112}));
  }
  for (const int threads : {1, 2, 5}) {
    TilePool pool(threads);
    std::vector<std::future<std::shared_ptr<const ImageTiles>>> futures;
    for (int i = 0; i < 12; ++i) {
      futures.push_back(pool.submit({images[i].data(), 300 + 10 * i, 200, 3}, {.tile_size = 112}));
    }
    futures.push_back(pool.submit({nullptr, 5, 5, 3}, {}));
    for (int i = 0; i < 12; ++i) {
      const std::shared_ptr<const ImageTiles> tiles = futures[i].get();
      EXPECT(tiles->pixels == want[i].pixels);
      EXPECT(tiles->content_hash[0] == want[i].content_hash[0]);
      EXPECT(tiles->content_hash[1] == want[i].content_hash[1]);
    }
    EXPECT_ERROR(futures[12].get(), ErrorCode::invalid_image);
  }
}

TEST("a pool that ends answers every image exactly once") {
  std::mt19937 rng(kSeed + 5);
  const std::vector<uint8_t> pixels = random_pixels(rng, 600 * 400 * 3);
  std::atomic<int> finished = 0;
  std::atomic<int> refused = 0;
  {
    TilePool pool(2);
    for (int i = 0; i < 20; ++i) {
      pool.submit({pixels.data(), 600, 400, 3}, {.tile_size = 112},
                  [&](std::shared_ptr<const ImageTiles> tiles, std::exception_ptr failure) {
                    EXPECT((tiles == nullptr) == (failure != nullptr));
                    ++(tiles ? finished : refused);
                  });
    }
  }
  EXPECT_EQ(finished + refused, 20);
}

TEST_MAIN()
