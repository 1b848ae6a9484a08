// The head: screened answers equal the full-precision head's, bit for bit.
#include <algorithm>
#include <limits>
#include <span>

#include "linear_fixture.h"
#include "test.h"

using namespace turbomind;
using namespace turbomind::test;

namespace {

struct HeadCase {
  int64_t v, h;
  FloatArray weight;
  HeadCase(std::mt19937& rng, int64_t v_, int64_t h_, DType type)
      : v(v_), h(h_), weight(type, random_floats(rng, v_ * h_, 0.03F)) {}
  LinearSource source() const {
    LinearSource s;
    s.name = "lm_head";
    s.in_features = h;
    LinearPart part;
    part.out_features = v;
    part.weight = {weight.data(), weight.dtype, {v, h}};
    s.parts.push_back(part);
    return s;
  }
};

std::vector<float> all_logits(const cpu::PackedHead& head, const std::vector<float>& x,
                              int64_t rows, cpu::ThreadPool& pool) {
  std::vector<float> y(static_cast<size_t>(rows * head.out_features()));
  Scratch64 scratch(head.scratch_bytes(rows));
  head.logits(x.data(), rows, y.data(), scratch.data, pool);
  return y;
}

std::vector<float> best(const cpu::PackedHead& head, const std::vector<float>& x, int64_t rows,
                        int k, float margin, cpu::ThreadPool& pool) {
  std::vector<float> y(static_cast<size_t>(rows * head.out_features()));
  Scratch64 scratch(head.scratch_bytes(rows));
  head.best_logits(x.data(), rows, k, margin, y.data(), scratch.data, pool);
  return y;
}

// Entries that must be exact are; the others are exact or below all of those. Counts the exact
// ones.
int64_t expect_contract(std::span<const float> got, std::span<const float> exact, int k,
                        float margin) {
  std::vector<float> sorted(exact.begin(), exact.end());
  std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<float>());
  const float least = sorted[static_cast<size_t>(k - 1)] - margin;
  int64_t wrong = 0, scored = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (exact[i] >= least && got[i] != exact[i]) ++wrong;
    if (got[i] != exact[i] && !(got[i] < least)) ++wrong;
    if (got[i] == exact[i]) ++scored;
  }
  EXPECT_EQ(wrong, 0);
  return scored;
}

}  // namespace

TEST("logits agree with float64 and have the same bits on all instruction sets and thread counts") {
  std::mt19937 rng(21);
  for (DType type : {DType::f32, DType::f16, DType::bf16}) {
    const HeadCase c(rng, 301, 77, type);
    const std::vector<float> x = random_floats(rng, 3 * c.h, 2.0F);
    std::vector<float> first;
    for (cpu::Isa isa : isas()) {
      for (int threads : {1, 3}) {
        cpu::ThreadPool pool(threads);
        const auto head = cpu::pack_head(c.source(), isa, pool);
        const std::vector<float> y = all_logits(*head, x, 3, pool);
        if (first.empty()) first = y;
        EXPECT(same_bits(y, first));
      }
    }
    for (int64_t i = 0; i < 3 * c.v; ++i) {
      double want = 0;
      for (int64_t j = 0; j < c.h; ++j) {
        want += static_cast<double>(c.weight.values[static_cast<size_t>(i % c.v * c.h + j)]) *
                x[static_cast<size_t>(i / c.v * c.h + j)];
      }
      EXPECT_NEAR(first[static_cast<size_t>(i)], want, 3e-6);
    }
  }
}

