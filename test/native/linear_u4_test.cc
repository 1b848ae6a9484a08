// 4-bit layers against float64, and their promise: a row's bits depend on that row alone.
#include "linear_fixture.h"
#include "test.h"

#include <algorithm>

using namespace turbomind;
using namespace turbomind::test;

namespace {

// 16-bit activations err by at most 1/65278 of a group's largest value each, independently: 2e-5 to
// 5e-5 of the typical result in the root mean square, and five to ten times that at worst.
constexpr double kMeanTolerance = 6e-5;
constexpr double kWorstTolerance = 3e-4;

std::vector<double> product(const std::vector<AwqPart>& parts, const std::vector<float>& x,
                            int64_t rows) {
  std::vector<double> y;
  const int64_t k = parts[0].k;
  for (int64_t r = 0; r < rows; ++r) {
    for (const AwqPart& part : parts) {
      for (int64_t n = 0; n < part.n; ++n) {
        double sum = part.bias.values.empty() ? 0.0 : part.bias.values[static_cast<size_t>(n)];
        for (int64_t i = 0; i < k; ++i)
          sum += part.weight(n, i) * x[static_cast<size_t>(r * k + i)];
        y.push_back(sum);
      }
    }
  }
  return y;
}

double spread(const std::vector<double>& y) {
  double square = 0;
  for (double v : y) square += v * v;
  return std::sqrt(square / static_cast<double>(y.size()));
}

void expect_near(const std::vector<float>& got, const std::vector<double>& want) {
  const double unit = spread(want);
  std::vector<double> error;
  for (size_t i = 0; i < got.size(); ++i) error.push_back(std::abs(got[i] - want[i]) / unit);
  EXPECT_EQ(got.size(), want.size());
  EXPECT_NEAR(spread(error), 0.0, kMeanTolerance);
  EXPECT_NEAR(*std::max_element(error.begin(), error.end()), 0.0, kWorstTolerance);
}

}  // namespace

TEST("every shape, group size, scale type and instruction set agrees with float64") {
  std::mt19937 rng(1);
  cpu::ThreadPool pool(2);
  const struct {
    int64_t k, n;
    int group;
    DType type;
  } cases[] = {{32, 8, 32, DType::f16},   {96, 40, 32, DType::bf16},  {64, 16, 64, DType::f32},
               {320, 72, 64, DType::f16}, {128, 32, 128, DType::f16}, {896, 104, 128, DType::bf16}};
  for (const auto& c : cases) {
    const std::vector<AwqPart> parts = {AwqPart(rng, c.k, c.n, c.group, c.type, true)};
    for (int64_t rows : {1, 5, 33}) {
      const std::vector<float> x = random_floats(rng, rows * c.k, 1.0F);
      const std::vector<double> want = product(parts, x, rows);
      for (cpu::Isa isa : isas()) {
        const auto layer = cpu::pack_linear(awq_source(parts), isa, pool);
        expect_near(run(*layer, {.x = x.data(), .rows = rows}, c.n, pool), want);
      }
    }
  }
}

TEST("one nibble at a time: each weight lands in its own column") {
  std::mt19937 rng(2);
  cpu::ThreadPool pool(1);
  std::vector<AwqPart> parts = {AwqPart(rng, 64, 48, 32, DType::f32, false)};
  AwqPart& part = parts[0];
  std::fill(part.z.begin(), part.z.end(), uint8_t{0});
  part.qzeros = part.pack(part.z);
  std::fill(part.scales.values.begin(), part.scales.values.end(), 1.0F);
  const auto layer = cpu::pack_linear(awq_source(parts), cpu::best_isa(), pool);
  for (int64_t i = 0; i < 64; ++i) {
    std::vector<float> x(64, 0.0F);
    x[static_cast<size_t>(i)] = 1.0F;
    const std::vector<float> y = run(*layer, {.x = x.data(), .rows = 1}, 48, pool);
    for (int64_t n = 0; n < 48; ++n) {
      EXPECT_NEAR(y[static_cast<size_t>(n)], part.q[static_cast<size_t>(i * 48 + n)], 1e-5);
    }
  }
}

