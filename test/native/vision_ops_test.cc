// The vision tower's ops: patches, positions and shuffle by hand, attention against float64 and bit
// for bit against itself for any number of tiles and threads.
#include "backend/cpu/vision_ops.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "test.h"

using namespace turbomind;
using cpu::HostMemory;
using cpu::Isa;
using cpu::ThreadPool;

namespace {

constexpr double kTolerance = 2e-5;  // f32 chains of up to 1,025 terms of size about 1

std::vector<float> random_values(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

struct Tower {
  int tiles = 1;
  int tokens = 257;
  int heads = 2;
  int dim = 64;
  bool norms = false;
  int width() const { return heads * dim; }
};

std::vector<float> attend(const Tower& t, std::vector<float> qkv, Isa isa = cpu::best_isa(),
                          int threads = 1) {
  ThreadPool pool(threads);
  HostMemory scratch;
  std::vector<float> y(static_cast<size_t>(t.tiles) * t.tokens * t.width());
  const auto weight = random_values(t.width(), 3);
  Norm norm;
  norm.weight = ConstTensorView(weight.data(), DType::f32, {t.width()});
  VisionAttentionArgs args;
  args.qkv = TensorView(qkv.data(), DType::f32, {t.tiles * t.tokens, 3 * t.width()});
  args.y = TensorView(y.data(), DType::f32, {t.tiles * t.tokens, t.width()});
  args.num_tiles = t.tiles;
  args.tokens_per_tile = t.tokens;
  args.num_heads = t.heads;
  args.head_dim = t.dim;
  if (t.norms) args.q_norm = args.k_norm = &norm;
  cpu::vision_attention(args, isa, scratch, pool);
  return y;
}

// q, k or v (part 0, 1, 2) of a row in float64, normed over the whole width where wanted.
std::vector<double> part_of(const Tower& t, const std::vector<float>& qkv, int64_t row, int part) {
  const float* from = &qkv[(row * 3 + part) * t.width()];
  std::vector<double> x(from, from + t.width());
  if (!t.norms || part == 2) return x;
  const auto weight = random_values(t.width(), 3);
  double square = 0;
  for (double value : x) square += value * value;
  for (int i = 0; i < t.width(); ++i) {
    x[i] *= weight[i] / std::sqrt(square / t.width() + static_cast<double>(1e-6F));
  }
  return x;
}

double row_error(const Tower& t, const std::vector<float>& qkv, const std::vector<float>& y,
                 int tile, int token) {
  const int64_t base = int64_t{tile} * t.tokens;
  const auto q = part_of(t, qkv, base + token, 0);
  std::vector<std::vector<double>> weights(t.heads);
  for (int j = 0; j < t.tokens; ++j) {
    const auto k = part_of(t, qkv, base + j, 1);
    for (int h = 0; h < t.heads; ++h) {
      double dot = 0;
      for (int d = h * t.dim; d < (h + 1) * t.dim; ++d) dot += q[d] * k[d];
      weights[h].push_back(std::exp(dot / std::sqrt(static_cast<double>(t.dim))));
    }
  }
  double error = 0;
  for (int i = 0; i < t.width(); ++i) {
    double sum = 0;
    double out = 0;
    for (int j = 0; j < t.tokens; ++j) {
      sum += weights[i / t.dim][j];
      out += weights[i / t.dim][j] * qkv[((base + j) * 3 + 2) * t.width() + i];
    }
    const double difference = std::abs(y[(base + token) * t.width() + i] - out / sum);
    if (!(difference <= error)) error = difference;
  }
  return error;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST("patchify: channel, then y, then x; each value rounded as float32 does step by step") {
  ThreadPool pool(2);
  std::vector<uint8_t> tiles(2 * 6 * 6 * 3);
  for (size_t i = 0; i < tiles.size(); ++i) tiles[i] = static_cast<uint8_t>(i * 37 % 256);
  std::vector<float> patches(2 * 4 * 3 * 9);
  PatchifyArgs args;
  args.tiles = ConstTensorView(tiles.data(), DType::u8, {2, 6, 6, 3});
  args.patches = TensorView(patches.data(), DType::f32, {8, 27});
  args.patch_size = 3;
  for (int c = 0; c < 3; ++c) {
    args.mean[c] = 0.4F + 0.03F * static_cast<float>(c);
    args.std[c] = 0.2F + 0.01F * static_cast<float>(c);
  }
  cpu::patchify(args, pool);
  for (int n = 0; n < 2; ++n) {
    for (int r = 0; r < 2; ++r) {
      for (int q = 0; q < 2; ++q) {
        for (int i = 0; i < 27; ++i) {
          const int c = i / 9, y = r * 3 + i / 3 % 3, x = q * 3 + i % 3;
          volatile float value = static_cast<float>(tiles[((n * 6 + y) * 6 + x) * 3 + c]);
          value = value / 255.0F;
          value = value - args.mean[c];
          value = value / args.std[c];
          EXPECT_EQ(patches[((n * 2 + r) * 2 + q) * 27 + i], value);
        }
      }
    }
  }
  args.patch_size = 4;
  EXPECT_ERROR(cpu::patchify(args, pool), ErrorCode::internal);
}

TEST("vision_embed puts the class token first in each tile and adds positions") {
  ThreadPool pool(1);
  const std::vector<float> patches = {1, 2, 3, 4, 5, 6, 7, 8};  // 2 tiles x 2 patches x 2
  const std::vector<float> cls = {100, 200};
  const std::vector<float> positions = {0.5F, 0.25F, 10, 20, 30, 40};
  std::vector<float> x(12);
  VisionEmbedArgs args;
  args.patches = ConstTensorView(patches.data(), DType::f32, {4, 2});
  args.cls = ConstTensorView(cls.data(), DType::f32, {2});
  args.positions = ConstTensorView(positions.data(), DType::f32, {3, 2});
  args.x = TensorView(x.data(), DType::f32, {6, 2});
  args.num_tiles = 2;
  cpu::vision_embed(args, pool);
  EXPECT(same_bits(x, {100.5F, 200.25F, 11, 22, 33, 44, 100.5F, 200.25F, 15, 26, 37, 48}));
}

TEST("pixel shuffle drops the class token and joins neighbours row by row") {
  ThreadPool pool(2);
  // One value a patch: tile 0 holds 1..16 in a 4 x 4 grid, tile 1 holds 101..116; class token -1.
  std::vector<float> x;
  for (int tile = 0; tile < 2; ++tile) {
    x.push_back(-1);
    for (int i = 1; i <= 16; ++i) x.push_back(static_cast<float>(100 * tile + i));
  }
  std::vector<float> y(32);
  PixelShuffleArgs args;
  args.x = ConstTensorView(x.data(), DType::f32, {34, 1});
  args.y = TensorView(y.data(), DType::f32, {8, 4});
  args.num_tiles = 2;
  args.grid = 4;
  args.factor = 2;
  cpu::pixel_shuffle(args, pool);
  const std::vector<float> first(y.begin(), y.begin() + 16);
  EXPECT(same_bits(first, {1, 2, 5, 6, 3, 4, 7, 8, 9, 10, 13, 14, 11, 12, 15, 16}));
  EXPECT_EQ(y[16], 101.0F);
  EXPECT_EQ(y[31], 116.0F);
}

TEST("attention agrees with float64 for every head size and tile length") {
  for (const Tower& t : {Tower{.tiles = 2, .tokens = 257, .heads = 2, .dim = 64},
                         Tower{.tiles = 1, .tokens = 1025, .heads = 1, .dim = 64},
                         Tower{.tiles = 1, .tokens = 65, .heads = 3, .dim = 80},
                         Tower{.tiles = 1, .tokens = 513, .heads = 1, .dim = 96},
                         Tower{.tiles = 1, .tokens = 257, .heads = 2, .dim = 128, .norms = true},
                         Tower{.tiles = 3, .tokens = 1, .heads = 2, .dim = 64}}) {
    const auto qkv = random_values(static_cast<size_t>(t.tiles) * t.tokens * 3 * t.width(), 11);
    const auto y = attend(t, qkv);
    for (int token : {0, t.tokens / 2, t.tokens - 1}) {
      EXPECT(row_error(t, qkv, y, t.tiles - 1, token) < kTolerance);
    }
  }
}

TEST("a tile's attention has the same bits alone, among others, on any threads and any ISA") {
  const Tower many{.tiles = 3, .tokens = 257, .heads = 2, .dim = 64, .norms = true};
  const size_t tile = static_cast<size_t>(many.tokens) * 3 * many.width();
  const auto qkv = random_values(3 * tile, 12);
  const auto want = attend(many, qkv);
  for (int threads : {2, 3, 4}) {
    EXPECT(same_bits(attend(many, qkv, cpu::best_isa(), threads), want));
  }
  for (Isa isa : {Isa::scalar, Isa::avx2}) {
    if (isa <= cpu::best_isa()) EXPECT(same_bits(attend(many, qkv, isa, 2), want));
  }
  Tower one = many;
  one.tiles = 1;
  const std::vector<float> second(qkv.begin() + static_cast<int64_t>(tile),
                                  qkv.begin() + static_cast<int64_t>(2 * tile));
  const size_t rows = static_cast<size_t>(many.tokens) * many.width();
  EXPECT(same_bits(
      attend(one, second, cpu::best_isa(), 4),
      {want.begin() + static_cast<int64_t>(rows), want.begin() + static_cast<int64_t>(2 * rows)}));
}

TEST("no tiles is no work") { EXPECT(attend({.tiles = 0}, {}).empty()); }

TEST_MAIN()
