// Random layers for the linear tests and the benchmark: AWQ arrays with every nibble position
// filled, dense matrices, and their float64 products. Fixed seeds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "backend/cpu/kernels/float_formats.h"
#include "backend/cpu/packed_linear.h"

namespace turbomind::test {

inline uint16_t to_f16(float x) {  // round to nearest even; normal range only
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const int32_t exponent = static_cast<int32_t>((bits >> 23) & 255U) - 112;
  if (exponent <= 0) return static_cast<uint16_t>(sign);
  const uint32_t rounded =
      (static_cast<uint32_t>(exponent) << 23 | (bits & 0x7fffffU)) + 0xfffU + ((bits >> 13) & 1U);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

struct FloatArray {  // one of the three types, with its exact values beside
  DType dtype = DType::f32;
  std::vector<float> values;
  std::vector<uint16_t> half;
  FloatArray() = default;
  FloatArray(DType type, std::vector<float> wanted) : dtype(type), values(std::move(wanted)) {
    if (type == DType::f32) return;
    for (float& value : values) {
      half.push_back(type == DType::f16 ? to_f16(value) : cpu::f32_to_bf16(value));
      value = type == DType::f16 ? cpu::f16_to_f32(half.back()) : cpu::bf16_to_f32(half.back());
    }
  }
  const void* data() const {
    return dtype == DType::f32 ? static_cast<const void*>(values.data()) : half.data();
  }
};

inline std::vector<float> random_floats(std::mt19937& rng, int64_t count, float deviation) {
  std::normal_distribution<float> normal(0.0F, deviation);
  std::vector<float> out(static_cast<size_t>(count));
  for (float& x : out) x = normal(rng);
  return out;
}

// One part of an AWQ layer and its weights in float64 [N][K].
struct AwqPart {
  int64_t k, n;
  int group;
  std::vector<int32_t> qweight, qzeros;
  FloatArray scales, bias;
  std::vector<uint8_t> q, z;  // [K][N], [K / g][N]

  AwqPart(std::mt19937& rng, int64_t k_, int64_t n_, int group_, DType scale_type, bool with_bias)
      : k(k_), n(n_), group(group_) {
    q.resize(static_cast<size_t>(k * n));
    z.resize(static_cast<size_t>(k / group * n));
    for (uint8_t& x : q) x = rng() & 15U;
    for (uint8_t& x : z) x = rng() & 15U;
    qweight = pack(q);
    qzeros = pack(z);
    std::uniform_real_distribution<float> uniform(0.002F, 0.02F);
    std::vector<float> s(z.size());
    for (float& x : s) x = uniform(rng);
    scales = FloatArray(scale_type, std::move(s));
    if (with_bias) bias = FloatArray(DType::f16, random_floats(rng, n, 0.5F));
  }
  std::vector<int32_t> pack(const std::vector<uint8_t>& values) const {
    std::vector<int32_t> words(values.size() / 8);
    for (size_t w = 0; w < words.size(); ++w) {
      uint32_t word = 0;
      for (int p = 0; p < 8; ++p)
        word |= static_cast<uint32_t>(values[w * 8 + kAwqColumnOfNibble[p]]) << (4 * p);
      words[w] = static_cast<int32_t>(word);
    }
    return words;
  }
  double weight(int64_t column, int64_t i) const {
    const size_t at = static_cast<size_t>(i / group * n + column);
    return (q[static_cast<size_t>(i * n + column)] - z[at]) *
           static_cast<double>(scales.values[at]);
  }
  LinearPart view() const {
    LinearPart part;
    part.kind = WeightKind::awq;
    part.out_features = n;
    part.qweight = {qweight.data(), DType::i32, {k, n / 8}};
    part.qzeros = {qzeros.data(), DType::i32, {k / group, n / 8}};
    part.scales = {scales.data(), scales.dtype, {k / group, n}};
    if (!bias.values.empty()) part.bias = {bias.data(), bias.dtype, {n}};
    return part;
  }
};

inline LinearSource awq_source(const std::vector<AwqPart>& parts,
                               PartOrder order = PartOrder::concatenated) {
  LinearSource source;
  source.name = "test.layer";
  source.in_features = parts[0].k;
  source.group_size = parts[0].group;
  source.order = order;
  for (const AwqPart& part : parts) source.parts.push_back(part.view());
  return source;
}

struct Scratch64 {  // 64-byte aligned bytes
  explicit Scratch64(size_t bytes) : storage(bytes + 64) {
    data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
  }
  std::vector<uint8_t> storage;
  void* data;
};

inline std::vector<cpu::Isa> isas() {
  std::vector<cpu::Isa> all;
  for (cpu::Isa isa : {cpu::Isa::scalar, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::amx}) {
    if (isa <= cpu::best_isa()) all.push_back(isa);
  }
  return all;
}

inline std::vector<float> run(const cpu::PackedLinear& layer, cpu::LinearCall call,
                              int64_t out_columns, cpu::ThreadPool& pool,
                              std::vector<float> y = {}) {
  y.resize(static_cast<size_t>(call.rows * out_columns));
  Scratch64 scratch(layer.scratch_bytes(call.rows));
  call.y = y.data();
  layer.run(call, scratch.data, pool);
  return y;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace turbomind::test
