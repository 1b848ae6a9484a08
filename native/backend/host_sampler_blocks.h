// Passes of the host's sampler over blocks of 64 values, four lanes at a time: exponentials, and the sums
// in the order that sampling_math.h fixes. Pure functions.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "backend/sampling_math.h"

namespace turbomind::blocks {

inline constexpr size_t kBlock = kSumBlock;  // logits behind one entry of block_max_
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Four lanes by the compiler's vector extension: SSE2 or NEON, which every target has. Wider
// instructions would gain little, for the logits come from the second-level cache.
using F4 = float __attribute__((vector_size(16)));
using I4 = int32_t __attribute__((vector_size(16)));

inline F4 load(const float* p) {
  F4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F4 v) { std::memcpy(p, &v, sizeof v); }
inline F4 splat(float x) { return F4{x, x, x, x}; }
inline float largest(F4 v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }

// The exp_nonpositive of sampling_math.h, four at a time: the same operations.
inline F4 exp_nonpositive(F4 x) {
  const I4 tiny = x < -87.0F;
  const F4 clamped = tiny ? splat(-87.0F) : x;
  const F4 shifted = clamped * 1.44269504F + 12582912.0F;  // 1.5 * 2^23 rounds to an integer
  const F4 n = shifted - 12582912.0F;
  const F4 r = (clamped - n * 0.693145752F) - n * 1.42860677e-6F;
  F4 q = r * 0x1.6a2256p-10F + 0x1.123b02p-7F;  // exp(r) = 1 + r + r^2 q(r)
  q = q * r + 0x1.5558f8p-5F;
  q = q * r + 0x1.55549p-3F;
  q = q * r + 0x1.fffffcp-2F;
  const F4 y = r * r * q + r + 1.0F;
  // The low bits of `shifted` are n: moved to the exponent they multiply by 2^n.
  const I4 power = (std::bit_cast<I4>(shifted) << 23) + 0x3f800000;
  return tiny ? splat(0.0F) : y * std::bit_cast<F4>(power);
}

// What one block of at most kBlock values gives; a short block is padded with `pad`.
template <class Body>
inline void for_each_block(std::span<float> values, float pad, Body&& body) {
  const size_t whole = values.size() / kBlock;
  for (size_t block = 0; block < whole; ++block) body(block, values.data() + block * kBlock);
  const size_t rest = values.size() - whole * kBlock;
  if (rest == 0) return;
  float* tail = values.data() + whole * kBlock;
  float padded[kBlock];
  std::fill(std::copy(tail, tail + rest, padded), padded + kBlock, pad);
  body(whole, padded);
  std::copy(padded, padded + rest, tail);
}

// The sum of a block in the order of sampling_math.h.
inline float block_sum(const float* v) {
  F4 q[4];
  for (size_t m = 0; m < 4; ++m) {
    const float* e = v + 4 * m;
    q[m] = (load(e) + load(e + 16)) + (load(e + 32) + load(e + 48));
  }
  const F4 sum = (q[0] + q[2]) + (q[1] + q[3]);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// Group sums of block sums, and their total.
inline double add_groups(std::span<const float> sums, std::vector<double>& groups) {
  groups.clear();
  double total = 0.0;
  for (size_t begin = 0; begin < sums.size(); begin += kSumGroup) {
    const size_t end = std::min(sums.size(), begin + kSumGroup);
    double group = 0.0;
    for (size_t i = begin; i < end; ++i) group += sums[i];
    groups.push_back(group);
    total += group;
  }
  return total;
}

// values[i] = exp((values[i] - max) / temperature); block sums to `sums`.
inline void exponentials(std::span<float> values, float max, float temperature,
                         std::vector<float>& sums) {
  sums.resize((values.size() + kBlock - 1) / kBlock);
  for_each_block(values, kMinusInfinity, [&](size_t block, float* v) {
    for (size_t i = 0; i < kBlock; i += 4) {
      store(v + i, exp_nonpositive((load(v + i) - max) / temperature));
    }
    sums[block] = block_sum(v);
  });
}

// Clears what lies below `cut`; block sums to `sums`.
inline void clear_below(std::span<float> values, float cut, std::vector<float>& sums) {
  for_each_block(values, 0.0F, [&](size_t block, float* v) {
    for (size_t i = 0; i < kBlock; i += 4) {
      const F4 x = load(v + i);
      store(v + i, x < cut ? splat(0.0F) : x);
    }
    sums[block] = block_sum(v);
  });
}

}  // namespace turbomind::blocks
