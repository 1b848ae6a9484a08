// The quantised KV cache of the CPU: its format against the definition, attention over it against
// float64 over the values it gives back, and the same bits whatever the instruction set, the
// chunks, the threads and the block size.
#include <cstring>

#include "attention_fixture.h"
#include "backend/cpu/kernels/float_formats.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;
using cpu::Isa;
using cpu::QuantizedVector;

namespace {

// f32 chains over dequantised keys and values, as for the f32 cache (attention_test.cc).
constexpr float kTolerance = 2e-5F;

std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (isa <= cpu::best_isa()) all.push_back(isa);
  }
  return all;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<float> rows(const std::vector<float>& y, size_t width, int first, int count) {
  return {y.begin() + static_cast<int64_t>(first * width),
          y.begin() + static_cast<int64_t>((first + count) * width)};
}

// What a vector may differ by once it was stored: half a step, and what rounding scale and zero to
// f16 (relative 2^-11) moves the ends of the range by.
double allowed_error(const std::vector<double>& x, int bits) {
  const auto [least, most] = std::minmax_element(x.begin(), x.end());
  const double range = *most - *least;
  const double step = range / ((1 << bits) - 1);
  return step * 0.501 + (std::abs(*least) + range) * 0x1p-11 + 1e-6;
}

double worst_error(const AttentionFixture& fixture, const std::vector<float>& y, size_t width,
                   int sequence, int length, int stride) {
  double worst = 0;
  for (int p = 0; p < length; p += stride) {
    const std::vector<double> want = fixture.expected(sequence, p);
    for (size_t d = 0; d < width; ++d) {
      const double difference = std::abs(y[static_cast<size_t>(p) * width + d] - want[d]);
      if (!(difference <= worst)) worst = difference;
    }
  }
  return worst;
}

}  // namespace

TEST("f32 to f16 rounds to nearest even over the whole range") {
  for (uint32_t h = 0; h < 0x7c00; ++h) {  // every finite f16, and the middle to its neighbour
    const float x = cpu::f16_to_f32(static_cast<uint16_t>(h));
    EXPECT_EQ(cpu::f32_to_f16(x), h);
    EXPECT_EQ(cpu::f32_to_f16(-x), h | 0x8000U);
    if (h == 0x7bff) break;
    const float next = cpu::f16_to_f32(static_cast<uint16_t>(h + 1));
    const float middle = x + (next - x) / 2;
    EXPECT_EQ(cpu::f32_to_f16(middle), h % 2 == 0 ? h : h + 1);
    EXPECT_EQ(cpu::f32_to_f16(std::nextafter(middle, 0.0F)), h);
    EXPECT_EQ(cpu::f32_to_f16(std::nextafter(middle, 1e9F)), h + 1);
  }
  EXPECT_EQ(cpu::f32_to_f16(1e30F), 0x7bff);
  EXPECT_EQ(cpu::f32_to_f16(-70000.0F), 0xfbff);
  EXPECT(std::isnan(cpu::f16_to_f32(cpu::f32_to_f16(NAN))));
}

TEST("a worked example of the format: 0, 1, …, 15 in four bits, 0 … 255 in eight") {
  std::vector<float> x(64);
  for (int i = 0; i < 64; ++i) x[static_cast<size_t>(i)] = static_cast<float>(i % 16) - 3;
  std::vector<float> y(256);
  for (int i = 0; i < 256; ++i) y[static_cast<size_t>(i)] = 0.5F * static_cast<float>(i);
  for (Isa isa : isas()) {
    QuantizedVector out;
    cpu::attention_kernels(isa).quantize(x.data(), 64, 4, out);
    EXPECT_EQ(cpu::f16_to_f32(out.scale), 1.0F);
    EXPECT_EQ(cpu::f16_to_f32(out.zero), -3.0F);
    for (int i = 0; i < 64; ++i) EXPECT_EQ(int{out.codes[i]}, i % 16);
    cpu::attention_kernels(isa).quantize(y.data(), 256, 8, out);
    EXPECT_EQ(cpu::f16_to_f32(out.scale), 0.5F);
    for (int i = 0; i < 256; ++i) EXPECT_EQ(int{out.codes[i]}, i);
  }
}