TEST("all instruction sets, batch sizes, positions and thread counts give a row the same bits") {
  std::mt19937 rng(3);
  for (int group : {32, 64, 128}) {
    const int64_t k = 3 * group, n = 40;
    const std::vector<AwqPart> parts = {AwqPart(rng, k, n, group, DType::f16, true)};
    const std::vector<float> x = random_floats(rng, 65 * k, 2.0F);
    cpu::ThreadPool one(1);
    const auto reference = cpu::pack_linear(awq_source(parts), cpu::Isa::scalar, one);
    const std::vector<float> want = run(*reference, {.x = x.data(), .rows = 65}, n, one);
    for (cpu::Isa isa : isas()) {
      for (int threads = 1; threads <= 4; ++threads) {
        cpu::ThreadPool pool(threads);
        const auto layer = cpu::pack_linear(awq_source(parts), isa, pool);
        for (int64_t rows : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 64, 65}) {
          const int64_t first = 65 - rows;  // so that a row stands in another place each time
          const std::vector<float> got =
              run(*layer, {.x = x.data() + first * k, .rows = rows}, n, pool);
          EXPECT(same_bits(got, {want.begin() + first * n, want.end()}));
        }
      }
    }
  }
}

TEST("extreme activations stay exact in the integers: bits agree on all instruction sets") {
  std::mt19937 rng(4);
  cpu::ThreadPool pool(2);
  const int64_t k = 256, n = 32;
  std::vector<AwqPart> parts = {AwqPart(rng, k, n, 128, DType::f16, false)};
  AwqPart& part = parts[0];
  for (size_t i = 0; i < part.q.size(); ++i) part.q[i] = i % n < 16 ? 15 : 0;  // the largest sums
  for (size_t i = 0; i < part.z.size(); ++i) part.z[i] = i % n < 16 ? 0 : 15;
  part.qweight = part.pack(part.q);
  part.qzeros = part.pack(part.z);
  std::vector<float> x(static_cast<size_t>(8 * k));
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t row = i / static_cast<size_t>(k);
    x[i] = row == 0   ? 3.0F
           : row == 1 ? -3.0F
           : row == 2 ? 0.0F
           : row == 3 ? 1e-38F
                      : (i % 2 == 0 ? 1e30F : -1.0F);
  }
  const std::vector<double> want = product(parts, x, 2);
  std::vector<float> first;
  for (cpu::Isa isa : isas()) {
    const auto layer = cpu::pack_linear(awq_source(parts), isa, pool);
    const std::vector<float> got = run(*layer, {.x = x.data(), .rows = 8}, n, pool);
    for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(got[i] / want[i], 1.0, 3e-5);
    for (int64_t i = 2 * n; i < 4 * n; ++i) EXPECT_NEAR(got[static_cast<size_t>(i)], 0.0, 1e-30);
    if (first.empty()) first = got;
    EXPECT(same_bits(got, first));
  }
}

TEST("a NaN in a row reaches that row's results and no other row's") {
  std::mt19937 rng(5);
  cpu::ThreadPool pool(2);
  const std::vector<AwqPart> parts = {AwqPart(rng, 128, 32, 64, DType::f16, false)};
  for (cpu::Isa isa : isas()) {
    std::vector<float> x = random_floats(rng, 6 * 128, 1.0F);
    x[2 * 128 + 70] = std::nanf("");
    const auto layer = cpu::pack_linear(awq_source(parts), isa, pool);
    const std::vector<float> y = run(*layer, {.x = x.data(), .rows = 6}, 32, pool);
    for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(std::isnan(y[i]), i / 32 == 2);
  }
}

TEST("parts follow each other, and gate_up gives silu(gate) * up") {
  std::mt19937 rng(6);
  cpu::ThreadPool pool(2);
  const int64_t k = 128, rows = 6;
  const std::vector<float> x = random_floats(rng, rows * k, 1.0F);
  const std::vector<AwqPart> qkv = {AwqPart(rng, k, 48, 64, DType::f16, true),
                                    AwqPart(rng, k, 8, 64, DType::f16, true),
                                    AwqPart(rng, k, 24, 64, DType::f32, false)};
  const std::vector<AwqPart> mlp = {AwqPart(rng, k, 40, 64, DType::f16, true),
                                    AwqPart(rng, k, 40, 64, DType::f16, true)};
  const std::vector<double> both = product(mlp, x, rows);
  std::vector<double> want;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < 40; ++n) {
      const double gate = both[static_cast<size_t>(r * 80 + n)];
      want.push_back(gate / (1 + std::exp(-gate)) * both[static_cast<size_t>(r * 80 + 40 + n)]);
    }
  }
  for (cpu::Isa isa : isas()) {
    expect_near(
        run(*cpu::pack_linear(awq_source(qkv), isa, pool), {.x = x.data(), .rows = rows}, 80, pool),
        product(qkv, x, rows));
    const auto layer = cpu::pack_linear(awq_source(mlp, PartOrder::gate_up), isa, pool);
    const cpu::LinearCall call = {.x = x.data(), .rows = rows, .epilogue = Epilogue::silu_mul};
    expect_near(run(*layer, call, 40, pool), want);
  }
}

