// The arithmetic of sampling that the host's sampler and a device's share, so that both draw the same
// token from the same logits, bit for bit. Every operation is rounded by itself; every sum has one
// order, or is exact in any order. Pure functions; host and device code.
//
// Sums of probabilities, each over fixed places in the vocabulary:
// - a block is 64 neighbouring tokens, f32: with e the block's values and t = 0..15,
//     q[t] = (e[t] + e[t + 16]) + (e[t + 32] + e[t + 48]),
//   then a tree over t: t and t ^ 8, t and t ^ 4, t and t ^ 2, t and t ^ 1;
// - a group is 64 neighbouring blocks, f64, added in order;
// - the total is f64, the groups added in order.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TM_HOST_DEVICE __host__ __device__
#else
#define TM_HOST_DEVICE
#endif

namespace turbomind {

inline constexpr int kSumBlock = 64;  // tokens
inline constexpr int kSumGroup = 64;  // blocks

// The digits of a float's bits, high to low. Non-negative floats that agree in the first digit have
// one exponent, so a sum of up to 2^29 of them is exact in f64, whatever its order.
struct RadixDigit {
  int shift;
  int bits;
};
inline constexpr int kNumRadixDigits = 3;
TM_HOST_DEVICE constexpr RadixDigit radix_digit(int index) {
  return index == 0 ? RadixDigit{21, 11} : index == 1 ? RadixDigit{10, 11} : RadixDigit{0, 10};
}
inline constexpr int kRadixBins = 2048;
// Search for a nucleus looks at probabilities from here up first.
inline constexpr float kLikely = 0x1p-12F;

TM_HOST_DEVICE inline uint32_t bits_of(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}
TM_HOST_DEVICE inline float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// exp(x) for x <= 0, to 2 ulp; 0 below -87. Our own, so that a draw does not depend on a library;
// multiplications and additions only, so that it does not depend on fma either.
TM_HOST_DEVICE inline float exp_nonpositive(float x) {
  if (x < -87.0F) return 0.0F;
  const float shifted = x * 1.44269504F + 12582912.0F;  // 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0F;
  const float r = (x - n * 0.693145752F) - n * 1.42860677e-6F;
  float q = r * 0x1.6a2256p-10F + 0x1.123b02p-7F;  // exp(r) = 1 + r + r^2 q(r)
  q = q * r + 0x1.5558f8p-5F;
  q = q * r + 0x1.55549p-3F;
  q = q * r + 0x1.fffffcp-2F;
  const float y = r * r * q + r + 1.0F;
  // The low bits of `shifted` are n: moved to the exponent they multiply by 2^n.
  return y * float_of((bits_of(shifted) << 23) + 0x3f800000U);
}

// Uniform in [0, 1): 53 random bits of (seed, index). Philox4x32-10 (Salmon et al., 2011).
TM_HOST_DEVICE inline double counter_uniform(uint64_t seed, uint32_t index) {
  uint32_t x0 = index;
  uint32_t x1 = 0;
  uint32_t x2 = 0;
  uint32_t x3 = 0;
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53U} * x0;
    const uint64_t b = uint64_t{0xCD9E8D57U} * x2;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(b);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  const uint64_t bits = (static_cast<uint64_t>(x1) << 32 | x0) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

// Probability mass the nucleus must reach. The margin is there because 0.1 is not a float: ten of
// a hundred equal tokens are enough for it.
TM_HOST_DEVICE inline double nucleus_mass(float top_p, double total) {
  return static_cast<double>(top_p) * total * (1.0 - 1e-7);
}

// The first of `count` shares with which the running sum passes `target`, and `running` before it;
// if rounding lets none pass, the last share that is not 0. At least one must not be 0.
template <class ShareAt>
TM_HOST_DEVICE inline int walk_shares(int count, double target, double& running, ShareAt share_at) {
  int last = 0;
  double before = running;
  for (int i = 0; i < count; ++i) {
    const double share = share_at(i);
    if (!(share > 0.0)) continue;
    last = i;
    before = running;
    if (running + share > target) return i;
    running += share;
  }
  running = before;
  return last;
}

// top-p, min-p and the draw over `count` shares that are best first, the best being 1. Answers the
// index drawn.
template <class ShareAt>
TM_HOST_DEVICE inline int draw_from_shares(int count, float top_p, float min_p, double uniform,
                                           ShareAt share_at) {
  double total = 0.0;
  for (int i = 0; i < count; ++i) total += share_at(i);
  const double wanted = nucleus_mass(top_p, total);
  int kept = 0;
  double mass = 0.0;
  while (kept < count) {
    const double share = share_at(kept);
    if (top_p < 1.0F && kept > 0 && mass >= wanted) break;
    if (share <= 0.0 || share < static_cast<double>(min_p)) break;
    mass += share;
    ++kept;
  }
  const double target = uniform * mass;
  double running = 0.0;
  for (int i = 0; i < kept; ++i) {
    running += share_at(i);
    if (running > target) return i;
  }
  return kept - 1;
}

}  // namespace turbomind