TEST("screening loses nothing: random rows, all k and margins, all instruction sets") {
  std::mt19937 rng(22);
  for (DType type : {DType::bf16, DType::f32}) {
    // Above the size from which rows are screened; 130 and 192: odd, and whole tiles.
    const HeadCase c(rng, 33001, type == DType::bf16 ? 130 : 192, type);
    const std::vector<float> x = random_floats(rng, 5 * c.h, 1.5F);
    for (cpu::Isa isa : isas()) {
      cpu::ThreadPool pool(2);
      const auto head = cpu::pack_head(c.source(), isa, pool);
      const std::vector<float> exact = all_logits(*head, x, 5, pool);
      for (int k : {1, 2, 50}) {
        if (isa == cpu::Isa::scalar && k == 50) continue;
        for (float margin : {0.0F, 0.5F}) {
          const std::vector<float> got = best(*head, x, 5, k, margin, pool);
          for (int64_t r = 0; r < 5; ++r) {
            const int64_t scored = expect_contract(
                std::span(got).subspan(static_cast<size_t>(r * c.v), static_cast<size_t>(c.v)),
                std::span(exact).subspan(static_cast<size_t>(r * c.v), static_cast<size_t>(c.v)), k,
                margin);
            EXPECT(scored >= k);
            if (k == 1 && margin == 0.0F) EXPECT(scored < c.v / 50);  // else it is no screening
          }
          // A row's answer does not depend on its batch.
          const std::vector<float> alone =
              best(*head, {x.begin() + 3 * c.h, x.begin() + 4 * c.h}, 1, k, margin, pool);
          EXPECT(same_bits(alone, {got.begin() + 3 * c.v, got.begin() + 4 * c.v}));
        }
      }
    }
  }
}

TEST("adversaries: near ties, one huge outlier, rows of zeros, x of zeros, NaN") {
  std::mt19937 rng(23);
  HeadCase c(rng, 33000, 128, DType::f32);
  std::vector<float>& w = c.weight.values;
  // Rows 100..199 are copies of row 7 but for one last-bit change: screening cannot tell them
  // apart.
  for (int64_t n = 100; n < 200; ++n) {
    std::copy_n(w.begin() + 7 * c.h, c.h, w.begin() + n * c.h);
    float& last = w[static_cast<size_t>(n * c.h + n - 100)];
    last = std::nextafter(last, 10.0F);
  }
  std::fill_n(w.begin() + 300 * c.h, c.h, 0.0F);
  w[static_cast<size_t>(301 * c.h)] = 50.0F;  // its other weights vanish in 6 bits
  std::vector<float> x(static_cast<size_t>(4 * c.h), 0.0F);
  for (int64_t i = 0; i < c.h; ++i)
    x[static_cast<size_t>(i)] = 4.0F * w[static_cast<size_t>(7 * c.h + i)];
  for (int64_t i = 0; i < c.h; ++i)
    x[static_cast<size_t>(c.h + i)] =
        w[static_cast<size_t>(301 * c.h + i)] * (i == 0 ? 1e-6F : 1.0F);
  x[static_cast<size_t>(3 * c.h + 5)] = std::nanf("");
  cpu::ThreadPool pool(2);
  for (cpu::Isa isa : isas()) {
    const auto head = cpu::pack_head(c.source(), isa, pool);
    const std::vector<float> exact = all_logits(*head, x, 4, pool);
    for (int k : {1, 5}) {
      const std::vector<float> got = best(*head, x, 4, k, 0.0F, pool);
      for (int64_t r = 0; r < 3; ++r) {
        expect_contract(
            std::span(got).subspan(static_cast<size_t>(r * c.v), static_cast<size_t>(c.v)),
            std::span(exact).subspan(static_cast<size_t>(r * c.v), static_cast<size_t>(c.v)), k,
            0.0F);
      }
      EXPECT(std::isnan(got[static_cast<size_t>(3 * c.v)]));
    }
  }
}

TEST("a head of another kind or shape is a typed error") {
  std::mt19937 rng(24);
  cpu::ThreadPool pool(1);
  const HeadCase c(rng, 16, 8, DType::bf16);
  LinearSource two = c.source();
  two.parts.push_back(two.parts[0]);
  EXPECT_ERROR(cpu::pack_head(two, cpu::best_isa(), pool), ErrorCode::unsupported_quantization);
  LinearSource wrong = c.source();
  wrong.in_features = 9;
  EXPECT_ERROR(cpu::pack_head(wrong, cpu::best_isa(), pool), ErrorCode::tensor_mismatch);
  const std::vector<AwqPart> awq = {AwqPart(rng, 32, 8, 32, DType::f16, false)};
  EXPECT_ERROR(cpu::pack_head(awq_source(awq), cpu::best_isa(), pool),
               ErrorCode::unsupported_quantization);
}

TEST_MAIN()
