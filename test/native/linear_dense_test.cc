// Dense layers against float64, and a row's independence of batch, position and thread count.
#include <algorithm>

#include "linear_fixture.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

// Of the typical result. f32 fma chains: rounding of K sums. bf16 tiles: x is cut at 2^-17 of a
// value.
constexpr double kMeanTolerance = 4e-6;
constexpr double kWorstTolerance = 3e-5;

struct DensePart {
  int64_t n, k;
  FloatArray weight, bias;
  DensePart(std::mt19937& rng, int64_t n_, int64_t k_, DType type, bool with_bias)
      : n(n_), k(k_), weight(type, random_floats(rng, n_ * k_, 0.05F)) {
    if (with_bias) bias = FloatArray(type, random_floats(rng, n, 0.5F));
  }
  LinearPart view() const {
    LinearPart part;
    part.out_features = n;
    part.weight = {weight.data(), weight.dtype, {n, k}};
    if (!bias.values.empty()) part.bias = {bias.data(), bias.dtype, {n}};
    return part;
  }
};

LinearSource dense_source(const std::vector<DensePart>& parts,
                          PartOrder order = PartOrder::concatenated) {
  LinearSource source;
  source.name = "test.dense";
  source.in_features = parts[0].k;
  source.order = order;
  for (const DensePart& part : parts) source.parts.push_back(part.view());
  return source;
}

std::vector<double> product(const std::vector<DensePart>& parts, const std::vector<float>& x,
                            int64_t rows) {
  std::vector<double> y;
  for (int64_t r = 0; r < rows; ++r) {
    for (const DensePart& part : parts) {
      for (int64_t n = 0; n < part.n; ++n) {
        double sum = part.bias.values.empty() ? 0.0 : part.bias.values[static_cast<size_t>(n)];
        for (int64_t i = 0; i < part.k; ++i) {
          sum += static_cast<double>(part.weight.values[static_cast<size_t>(n * part.k + i)]) *
                 x[static_cast<size_t>(r * part.k + i)];
        }
        y.push_back(sum);
      }
    }
  }
  return y;
}

void expect_near(const std::vector<float>& got, const std::vector<double>& want) {
  double square = 0, error = 0, worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    square += want[i] * want[i];
    error += (got[i] - want[i]) * (got[i] - want[i]);
    worst = std::max(worst, std::abs(got[i] - want[i]));
  }
  const double unit = std::sqrt(square / static_cast<double>(want.size()));
  EXPECT_EQ(got.size(), want.size());
  EXPECT_NEAR(std::sqrt(error / static_cast<double>(want.size())) / unit, 0.0, kMeanTolerance);
  EXPECT_NEAR(worst / unit, 0.0, kWorstTolerance);
}

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

}  // namespace

TEST("every type, odd shape and instruction set agrees with float64") {
  std::mt19937 rng(11);
  cpu::ThreadPool pool(2);
  const struct {
    int64_t n, k;
  } shapes[] = {{1, 1}, {5, 33}, {40, 96}, {33, 257}, {96, 588}};
  for (DType type : kTypes) {
    for (const auto& s : shapes) {
      const std::vector<DensePart> parts = {DensePart(rng, s.n, s.k, type, true)};
      for (int64_t rows : {1, 6, 35, 130}) {
        const std::vector<float> x = random_floats(rng, rows * s.k, 1.0F);
        const std::vector<double> want = product(parts, x, rows);
        for (cpu::Isa isa : isas()) {
          const auto layer = cpu::pack_linear(dense_source(parts), isa, pool);
          expect_near(run(*layer, {.x = x.data(), .rows = rows}, s.n, pool), want);
        }
      }
    }
  }
}

TEST("a row keeps its bits in any batch, place and team; fma levels agree bit for bit") {
  std::mt19937 rng(12);
  const int64_t k = 100, n = 40;
  for (DType type : kTypes) {
    const std::vector<DensePart> parts = {DensePart(rng, n, k, type, true)};
    const std::vector<float> x = random_floats(rng, 65 * k, 2.0F);
    std::vector<float> fma;
    for (cpu::Isa isa : isas()) {
      cpu::ThreadPool one(1);
      const auto whole = cpu::pack_linear(dense_source(parts), isa, one);
      const std::vector<float> want = run(*whole, {.x = x.data(), .rows = 65}, n, one);
      const bool tiles = isa == cpu::Isa::amx && type == DType::bf16;
      if (fma.empty()) fma = want;
      if (!tiles) EXPECT(same_bits(want, fma));
      for (int threads = 1; threads <= 4; ++threads) {
        cpu::ThreadPool pool(threads);
        const auto layer = cpu::pack_linear(dense_source(parts), isa, pool);
        for (int64_t rows : {1, 2, 7, 8, 9, 12, 16, 17, 33, 64, 65}) {
          const int64_t first = 65 - rows;
          const std::vector<float> got =
              run(*layer, {.x = x.data() + first * k, .rows = rows}, n, pool);
          EXPECT(same_bits(got, {want.begin() + first * n, want.end()}));
        }
      }
    }
  }
}

