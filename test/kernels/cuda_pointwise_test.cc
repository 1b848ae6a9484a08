// Norms, embeddings and the vision tower's data movement against host loops.
#include <algorithm>

#include "backend/cuda/kernels/kernels.h"
#include "gpu_test.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;

TEST("RMS and layer norms of aligned, odd, strided and gathered rows") {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
      for (const int columns : {8, 64, 100, 384, 3200, 5120, 12801}) {
        Random random(1);
        const int rows = 5;
        const int stride = columns + 24;
        const std::vector<uint16_t> bits = random.half(static_cast<size_t>(rows) * stride, dtype, 3.0F);
        const std::vector<float> x = to_floats(bits, dtype);
        const std::vector<float> weight = random.floats(columns, 0.2F, 1.0F);
        const std::vector<float> bias = random.floats(columns, 0.5F);
        const std::vector<int32_t> gather = {4, 0, 2};
        const DeviceArray<uint16_t> device(bits);
        const DeviceArray<float> d_weight(weight), d_bias(bias);
        const DeviceArray<int32_t> d_gather(gather);
        const DeviceArray<uint16_t> y(gather.size() * columns);
        norm(test_context(), dtype, {.kind = kind, .weight = d_weight.get(),
                                     .bias = kind == NormKind::layer ? d_bias.get() : nullptr, .eps = 1e-5F,
                                     .x = device.get(), .y = y.get(), .ldx = stride, .ldy = columns,
                                     .gather = d_gather.get(), .rows = 3, .columns = columns});
        std::vector<double> expected;
        for (int row : gather) {
          double mean = 0, squares = 0;
          for (int i = 0; i < columns; ++i) mean += x[static_cast<size_t>(row) * stride + i];
          mean = kind == NormKind::layer ? mean / columns : 0.0;
          for (int i = 0; i < columns; ++i) squares += std::pow(x[static_cast<size_t>(row) * stride + i] - mean, 2);
          const double scale = 1.0 / std::sqrt(squares / columns + 1e-5);
          for (int i = 0; i < columns; ++i) {
            expected.push_back((x[static_cast<size_t>(row) * stride + i] - mean) * scale * weight[i] +
                               (kind == NormKind::layer ? bias[i] : 0.0F));
          }
        }
        EXPECT(relative_error(to_floats(y.host(), dtype), expected) < tolerance_rounded(dtype));
      }
    }
  }
}