TEST("constant, huge, tiny and broken vectors have the codes of the reference") {
  std::vector<std::vector<float>> vectors(8, std::vector<float>(64, 0.0F));
  vectors[0] = random_values(64, 1);
  std::fill(vectors[1].begin(), vectors[1].end(), 0.3F);
  vectors[2][7] = 1e30F;
  vectors[3][7] = 1e-30F;
  vectors[4][9] = -0.0F;
  vectors[5][60] = NAN;
  vectors[6][0] = INFINITY;
  vectors[7] = random_values(64, 2, 300.0F);
  for (const std::vector<float>& x : vectors) {
    for (int bits : {8, 4}) {
      QuantizedVector want;
      cpu::kAttentionReference.quantize(x.data(), 64, bits, want);
      for (Isa isa : isas()) {
        QuantizedVector got;
        cpu::attention_kernels(isa).quantize(x.data(), 64, bits, got);
        EXPECT_EQ(got.scale, want.scale);
        EXPECT_EQ(got.zero, want.zero);
        EXPECT(std::memcmp(got.codes, want.codes, 64) == 0);
      }
    }
  }
  QuantizedVector out;
  cpu::kAttentionReference.quantize(vectors[1].data(), 64, 8, out);
  EXPECT_EQ(cpu::f16_to_f32(out.scale), 0.0F);  // constant: code 0 of value zero
  EXPECT_EQ(int{out.codes[5]}, 0);
  cpu::kAttentionReference.quantize(vectors[5].data(), 64, 8, out);
  EXPECT(std::isnan(cpu::f16_to_f32(out.scale)));  // stays visible
}

TEST("what is read back is within half a step, and attention is exact over it") {
  for (int bits : {8, 4}) {
    for (int dim : {32, 64, 80, 96, 128}) {
      const Shape shape{.heads = 6, .kv_heads = 2, .dim = dim, .qk_norm = dim == 96, .bits = bits};
      const int length = dim == 64 ? 530 : 70;
      AttentionFixture fixture(shape, {length});
      const auto y = fixture.run({{0, 0, length}});
      fixture.read_back(0);
      EXPECT(worst_error(fixture, y, static_cast<size_t>(6 * dim), 0, length, 23) < kTolerance);
      for (int p : {0, length / 2, length - 1}) {
        const auto written = fixture.written(0, p, 1);
        const auto stored = fixture.stored(0, p, 1);
        for (int part : {0, 1}) {
          const double allowed = allowed_error(written[static_cast<size_t>(part)], bits);
          for (int d = 0; d < dim; ++d) {
            const auto i = static_cast<size_t>(d);
            EXPECT_NEAR(stored[static_cast<size_t>(part)][i], written[static_cast<size_t>(part)][i],
                        allowed);
          }
        }
      }
    }
  }
}

TEST("all instruction sets and block sizes give the same bits over a quantised cache") {
  for (int bits : {8, 4}) {
    for (int dim : {64, 80}) {
      Shape shape{.heads = 7, .kv_heads = 1, .dim = dim, .bits = bits};
      AttentionFixture reference(shape, {530}, Isa::scalar);
      const auto want = reference.run({{0, 0, 530}});
      for (Isa isa : isas()) {
        AttentionFixture fixture(shape, {530}, isa);
        EXPECT(same_bits(fixture.run({{0, 0, 530}}), want));
      }
      for (int block_size : {16, 24, 32, 128, 192}) {
        shape.block_size = block_size;
        AttentionFixture fixture(shape, {530});
        EXPECT(same_bits(fixture.run({{0, 0, 530}}), want));
      }
    }
  }
}