TEST("norm, gelu and residual are applied, with the same bits everywhere") {
  std::mt19937 rng(7);
  cpu::ThreadPool pool(2);
  const int64_t k = 192, n = 40, rows = 7;
  const std::vector<AwqPart> parts = {AwqPart(rng, k, n, 64, DType::f16, true)};
  const std::vector<float> x = random_floats(rng, rows * k, 3.0F),
                           weight = random_floats(rng, k, 1.0F);
  const std::vector<float> shift = random_floats(rng, k, 1.0F), scale = random_floats(rng, n, 1.0F);
  const std::vector<float> old = random_floats(rng, rows * n, 1.0F);
  for (NormKind kind : {NormKind::rms, NormKind::layer}) {
    Norm norm;
    norm.kind = kind;
    norm.weight = {weight.data(), DType::f32, {k}};
    if (kind == NormKind::layer) norm.bias = {shift.data(), DType::f32, {k}};
    std::vector<float> normed(x.size());
    for (int64_t r = 0; r < rows; ++r) {
      double mean = 0, square = 0;
      const float* row = x.data() + r * k;
      for (int64_t i = 0; i < k && kind == NormKind::layer; ++i)
        mean += row[i] / static_cast<double>(k);
      for (int64_t i = 0; i < k; ++i)
        square += (row[i] - mean) * (row[i] - mean) / static_cast<double>(k);
      for (int64_t i = 0; i < k; ++i) {
        const size_t at = static_cast<size_t>(i);
        normed[static_cast<size_t>(r * k + i)] =
            static_cast<float>((row[i] - mean) / std::sqrt(square + 1e-6) * weight[at] +
                               (kind == NormKind::layer ? shift[at] : 0.0F));
      }
    }
    std::vector<double> plain = product(parts, normed, rows), gelu = plain, residual = plain;
    for (double& v : gelu) v = 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    for (size_t i = 0; i < residual.size(); ++i)
      residual[i] = old[i] + scale[i % static_cast<size_t>(n)] * residual[i];
    std::vector<std::vector<float>> firsts(3);
    for (cpu::Isa isa : isas()) {
      const auto layer = cpu::pack_linear(awq_source(parts), isa, pool);
      const cpu::LinearCall call = {.x = x.data(), .rows = rows, .norm = &norm};
      cpu::LinearCall with_gelu = call, with_residual = call;
      with_gelu.epilogue = Epilogue::gelu;
      with_residual.epilogue = Epilogue::residual;
      with_residual.scale = scale.data();
      const std::vector<std::vector<float>> got = {run(*layer, call, n, pool),
                                                   run(*layer, with_gelu, n, pool),
                                                   run(*layer, with_residual, n, pool, old)};
      expect_near(got[0], plain);
      expect_near(got[1], gelu);
      expect_near(got[2], residual);
      for (size_t i = 0; i < 3; ++i) {
        if (firsts[i].empty()) firsts[i] = got[i];
        EXPECT(same_bits(got[i], firsts[i]));
      }
    }
  }
}

TEST("packed bytes stay below 4.25 bits a weight plus padding") {
  std::mt19937 rng(8);
  cpu::ThreadPool pool(2);
  const std::vector<AwqPart> parts = {AwqPart(rng, 896, 512, 128, DType::f16, false)};
  const auto layer = cpu::pack_linear(awq_source(parts), cpu::best_isa(), pool);
  EXPECT(static_cast<double>(layer->bytes()) * 8 <= 4.25 * 896 * 512);
  EXPECT_EQ(layer->in_features(), 896);
  EXPECT_EQ(layer->out_features(), 512);
}

TEST("wrong shapes, types and group sizes are typed errors") {
  std::mt19937 rng(9);
  cpu::ThreadPool pool(1);
  const std::vector<AwqPart> parts = {AwqPart(rng, 128, 32, 64, DType::f16, true)};
  const auto broken = [&](auto&& change) {
    LinearSource source = awq_source(parts);
    change(source);
    return cpu::pack_linear(source, cpu::best_isa(), pool);
  };
  EXPECT_ERROR(broken([](LinearSource& s) { s.group_size = 48; }),
               ErrorCode::unsupported_quantization);
  EXPECT_ERROR(broken([](LinearSource& s) { s.group_size = 0; }),
               ErrorCode::unsupported_quantization);
  EXPECT_ERROR(broken([](LinearSource& s) { s.in_features = 96; }), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts.clear(); }), ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].qweight.shape[1] = 5; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].qzeros.shape[0] = 3; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].scales.dtype = DType::i32; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].bias.shape[0] = 31; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.parts[0].out_features = 36; }),
               ErrorCode::tensor_mismatch);
  EXPECT_ERROR(broken([](LinearSource& s) { s.order = PartOrder::gate_up; }),
               ErrorCode::tensor_mismatch);
}

TEST_MAIN()