TEST("embedding rows, padding copies, patches, class token and pixel shuffle") {
  const DType dtype = DType::bf16;
  Random random(3);
  const std::vector<uint16_t> table = random.half(50 * 128, dtype);
  const std::vector<int32_t> ids = {7, 49, 0, 1000000};
  const DeviceArray<uint16_t> d_table(table), x(4 * 100), padded(3 * 104);
  const DeviceArray<int32_t> d_ids(ids);
  embed(test_context(), d_table.get(), 128, 50, d_ids.get(), x.get(), 4, 100);
  const std::vector<uint16_t> rows = x.host();
  for (int i = 0; i < 100; ++i) {
    EXPECT(rows[i] == table[7 * 128 + i] && rows[100 + i] == table[49 * 128 + i] && rows[300 + i] == table[i]);
  }
  // Eight columns at a time, in one pass of a CTA and in two.
  for (const int columns : {120, 8264}) {
    const int ld = round_up(columns, 64);
    const std::vector<uint16_t> values = random.half(static_cast<size_t>(3 * ld), dtype);
    const DeviceArray<uint16_t> d_values(values), y(static_cast<size_t>(4 * columns));
    embed(test_context(), d_values.get(), ld, 3, DeviceArray<int32_t>(std::vector<int32_t>{2, 0, 1, -1}).get(), y.get(), 4, columns);
    const std::vector<uint16_t> got = y.host();
    const int rows_of[] = {2, 0, 1, 0};
    for (int r = 0; r < 4; ++r) {
      EXPECT(std::equal(got.begin() + r * columns, got.begin() + (r + 1) * columns, values.begin() + rows_of[r] * ld));
    }
  }
  copy_rows(test_context(), x.get(), 100, nullptr, padded.get(), 104, 3, 100);
  const std::vector<uint16_t> wide = padded.host();
  EXPECT(wide[104 + 99] == rows[199] && wide[103] == 0 && wide[2 * 104 + 100] == 0);

  const int size = 28, p = 14, n = 2, side = 2, c = 24;
  std::vector<uint8_t> pixels(static_cast<size_t>(n) * size * size * 3);
  for (uint8_t& pixel : pixels) pixel = static_cast<uint8_t>(random.below(256));
  const DeviceArray<uint8_t> d_pixels(pixels);
  const DeviceArray<uint16_t> patches(static_cast<size_t>(n) * side * side * 3 * p * p);
  PatchifyLaunch args{.tiles = d_pixels.get(), .patches = patches.get(), .num_tiles = n, .image_size = size,
                      .patch_size = p, .mean = {0.485F, 0.456F, 0.406F}, .std = {0.229F, 0.224F, 0.225F}};
  patchify(test_context(), dtype, args);
  const std::vector<uint16_t> out = patches.host();
  for (int tile = 0; tile < n; ++tile) {
    for (int patch = 0; patch < 4; ++patch) {
      for (int i = 0; i < 3 * p * p; ++i) {
        const int ch = i / (p * p), y = patch / 2 * p + i % (p * p) / p, xx = patch % 2 * p + i % p;
        const float value = (pixels[((static_cast<size_t>(tile) * size + y) * size + xx) * 3 + ch] / 255.0F - args.mean[ch]) / args.std[ch];
        EXPECT_EQ(out[(static_cast<size_t>(tile) * 4 + patch) * 3 * p * p + i], to_bits(value, dtype));
      }
    }
  }

  const int grid = 4;
  const std::vector<uint16_t> vectors = random.half(static_cast<size_t>(n) * grid * grid * c, dtype);
  const std::vector<float> cls = random.floats(c), positions = random.floats((grid * grid + 1) * c);
  const DeviceArray<uint16_t> d_vectors(vectors), tokens(static_cast<size_t>(n) * (grid * grid + 1) * c), merged(static_cast<size_t>(n) * 4 * 4 * c);
  const DeviceArray<float> d_cls(cls), d_positions(positions);
  vision_embed(test_context(), dtype, d_vectors.get(), d_cls.get(), d_positions.get(), tokens.get(), n, grid * grid, c);
  pixel_shuffle(test_context(), tokens.get(), merged.get(), n, grid, 2, c);
  const std::vector<uint16_t> all = tokens.host(), shuffled = merged.host();
  for (int tile = 0; tile < n; ++tile) {
    const size_t base = static_cast<size_t>(tile) * (grid * grid + 1) * c;
    for (int i = 0; i < c; ++i) {
      EXPECT_EQ(all[base + i], to_bits(cls[i] + positions[i], dtype));
      EXPECT_EQ(all[base + 6 * c + i], to_bits(from_bits(vectors[(static_cast<size_t>(tile) * grid * grid + 5) * c + i], dtype) + positions[6 * c + i], dtype));
      // Output token (1, 0) is patches (2, 0), (2, 1), (3, 0), (3, 1).
      const size_t token = (static_cast<size_t>(tile) * 4 + 2) * 4 * c;
      EXPECT_EQ(shuffled[token + i], all[base + (1 + 8) * c + i]);
      EXPECT_EQ(shuffled[token + c + i], all[base + (1 + 9) * c + i]);
      EXPECT_EQ(shuffled[token + 2 * c + i], all[base + (1 + 12) * c + i]);
      EXPECT_EQ(shuffled[token + 3 * c + i], all[base + (1 + 13) * c + i]);
    }
  }
}

}  // namespace

int main() {
  require_device();
  return turbomind::test::run_all();
}