TEST("chunks, batches and threads do not change a bit over a quantised cache") {
  for (int bits : {8, 4}) {
    const Shape shape{.heads = 6, .kv_heads = 2, .dim = 64, .bits = bits};
    const std::vector<int> lengths = {700, 70};
    const size_t width = 6 * 64;
    AttentionFixture whole(shape, lengths);
    const auto want = whole.run({{0, 0, 700}});
    const auto want_short = whole.run({{1, 0, 70}});
    for (int threads : {1, 3}) {
      AttentionFixture cut(shape, lengths, cpu::best_isa(), threads);
      std::vector<float> got;
      for (int first = 0, step = 1; first < 690; first += step, step = step * 5 % 257 + 1) {
        const auto part = cut.run({{0, first, std::min(step, 690 - first)}});
        got.insert(got.end(), part.begin(), part.end());
      }
      EXPECT(same_bits(got, rows(want, width, 0, 690)));
      const auto mixed = cut.run({{0, 690, 1}, {1, 0, 70}});
      EXPECT(same_bits(rows(mixed, width, 0, 1), rows(want, width, 690, 1)));
      EXPECT(same_bits(rows(mixed, width, 1, 70), want_short));
      for (int p = 691; p < 700; ++p) {
        EXPECT(same_bits(cut.run({{0, p, 1}}), rows(want, width, p, 1)));
      }
    }
  }
}

TEST("what an earlier request left in a quantised block does not reach a later one") {
  for (Isa isa : isas()) {
    AttentionFixture clean({.heads = 4, .kv_heads = 2, .dim = 64, .bits = 4}, {70}, isa);
    AttentionFixture dirty({.heads = 4, .kv_heads = 2, .dim = 64, .bits = 4}, {70}, isa);
    dirty.fill_cache(NAN);
    EXPECT(same_bits(dirty.run({{0, 0, 70}}), clean.run({{0, 0, 70}})));
  }
}

TEST("NaN stays visible in its sequence, and blocks take the bytes that were stated") {
  AttentionFixture fixture({.heads = 4, .kv_heads = 2, .dim = 64, .bits = 8}, {40, 40});
  const auto want = fixture.run({{1, 0, 40}});
  fixture.qkv_row(0, 3)[4 * 64] = NAN;  // a key
  const auto y = fixture.run({{0, 0, 40}, {1, 0, 40}});
  EXPECT(std::isnan(y[39 * 256]));
  EXPECT(!std::isnan(y[2 * 256]));
  EXPECT(same_bits(rows(y, 256, 40, 40), want));

  KvCacheSpec spec{.num_layers = 3, .num_kv_heads = 2, .head_dim = 128, .num_blocks = 1};
  const size_t per_token = 3 * 2;  // layers, heads
  EXPECT_EQ(cpu::CpuKvCache::block_bytes(spec), per_token * 64 * 2 * 128 * 4);
  spec.bits = 8;
  EXPECT_EQ(cpu::CpuKvCache::block_bytes(spec), per_token * 64 * (2 * 128 + 8));
  spec.bits = 4;
  EXPECT_EQ(cpu::CpuKvCache::block_bytes(spec), per_token * 64 * (128 + 8));
}

TEST("bits and head sizes without kernels are refused") {
  const auto make = [](int bits, int dim) {
    return cpu::CpuKvCache(
        {.num_layers = 1, .num_kv_heads = 1, .head_dim = dim, .num_blocks = 1, .bits = bits});
  };
  EXPECT_ERROR(make(2, 64), ErrorCode::invalid_argument);
  EXPECT_ERROR(make(8, 24), ErrorCode::invalid_argument);
  EXPECT_ERROR(make(4, 16), ErrorCode::invalid_argument);
  EXPECT_EQ(make(8, 16).spec().bits, 8);
}

TEST_MAIN()