TEST("parts, gate_up, norm, gelu and residual") {
  std::mt19937 rng(13);
  cpu::ThreadPool pool(2);
  const int64_t k = 80, rows = 9;
  const std::vector<float> x = random_floats(rng, rows * k, 1.0F);
  for (DType type : kTypes) {
    const std::vector<DensePart> mlp = {DensePart(rng, 24, k, type, true),
                                        DensePart(rng, 24, k, type, true)};
    const std::vector<DensePart> qkv = {DensePart(rng, 40, k, type, true),
                                        DensePart(rng, 3, k, type, false),
                                        DensePart(rng, 3, k, DType::f32, true)};
    const std::vector<float> ones(static_cast<size_t>(k), 1.0F),
        old = random_floats(rng, rows * 46, 1.0F);
    Norm norm;
    norm.weight = {ones.data(), DType::f32, {k}};
    std::vector<float> normed = x;
    for (int64_t r = 0; r < rows; ++r) {
      double square = 0;
      for (int64_t i = 0; i < k; ++i)
        square += std::pow(x[static_cast<size_t>(r * k + i)], 2) / static_cast<double>(k);
      for (int64_t i = 0; i < k; ++i)
        normed[static_cast<size_t>(r * k + i)] /= static_cast<float>(std::sqrt(square + 1e-6));
    }
    const std::vector<double> both = product(mlp, x, rows);
    std::vector<double> gated, gelu = product(qkv, normed, rows), residual = product(qkv, x, rows);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < 24; ++n) {
        const double gate = both[static_cast<size_t>(r * 48 + n)];
        gated.push_back(gate / (1 + std::exp(-gate)) * both[static_cast<size_t>(r * 48 + 24 + n)]);
      }
    }
    for (double& v : gelu) v = 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    for (size_t i = 0; i < residual.size(); ++i) residual[i] += old[i];
    for (cpu::Isa isa : isas()) {
      const auto gate_up = cpu::pack_linear(dense_source(mlp, PartOrder::gate_up), isa, pool);
      const auto three = cpu::pack_linear(dense_source(qkv), isa, pool);
      expect_near(
          run(*gate_up, {.x = x.data(), .rows = rows, .epilogue = Epilogue::silu_mul}, 24, pool),
          gated);
      expect_near(
          run(*three, {.x = x.data(), .rows = rows, .norm = &norm, .epilogue = Epilogue::gelu}, 46,
              pool),
          gelu);
      expect_near(
          run(*three, {.x = x.data(), .rows = rows, .epilogue = Epilogue::residual}, 46, pool, old),
          residual);
    }
  }
}

TEST("a convolution's weight [N, C, p, p] is a matrix [N, C p p]") {
  std::mt19937 rng(14);
  cpu::ThreadPool pool(1);
  const std::vector<DensePart> parts = {DensePart(rng, 8, 12, DType::bf16, false)};
  LinearSource source = dense_source(parts);
  source.parts[0].weight = {parts[0].weight.data(), DType::bf16, {8, 3, 2, 2}};
  const std::vector<float> x = random_floats(rng, 12, 1.0F);
  const auto layer = cpu::pack_linear(source, cpu::best_isa(), pool);
  expect_near(run(*layer, {.x = x.data(), .rows = 1}, 8, pool), product(parts, x, 1));
}

TEST("wrong shapes and types are typed errors") {
  std::mt19937 rng(15);
  cpu::ThreadPool pool(1);
  const std::vector<DensePart> parts = {DensePart(rng, 8, 16, DType::f16, false)};
  const std::vector<AwqPart> awq = {AwqPart(rng, 32, 8, 32, DType::f16, false)};
  const auto broken = [&](auto&& change) {
    LinearSource source = dense_source(parts);
    change(source);
    return cpu::pack_linear(source, cpu::best_isa(), pool);
  };
  EXPECT_ERROR(broken([](LinearSource& s) { s.in_features = 15; }), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].out_features = 9; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].weight.dtype = DType::i8; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].weight.data = nullptr; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([&](LinearSource& s) { s.parts.push_back(awq[0].view()); }),
               ErrorCode::unsupported_quantization);
}

TEST_MAIN()
