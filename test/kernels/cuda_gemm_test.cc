// Every row of the GEMM table against a float64 product: kinds, group sizes, edge shapes, epilogues;
// and that a row of the result depends neither on M, nor on its place, nor on the run.
#include <algorithm>
#include <map>
#include <memory>

#include "backend/cuda/gemm/gemm_table.h"
#include "backend/cuda/kernels/kernels.h"
#include "gpu_test.h"

namespace {

using namespace turbomind;
using namespace turbomind::cuda;
using namespace turbomind::cuda::testing;

// Few shapes and small M, for runs under compute-sanitizer.
bool quick = false;

struct Shape {
  WeightKind kind;
  DType dtype;
  int n;
  int k;
  int group;
  bool gate_up;
};

// A matrix in the checkpoint's form, in the kernels' form, and as float64 rows in packed order.
struct Case {
  Shape shape;
  PackedMatrix matrix;
  std::vector<double> rows;  // [n, k], packed order
  std::unique_ptr<DeviceArray<uint32_t>> u4;
  std::unique_ptr<DeviceArray<uint32_t>> meta;
  std::unique_ptr<DeviceArray<uint16_t>> dense;
  std::unique_ptr<DeviceArray<float>> bias;
  std::vector<float> host_bias;
};

int packed_row(const Shape& shape, int part, int n) {
  return shape.gate_up ? 16 * (n / 8) + n % 8 + 8 * part : part * (shape.n / 2) + n;
}

Case make_case(const Shape& shape, uint32_t seed) {
  Random random(seed);
  Case c;
  c.shape = shape;
  PackedMatrix& m = c.matrix;
  m.kind = shape.kind;
  m.dtype = shape.dtype;
  m.n = shape.n;
  m.k = shape.k;
  m.n_padded = round_up<int64_t>(shape.n, kPackRows);
  m.k_padded = round_up<int64_t>(shape.k, shape.kind == WeightKind::awq ? kChunkColumns : kPackColumns);
  m.group_size = shape.group;
  m.gate_up = shape.gate_up;
  m.segments = choose_segments(shape.kind, shape.n, shape.k);
  c.rows.assign(static_cast<size_t>(shape.n) * shape.k, 0.0);
  const LaunchContext context = test_context();
  if (shape.kind == WeightKind::dense) {
    std::vector<uint16_t> padded(static_cast<size_t>(m.n_padded * m.k_padded), 0);
    for (int n = 0; n < shape.n; ++n) {
      for (int k = 0; k < shape.k; ++k) {
        const uint16_t bits = to_bits(random.normal(0.05F), shape.dtype);
        padded[n * m.k_padded + k] = bits;
        c.rows[static_cast<size_t>(n) * shape.k + k] = from_bits(bits, shape.dtype);
      }
    }
    c.dense = std::make_unique<DeviceArray<uint16_t>>(padded);
    m.weights = c.dense->get();
  } else {
    // Two parts of n / 2, in AutoAWQ's packing, every nibble random.
    AwqPackArgs args;
    args.num_parts = 2;
    args.scale_type = DType::f16;
    const int part_n = shape.n / 2;
    const int groups = shape.k / shape.group;
    std::vector<std::unique_ptr<DeviceArray<uint32_t>>> words;
    std::vector<std::unique_ptr<DeviceArray<uint16_t>>> scales;
    for (int part = 0; part < 2; ++part) {
      std::vector<uint32_t> qweight(static_cast<size_t>(shape.k) * part_n / 8);
      std::vector<uint32_t> qzeros(static_cast<size_t>(groups) * part_n / 8);
      std::vector<uint16_t> scale(static_cast<size_t>(groups) * part_n);
      for (uint32_t& word : qweight) word = random.bits();
      for (uint32_t& word : qzeros) word = random.bits();
      for (uint16_t& bits : scale) bits = to_bits(0.002F + 0.01F * (random.below(1000) / 1000.0F), DType::f16);
      const auto nibble = [&](const std::vector<uint32_t>& array, int line, int n) {
        const uint32_t word = array[static_cast<size_t>(line) * (part_n / 8) + n / 8];
        const int p = static_cast<int>(std::find(kAwqColumnOfNibble, kAwqColumnOfNibble + 8, n % 8) -
                                       kAwqColumnOfNibble);
        return static_cast<int>((word >> (4 * p)) & 15U);
      };
      for (int n = 0; n < part_n; ++n) {
        for (int k = 0; k < shape.k; ++k) {
          const int g = k / shape.group;
          // One rounding to the activations' type, of the scale first and then of the weight.
          const float s = from_bits(scale[static_cast<size_t>(g) * part_n + n], DType::f16);
          const float weight = static_cast<float>(nibble(qweight, k, n) - nibble(qzeros, g, n)) *
                               from_bits(to_bits(s, shape.dtype), shape.dtype);
          c.rows[static_cast<size_t>(packed_row(shape, part, n)) * shape.k + k] =
              from_bits(to_bits(weight, shape.dtype), shape.dtype);
        }
      }
      words.push_back(std::make_unique<DeviceArray<uint32_t>>(qweight));
      words.push_back(std::make_unique<DeviceArray<uint32_t>>(qzeros));
      scales.push_back(std::make_unique<DeviceArray<uint16_t>>(scale));
      args.parts[part] = {words[2 * part]->get(), words[2 * part + 1]->get(), scales[part]->get(), part_n,
                          part * part_n};
    }
    c.u4 = std::make_unique<DeviceArray<uint32_t>>(static_cast<size_t>(m.n_padded * m.k_padded / 8));
    c.meta = std::make_unique<DeviceArray<uint32_t>>(static_cast<size_t>(m.n_padded * (m.k_padded / shape.group)));
    m.weights = c.u4->get();
    m.meta = c.meta->get();
    args.matrix = m;
    args.weights = c.u4->get();
    args.meta = c.meta->get();
    pack_awq(context, args);
    cuda_check(cudaDeviceSynchronize());
  }
  c.host_bias = random.floats(static_cast<size_t>(m.n_padded), 0.3F);
  c.bias = std::make_unique<DeviceArray<float>>(c.host_bias);
  return c;
}

struct Workspace {
  DeviceArray<float> partials{size_t{8} << 20};
  DeviceArray<uint32_t> tickets{4096};
  Workspace() { tickets.zero(); }
};
Workspace& workspace() {
  static Workspace w;
  return w;
}

GemmArgs gemm_args(const Case& c, const void* x, int64_t ldx, int m, void* y, bool y_is_f32, Epilogue epilogue) {
  return {.w = &c.matrix,
          .x = x,
          .ldx = ldx,
          .m = m,
          .y = y,
          .ldy = epilogue == Epilogue::silu_mul ? c.shape.n / 2 : c.shape.n,
          .y_is_f32 = y_is_f32,
          .epilogue = epilogue,
          .partials = workspace().partials.get(),
          .partial_floats = workspace().partials.size(),
          .tickets = workspace().tickets.get(),
          .num_tickets = workspace().tickets.size()};
}

std::vector<double> product(const Case& c, const std::vector<float>& x, int m) {
  std::vector<double> y(static_cast<size_t>(m) * c.shape.n);
  for (int t = 0; t < m; ++t) {
    for (int n = 0; n < c.shape.n; ++n) {
      const double* row = c.rows.data() + static_cast<size_t>(n) * c.shape.k;
      const float* token = x.data() + static_cast<size_t>(t) * c.shape.k;
      double sum = 0;
      for (int k = 0; k < c.shape.k; ++k) sum += row[k] * token[k];
      y[static_cast<size_t>(t) * c.shape.n + n] = sum;
    }
  }
  return y;
}

// Rows of the table that fit this shape on this device.
std::vector<std::string_view> fitting_rows(const GemmArgs& args, const LaunchContext& context) {
  std::vector<std::string_view> names;
  for (const GemmKernel& row : gemm_table()) {
    if (context.sm >= row.min_sm && context.sm <= row.max_sm && row.supports(args, context)) {
      names.push_back(row.name);
    }
  }
  return names;
}

const Shape kAllShapes[] = {
    {WeightKind::awq, DType::bf16, 192, 128, 128, false},
    {WeightKind::awq, DType::bf16, 336, 1152, 128, false},  // N not of 64, K of 9 groups
    {WeightKind::awq, DType::bf16, 400, 320, 64, false},    // K not of 128
    {WeightKind::awq, DType::bf16, 128, 96, 32, false},
    {WeightKind::awq, DType::f16, 320, 640, 128, false},
    {WeightKind::awq, DType::f16, 192, 512, 32, false},
    {WeightKind::awq, DType::f16, 256, 448, 64, false},
    {WeightKind::awq, DType::bf16, 352, 2048, 128, true},
    {WeightKind::awq, DType::bf16, 320, 4224, 128, false},  // four segments of 8 and 9 chunks
    {WeightKind::awq, DType::bf16, 192, 16512, 128, false},  // a long K
    {WeightKind::awq, DType::f16, 20608, 256, 128, true},    // one segment, more tiles than SMs
    {WeightKind::awq, DType::bf16, 48128, 128, 128, true},   // one round of 448 rows, the last not whole
    {WeightKind::awq, DType::bf16, 7168, 1152, 128, false},  // four segments in one round of 256 rows
    {WeightKind::awq, DType::f16, 2304, 640, 128, false},    // two segments, more rows than SMs
    {WeightKind::dense, DType::bf16, 192, 64, 0, false},
    {WeightKind::dense, DType::bf16, 330, 1096, 0, false},  // N and K off every tile
    {WeightKind::dense, DType::f16, 256, 2048, 0, false},
    {WeightKind::dense, DType::f16, 200, 72, 0, false},
    {WeightKind::dense, DType::bf16, 352, 4096, 0, true},
};
const Shape kQuickShapes[] = {
    {WeightKind::awq, DType::bf16, 192, 1024, 128, false},
    {WeightKind::awq, DType::f16, 144, 256, 64, true},
    {WeightKind::dense, DType::bf16, 136, 192, 0, false},
};
std::span<const Shape> shapes() {
  return quick ? std::span<const Shape>(kQuickShapes) : std::span<const Shape>(kAllShapes);
}
std::vector<int> tokens() {
  if (quick) return {1, 9, 65, 130, 257};
  return {1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 127, 128, 130, 257, 515};
}
constexpr int kMaxTokens = 515;

TEST("each GEMM row equals the float64 product within f32 rounding, at every M") {
  const LaunchContext context = test_context();
  std::map<std::string, double> worst;
  for (const Shape& shape : shapes()) {
    const Case c = make_case(shape, 11);
    Random random(12);
    const std::vector<uint16_t> bits = random.half(static_cast<size_t>(kMaxTokens) * shape.k, shape.dtype);
    const std::vector<double> reference = product(c, to_floats(bits, shape.dtype), kMaxTokens);
    const DeviceArray<uint16_t> x(bits);
    DeviceArray<float> y(static_cast<size_t>(kMaxTokens) * shape.n);
    for (const std::string_view name : fitting_rows(gemm_args(c, x.get(), shape.k, 1, y.get(), true, Epilogue::none), context)) {
      for (int m : tokens()) {
        y.poison();
        const GemmArgs args = gemm_args(c, x.get(), shape.k, m, y.get(), true, Epilogue::none);
        select_gemm(args, context, name).run(args, context);
        const std::vector<float> out = y.host();
        const std::vector<double> expected(reference.begin(), reference.begin() + static_cast<int64_t>(m) * shape.n);
        const double error = relative_error(out, expected);
        worst[std::string(name)] = std::max(worst[std::string(name)], error);
        const bool ok = error < kToleranceF32;
        turbomind::test::report(ok, "relative error", __FILE__, __LINE__,
                                format("%s kind %d %s N %d K %d g %d M %d: %g", std::string(name).c_str(),
                                       static_cast<int>(shape.kind), to_string(shape.dtype).data(), shape.n,
                                       shape.k, shape.group, m, error));
        // Nothing beyond row m may have been written.
        if (m < kMaxTokens) EXPECT(std::isnan(out[static_cast<size_t>(m) * shape.n]));
      }
    }
  }
  for (const auto& [name, error] : worst) std::printf("    %s: worst relative error %.2e\n", name.c_str(), error);
}

TEST("a row of a GEMM is the same bits at every M, at every place and in every run") {
  const LaunchContext context = test_context();
  for (const Shape& shape : shapes()) {
    const Case c = make_case(shape, 21);
    Random random(22);
    const std::vector<uint16_t> bits = random.half(static_cast<size_t>(kMaxTokens) * shape.k, shape.dtype);
    const DeviceArray<uint16_t> x(bits);
    DeviceArray<float> y(static_cast<size_t>(kMaxTokens) * shape.n);
    const auto names = fitting_rows(gemm_args(c, x.get(), shape.k, 1, y.get(), true, Epilogue::none), context);
    std::vector<float> of_first_row;
    for (const std::string_view name : names) {
      const auto run = [&](int first, int m) {
        y.poison();
        const GemmArgs args = gemm_args(c, x.get() + static_cast<size_t>(first) * shape.k, shape.k, m, y.get(), true, Epilogue::none);
        select_gemm(args, context, name).run(args, context);
        return y.host();
      };
      const std::vector<float> whole = run(0, kMaxTokens);
      const size_t row_bytes = static_cast<size_t>(shape.n) * sizeof(float);
      bool same = std::memcmp(run(0, kMaxTokens).data(), whole.data(), whole.size() * sizeof(float)) == 0;
      for (const auto& [first, m] : {std::pair{0, 1}, {5, 1}, {7, 2}, {200, 8}, {100, 16}, {31, 32}, {64, 64}, {99, 65}, {256, 1}, {300, 200}}) {
        const std::vector<float> part = run(first, m);
        for (int t = 0; t < m; ++t) {
          same = same && std::memcmp(part.data() + static_cast<size_t>(t) * shape.n,
                                     whole.data() + static_cast<size_t>(first + t) * shape.n, row_bytes) == 0;
        }
      }
      turbomind::test::report(same, "bitwise equal", __FILE__, __LINE__,
                              format("%s kind %d N %d K %d g %d", std::string(name).c_str(), static_cast<int>(shape.kind),
                                     shape.n, shape.k, shape.group));
    }
  }
}

TEST("wgmma and mma.sync rows give the same bits, so that M may choose between them") {
  const LaunchContext context = test_context();
  for (const Shape& shape : shapes()) {
    const Case c = make_case(shape, 31);
    Random random(32);
    const std::vector<uint16_t> bits = random.half(static_cast<size_t>(64) * shape.k, shape.dtype);
    const DeviceArray<uint16_t> x(bits);
    DeviceArray<float> y(static_cast<size_t>(64) * shape.n);
    std::map<std::string, std::vector<float>> results;
    for (const std::string_view name : fitting_rows(gemm_args(c, x.get(), shape.k, 1, y.get(), true, Epilogue::none), context)) {
      const GemmArgs args = gemm_args(c, x.get(), shape.k, 64, y.get(), true, Epilogue::none);
      select_gemm(args, context, name).run(args, context);
      results[std::string(name)] = y.host();
    }
    const std::string base = shape.kind == WeightKind::awq ? "u4_sm80" : "dense_sm80";
    for (const auto& [name, values] : results) {
      if (name == base || name == "naive") continue;
      size_t different = 0;
      for (size_t i = 0; i < values.size(); ++i) different += values[i] != results[base][i] ? 1 : 0;
      turbomind::test::report(different == 0, "same bits", __FILE__, __LINE__,
                              format("N %d K %d: %s differs from %s in %zu of %zu", shape.n, shape.k, name.c_str(),
                                     base.c_str(), different, values.size()));
    }
    EXPECT(results.size() >= 2);
  }
}

// More tiles than CTAs, K in segments: whole tiles first, then tiles whose segments a cluster shares, more
// than one a cluster where few fit.
TEST("tiles that CTAs compute alone and tiles that clusters share give the same bits") {
  if (quick) return;
  const LaunchContext context = test_context();
  // The long one in row tiles of two heights at 129 to 256 tokens.
  for (const auto& [n, k] : {std::pair{5120, 2048}, {4992, 8192}}) {
    const Case c = make_case({WeightKind::awq, DType::bf16, n, k, 128, false}, 35);
    EXPECT_EQ(c.matrix.segments, 4);
    Random random(36);
    for (const int m : {128, 129, 256, 400, 1024}) {
      if (k > 4096 && m > 256) continue;
      const DeviceArray<uint16_t> x(random.half(static_cast<size_t>(m) * k, DType::bf16));
      DeviceArray<float> y(static_cast<size_t>(m) * n);
      const GemmArgs args = gemm_args(c, x.get(), k, m, y.get(), true, Epilogue::none);
      std::vector<std::vector<float>> results;
      for (const std::string_view name : fitting_rows(args, context)) {
        if (name == "naive") continue;
        y.poison();
        select_gemm(args, context, name).run(args, context);
        results.push_back(y.host());
        EXPECT(std::memcmp(results[0].data(), results.back().data(), y.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST("epilogues: bias, gelu, residual with scale, silu_mul") {
  const LaunchContext context = test_context();
  for (const Shape& shape : shapes()) {
    Case c = make_case(shape, 41);
    c.matrix.bias = c.bias->get();
    for (const int m : {2, 12, 70}) {
      Random random(42);
      const std::vector<uint16_t> bits = random.half(static_cast<size_t>(m) * shape.k, shape.dtype, 0.5F);
      const std::vector<double> plain = product(c, to_floats(bits, shape.dtype), m);
      const DeviceArray<uint16_t> x(bits);
      const std::vector<float> scale = random.floats(static_cast<size_t>(shape.n), 0.5F);
      const DeviceArray<float> device_scale(scale);
      const std::vector<uint16_t> old_bits = random.half(static_cast<size_t>(m) * shape.n, shape.dtype);
      const std::vector<float> old = to_floats(old_bits, shape.dtype);
      std::vector<Epilogue> kinds = {Epilogue::none, Epilogue::gelu, Epilogue::residual};
      if (shape.gate_up) kinds = {Epilogue::silu_mul};
      for (const Epilogue kind : kinds) {
        const int out_n = shape.gate_up ? shape.n / 2 : shape.n;
        std::vector<double> expected(static_cast<size_t>(m) * out_n);
        for (int t = 0; t < m; ++t) {
          for (int n = 0; n < out_n; ++n) {
            const auto at = [&](int row) { return plain[static_cast<size_t>(t) * shape.n + row] + c.host_bias[row]; };
            double value = 0;
            if (shape.gate_up) {
              const double gate = at(packed_row(shape, 0, n));
              value = gate / (1 + std::exp(-gate)) * at(packed_row(shape, 1, n));
            } else {
              value = at(n);
              if (kind == Epilogue::gelu) value = 0.5 * value * (1 + std::erf(value / std::sqrt(2.0)));
              if (kind == Epilogue::residual) value = old[static_cast<size_t>(t) * shape.n + n] + scale[n] * value;
            }
            expected[static_cast<size_t>(t) * out_n + n] = value;
          }
        }
        for (const std::string_view name : fitting_rows(gemm_args(c, x.get(), shape.k, m, nullptr, false, kind), context)) {
          const DeviceArray<uint16_t> y(old_bits);
          GemmArgs args = gemm_args(c, x.get(), shape.k, m, y.get(), false, kind);
          args.scale = kind == Epilogue::residual ? device_scale.get() : nullptr;
          select_gemm(args, context, name).run(args, context);
          std::vector<uint16_t> out = y.host();
          out.resize(expected.size());
          const double error = relative_error(to_floats(out, shape.dtype), expected);
          turbomind::test::report(error < tolerance_rounded(shape.dtype), "epilogue", __FILE__, __LINE__,
                                  format("%s epilogue %d N %d K %d: %g", std::string(name).c_str(), static_cast<int>(kind),
                                         shape.n, shape.k, error));
        }
      }
    }
  }
}

// What split_norm.cuh defines, on the host. x [m, columns] as floats of 16-bit values.
struct HostSplitNorm {
  std::vector<uint16_t> z;
  std::vector<float> strips;
  HostSplitNorm(const std::vector<float>& x, const std::vector<float>& weight, float inverse_peak, DType dtype, size_t width)
      : z(x.size()), strips(x.size() / width) {
    for (size_t i = 0; i < x.size(); ++i) z[i] = to_bits(x[i] * (weight[i % weight.size()] * inverse_peak), dtype);
    for (size_t strip = 0; strip < strips.size(); ++strip) {
      std::vector<float> tree(x.begin() + static_cast<int64_t>(strip * width),
                              x.begin() + static_cast<int64_t>((strip + 1) * width));
      for (float& value : tree) value *= value;
      for (size_t count = width; count > 1; count /= 2) {
        for (size_t i = 0; i < count / 2; ++i) tree[i] = tree[2 * i] + tree[2 * i + 1];
      }
      strips[strip] = tree[0];
    }
  }
};

std::vector<float> norm_weights(Random& random, int columns) {
  std::vector<float> weight = random.floats(static_cast<size_t>(columns), 0.4F, 1.0F);
  weight[static_cast<size_t>(columns) / 3] = -7.5F;  // the peak is 8
  return weight;
}

std::vector<int> split_tokens() {
  if (quick) return {1, 9, 65, 130};
  return {1, 2, 3, 7, 8, 9, 16, 17, 24, 32, 33, 50, 63, 64, 65, 101, 127, 128, 130, 200, 256, 257, 300};
}

TEST("residual epilogues leave z and strip sums, the same bits from every kernel, and y as without") {
  const LaunchContext context = test_context();
  constexpr int kMost = 300;
  int shapes_run = 0;
  for (const Shape& shape : shapes()) {
    if (shape.gate_up || shape.n % kWideStrip != 0) continue;
    ++shapes_run;
    Case c = make_case(shape, 61);
    c.matrix.bias = c.bias->get();
    Random random(62);
    const DeviceArray<uint16_t> x(random.half(static_cast<size_t>(kMost) * shape.k, shape.dtype, 0.5F));
    const std::vector<uint16_t> old = random.half(static_cast<size_t>(kMost) * shape.n, shape.dtype, 2.0F);
    const std::vector<float> weight = norm_weights(random, shape.n);
    const DeviceArray<float> d_weight(weight);
    const DeviceArray<float> scale(random.floats(static_cast<size_t>(shape.n), 0.5F));
    DeviceArray<uint16_t> z(old.size());
    DeviceArray<float> strips(old.size() / kNarrowStrip);
    for (const std::string_view name : fitting_rows(gemm_args(c, x.get(), shape.k, 1, nullptr, false, Epilogue::residual), context)) {
      for (int m : split_tokens()) {
        std::vector<uint16_t> y[2];
        z.poison();
        strips.poison();
        for (const bool split : {false, true}) {
          const DeviceArray<uint16_t> device(old);
          GemmArgs args = gemm_args(c, x.get(), shape.k, m, device.get(), false, Epilogue::residual);
          args.scale = m % 2 == 0 ? scale.get() : nullptr;
          if (split) {
            args.next_norm = {.weight = d_weight.get(), .inverse_peak = 0.125F, .z = z.get(), .strips = strips.get(), .strip_columns = strip_columns(shape.kind, m)};
          }
          select_gemm(args, context, name).run(args, context);
          y[split] = device.host();
        }
        const size_t cells = static_cast<size_t>(m) * shape.n;
        std::vector<uint16_t> written(y[1].begin(), y[1].begin() + static_cast<int64_t>(cells));
        const HostSplitNorm expected(to_floats(written, shape.dtype), weight, 0.125F, shape.dtype, strip_columns(shape.kind, m));
        const std::vector<uint16_t> z_bits = z.host();
        const std::vector<float> sums = strips.host();
        const bool same = y[0] == y[1] && std::equal(expected.z.begin(), expected.z.end(), z_bits.begin()) &&
                          std::equal(expected.strips.begin(), expected.strips.end(), sums.begin());
        // Rows past m were left alone.
        const bool inside = m == kMost || (z_bits[cells] == 0xffff && std::isnan(sums[expected.strips.size()]));
        turbomind::test::report(same && inside, "z and strips", __FILE__, __LINE__,
                                format("%s kind %d N %d K %d M %d: y %d, inside %d", std::string(name).c_str(), static_cast<int>(shape.kind),
                                       shape.n, shape.k, m, y[0] == y[1], inside));
      }
    }
  }
  EXPECT(shapes_run >= 1);
}

TEST("products of z are those of the norm, folded by each CTA or before, the same bits at every M") {
  const LaunchContext context = test_context();
  constexpr int kMost = 300;
  constexpr float kEps = 1e-5F;
  int shapes_run = 0;
  for (const Shape& shape : shapes()) {
    if (shape.k % kWideStrip != 0) continue;
    ++shapes_run;
    Case c = make_case(shape, 71);
    c.matrix.bias = c.bias->get();
    Random random(72);
    const std::vector<uint16_t> bits = random.half(static_cast<size_t>(kMost) * shape.k, shape.dtype, 3.0F);
    const std::vector<float> x = to_floats(bits, shape.dtype);
    const std::vector<float> weight = norm_weights(random, shape.k);
    const HostSplitNorm split(x, weight, 0.125F, shape.dtype, kWideStrip);
    const HostSplitNorm narrow(x, weight, 0.125F, shape.dtype, kNarrowStrip);
    std::vector<float> normed(x.size());
    for (int t = 0; t < kMost; ++t) {
      double squares = 0;
      for (int k = 0; k < shape.k; ++k) squares += std::pow(x[static_cast<size_t>(t) * shape.k + k], 2);
      const double factor = 1.0 / std::sqrt(squares / shape.k + kEps);
      for (int k = 0; k < shape.k; ++k) {
        const size_t i = static_cast<size_t>(t) * shape.k + k;
        normed[i] = static_cast<float>(x[i] * factor * weight[static_cast<size_t>(k)]);
      }
    }
    const int checked = 70;
    const std::vector<double> plain = product(c, normed, checked);
    const Epilogue kind = shape.gate_up ? Epilogue::silu_mul : Epilogue::none;
    const int out_n = shape.gate_up ? shape.n / 2 : shape.n;
    std::vector<double> expected(static_cast<size_t>(checked) * out_n);
    for (int t = 0; t < checked; ++t) {
      for (int n = 0; n < out_n; ++n) {
        const auto at = [&](int row) { return plain[static_cast<size_t>(t) * shape.n + row] + c.host_bias[row]; };
        const double gate = at(packed_row(shape, 0, n));
        expected[static_cast<size_t>(t) * out_n + n] = shape.gate_up ? gate / (1 + std::exp(-gate)) * at(packed_row(shape, 1, n)) : at(n);
      }
    }
    const DeviceArray<uint16_t> z(split.z);
    const DeviceArray<float> wide_strips(split.strips), narrow_strips(narrow.strips);
    DeviceArray<float> scales(kMost), narrow_scales(kMost), y(static_cast<size_t>(kMost) * shape.n);
    DeviceArray<uint16_t> rounded(static_cast<size_t>(kMost) * shape.n);
    const InputNorm norm{.strips = wide_strips.get(), .strip_columns = kWideStrip, .columns = shape.k, .inverse_columns = 1.0F / static_cast<float>(shape.k), .peak = 8.0F, .eps = kEps};
    fold_strips(context, norm, scales.get(), kMost);
    InputNorm narrow_norm = norm;
    narrow_norm.strips = narrow_strips.get();
    narrow_norm.strip_columns = kNarrowStrip;
    fold_strips(context, narrow_norm, narrow_scales.get(), kMost);
    EXPECT(scales.host() == narrow_scales.host());
    for (const std::string_view name : fitting_rows(gemm_args(c, z.get(), shape.k, 1, y.get(), true, kind), context)) {
      const auto run = [&](int first, int m, bool folded, const InputNorm& norm) {
        y.poison();
        GemmArgs args = gemm_args(c, z.get() + static_cast<size_t>(first) * shape.k, shape.k, m, y.get(), true, kind);
        args.input_norm = norm;
        args.input_norm.strips += static_cast<size_t>(first) * (shape.k / norm.strip_columns);
        if (folded) args.input_norm.scales = scales.get() + first;
        select_gemm(args, context, name).run(args, context);
        return y.host();
      };
      const std::vector<float> whole = run(0, kMost, true, norm);
      const double error = relative_error(whole, expected);
      const auto is_end = [&](const std::vector<float>& part, int m) {
        return std::memcmp(part.data(), whole.data() + static_cast<size_t>(kMost - m) * out_n, static_cast<size_t>(m) * out_n * sizeof(float)) == 0;
      };
      bool same = true;
      for (int m : split_tokens()) {
        const InputNorm& left = strip_columns(shape.kind, m) == kWideStrip ? norm : narrow_norm;
        for (const bool folded : {false, true}) same = same && is_end(run(kMost - m, m, folded, left), m);
      }
      // Kernels that do not go by the number of tokens take either width.
      if (name != "u4_sm90" && name != "dense_sm90") {
        for (int m : {5, 70}) same = same && is_end(run(kMost - m, m, false, norm), m) && is_end(run(kMost - m, m, false, narrow_norm), m);
      }
      // Rounded outputs end their tiles in other ways than f32 ones.
      for (int m : {17, 32, 50, 64, 101, 128, 300}) {
        if (quick && m != 101) continue;
        rounded.poison();
        GemmArgs args = gemm_args(c, z.get() + static_cast<size_t>(kMost - m) * shape.k, shape.k, m, rounded.get(), false, kind);
        args.input_norm = strip_columns(shape.kind, m) == kWideStrip ? norm : narrow_norm;
        args.input_norm.strips += static_cast<size_t>(kMost - m) * (shape.k / args.input_norm.strip_columns);
        select_gemm(args, context, name).run(args, context);
        const std::vector<uint16_t> part = rounded.host();
        const float* values = whole.data() + static_cast<size_t>(kMost - m) * out_n;
        const size_t cells = static_cast<size_t>(m) * out_n;
        for (size_t i = 0; i < cells; ++i) same = same && part[i] == to_bits(values[i], shape.dtype);
        same = same && (cells == part.size() || part[cells] == 0xffff);
      }
      turbomind::test::report(same && error < tolerance_rounded(shape.dtype), "split norm", __FILE__, __LINE__,
                              format("%s kind %d N %d K %d: same bits %d, error %g", std::string(name).c_str(), static_cast<int>(shape.kind),
                                     shape.n, shape.k, same, error));
    }
  }
  EXPECT(shapes_run >= 1);
}

TEST("K segments are a pure function of the shape") {
  EXPECT_EQ(choose_segments(WeightKind::awq, 7168, 5120), 4);
  EXPECT_EQ(choose_segments(WeightKind::awq, 5120, 5120), 4);
  EXPECT_EQ(choose_segments(WeightKind::awq, 55296, 5120), 1);
  EXPECT_EQ(choose_segments(WeightKind::awq, 5120, 27648), 4);
  EXPECT_EQ(choose_segments(WeightKind::awq, 2560, 2048), 4);
  EXPECT_EQ(choose_segments(WeightKind::awq, 22016, 2048), 1);
  EXPECT_EQ(choose_segments(WeightKind::awq, 64, 512), 2);
  EXPECT_EQ(choose_segments(WeightKind::awq, 64, 384), 1);
  EXPECT_EQ(choose_segments(WeightKind::dense, 1024, 4096), 1);
  EXPECT_EQ(choose_segments(WeightKind::dense, 3584, 18944), 4);
  EXPECT_EQ(choose_segments(WeightKind::dense, 151674, 2048), 1);
}

}  // namespace

// `cuda_gemm_test quick` for compute-sanitizer; `cuda_gemm_test - WORD` for the cases with this in their name.
int main(int argc, char** argv) {
  quick = argc > 1 && std::string_view(argv[1]) == "quick";
  require_device();
  if (argc > 2) {
    std::erase_if(turbomind::test::cases(), [&](const auto& test) { return std::string_view(test.name).find(argv[2]) == std::string_view::npos; });
  }
  return turbomind::test::run_all();
}
