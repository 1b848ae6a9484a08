// Paged causal attention: against float64, and bit for bit against itself however a sequence is
// cut into steps, whatever else runs, on any number of threads and any instruction set.
#include <cstring>

#include "attention_fixture.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;
using cpu::Isa;

namespace {

constexpr float kTolerance = 2e-5F;  // f32 chains of up to 1,100 terms of size about 1

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

double error_of(const AttentionFixture& fixture, const std::vector<float>& y, int sequence,
                int first, int count, int stride = 1) {
  double error = 0;
  const size_t width = y.size() / count;
  for (int i = 0; i < count; i += stride) {
    const auto want = fixture.expected(sequence, first + i);
    for (size_t d = 0; d < width; ++d) {
      const double difference = std::abs(y[i * width + d] - want[d]);
      if (!(difference <= error)) error = difference;
    }
  }
  return error;
}

std::vector<float> rows(const std::vector<float>& y, size_t width, int first, int count) {
  return {y.begin() + static_cast<int64_t>(first * width),
          y.begin() + static_cast<int64_t>((first + count) * width)};
}

}  // namespace

TEST("exp of non-positive numbers is within 2 ulp of float64, 1 at 0, and keeps NaN") {
  double worst = 0;
  for (int i = 0; i <= 870000; i += 7) {
    const float x = -1e-4F * static_cast<float>(i);
    const double want = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(cpu::exp_nonpositive(x) - want) / want);
  }
  EXPECT(worst < 2.0 * 1.2e-7);
  EXPECT_EQ(cpu::exp_nonpositive(0.0F), 1.0F);
  EXPECT_EQ(cpu::exp_nonpositive(-INFINITY), 0.0F);
  EXPECT(std::isnan(cpu::exp_nonpositive(NAN)));
}

TEST("a worked example: two tokens whose scores differ by ln 3") {
  // q = (2, 0, …), k_0 = 0, k_1 = (x, 0, …): with D = 64 the second score is 2 x / 8 = ln 3, so the
  // second token sees v_0 / 4 + 3 v_1 / 4. Position 0 is not rotated; position 1 rotates q and k
  // by the same angle, which leaves their product.
  AttentionFixture fixture({.heads = 1, .kv_heads = 1, .dim = 64}, {2});
  for (int p = 0; p < 2; ++p) {
    float* row = fixture.qkv_row(0, p);
    std::fill(row, row + 128, 0.0F);
    row[0] = 2.0F;
    row[64] = p == 1 ? 4.0F * std::log(3.0F) : 0.0F;
    for (int d = 0; d < 64; ++d) row[128 + d] = static_cast<float>(p == 0 ? d : 100 + d);
  }
  const auto y = fixture.run({{0, 0, 2}});
  EXPECT_EQ(y[5], 5.0F);  // the first token sees itself alone
  EXPECT_NEAR(y[64 + 5], 0.25 * 5 + 0.75 * 105, 1e-4);
}

TEST("every head size, group size and length about a border agrees with float64") {
  for (int dim : {64, 80, 96, 128}) {
    for (int group : {1, 2, 3, 5, 7, 8}) {
      const int length = dim == 64 ? 129 : 65;
      AttentionFixture fixture(
          {.heads = 2 * group, .kv_heads = 2, .dim = dim, .qk_norm = group == 2}, {length});
      const auto y = fixture.run({{0, 0, length}});
      EXPECT(error_of(fixture, y, 0, 0, length, 8) < kTolerance);
    }
  }
  for (int length : {1, 63, 64, 65, 128, 129, 511, 512, 513, 1100}) {
    AttentionFixture fixture({.heads = 4, .kv_heads = 2, .dim = 64}, {length});
    const auto y = fixture.run({{0, 0, length}});
    EXPECT(error_of(fixture, rows(y, 256, length - 1, 1), 0, length - 1, 1) < kTolerance);
    EXPECT(error_of(fixture, rows(y, 256, length / 2, 1), 0, length / 2, 1) < kTolerance);
  }
}

TEST("all instruction sets give the same bits") {
  for (const Shape& shape : {Shape{.heads = 7, .kv_heads = 1, .dim = 64},
                             Shape{.heads = 4, .kv_heads = 4, .dim = 80, .qk_norm = true}}) {
    AttentionFixture reference(shape, {530}, Isa::scalar);
    const auto want = reference.run({{0, 0, 530}});
    for (Isa isa : isas()) {
      AttentionFixture fixture(shape, {530}, isa);
      EXPECT(same_bits(fixture.run({{0, 0, 530}}), want));
    }
  }
}

TEST("a row has the same bits in one prefill, in chunks, decoded alone and in a mixed batch") {
  const Shape shape{.heads = 6, .kv_heads = 2, .dim = 64};
  const std::vector<int> lengths = {1100, 70, 640};
  const size_t width = 6 * 64;
  for (Isa isa : isas()) {
    if (isa == Isa::scalar) continue;  // equal to the others by the test above
    AttentionFixture whole(shape, lengths, isa);
    const auto want = whole.run({{0, 0, 1100}});
    const auto want_short = whole.run({{1, 0, 70}});
    const auto want_third = whole.run({{2, 0, 640}});
    for (int threads : {1, 2, 3, 4}) {
      AttentionFixture cut(shape, lengths, isa, threads);
      std::vector<float> got;
      for (int first = 0, step = 1; first < 1090; first += step, step = step * 5 % 257 + 1) {
        const auto part = cut.run({{0, first, std::min(step, 1090 - first)}});
        got.insert(got.end(), part.begin(), part.end());
      }
      cut.run({{2, 0, 639}});
      // decode of two sequences beside the prefill of a third
      const auto mixed = cut.run({{2, 639, 1}, {1, 0, 69}, {0, 1090, 1}});
      EXPECT(same_bits(rows(mixed, width, 0, 1), rows(want_third, width, 639, 1)));
      EXPECT(same_bits(rows(mixed, width, 1, 69), rows(want_short, width, 0, 69)));
      EXPECT(same_bits(rows(mixed, width, 70, 1), rows(want, width, 1090, 1)));
      for (int p = 1091; p < 1100; ++p) {
        EXPECT(same_bits(cut.run({{0, p, 1}}), rows(want, width, p, 1)));
      }
      EXPECT(same_bits(got, rows(want, width, 0, 1090)));
    }
  }
}

TEST("the block size does not change a bit") {
  const auto run = [](int block_size) {
    AttentionFixture fixture({.heads = 4, .kv_heads = 2, .dim = 96, .block_size = block_size},
                             {600, 90});
    fixture.run({{0, 0, 599}});
    return fixture.run({{0, 599, 1}, {1, 0, 90}});
  };
  const auto want = run(64);
  for (int block_size : {16, 24, 32, 128, 192}) EXPECT(same_bits(run(block_size), want));
}

TEST("what an earlier request left in a block does not reach a later one") {
  for (Isa isa : isas()) {
    AttentionFixture clean({.heads = 4, .kv_heads = 2, .dim = 64}, {70}, isa);
    AttentionFixture dirty({.heads = 4, .kv_heads = 2, .dim = 64}, {70}, isa);
    dirty.fill_cache(NAN);
    EXPECT(same_bits(dirty.run({{0, 0, 70}}), clean.run({{0, 0, 70}})));
  }
}

TEST("NaN in a sequence stays visible and stays in that sequence") {
  AttentionFixture fixture({.heads = 4, .kv_heads = 2, .dim = 64}, {40, 40});
  const auto want = fixture.run({{1, 0, 40}});
  fixture.qkv_row(0, 3)[4 * 64] = NAN;  // a key
  const auto y = fixture.run({{0, 0, 40}, {1, 0, 40}});
  EXPECT(std::isnan(y[39 * 256]));
  EXPECT(!std::isnan(y[2 * 256]));
  EXPECT(same_bits(rows(y, 256, 40, 40), want));
}

TEST("shapes that do not fit are refused") {
  AttentionFixture odd({.heads = 2, .kv_heads = 1, .dim = 24}, {4});
  EXPECT_ERROR(odd.run({{0, 0, 4}}), ErrorCode::internal);
  AttentionFixture uneven({.heads = 3, .kv_heads = 2, .dim = 64}, {4});
  EXPECT_ERROR(uneven.run({{0, 0, 4}}), ErrorCode::internal);
}

TEST_MAIN()
