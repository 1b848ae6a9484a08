// The border of a row's nucleus (top-p), found by radix digits over exact sums. All threads of the CTA
// call it.
#pragma once

#include "backend/cuda/device/sample_select.cuh"

namespace turbomind::cuda::sampling {

struct Border {
  float value = 0.0F;  // 0: nothing is cut
  long long count = 0;
  long long equal = 0;  // values equal to it
};

// By digit d, of the values from `least` up whose higher bits are `prefix`'s: the sums of their mantissas to
// select.low and select.high, two halves so that they are exact, and what those stand for to
// select.shares. Ends synchronised.
template <class Probability>
__device__ __forceinline__ void add_shares(const Row& row, int d, uint32_t prefix, float least,
                                           Probability probability) {
  auto& select = row.s->scratch.select;
  const RadixDigit digit = radix_digit(d);
  const uint32_t bins = 1U << digit.bits;
  const uint32_t known = d == 0 ? 0U : ~0U << (digit.shift + digit.bits);
  __syncthreads();
  for (int i = threadIdx.x; i < kRadixBins; i += kThreads) select.low[i] = select.high[i] = 0;
  __syncthreads();
  const float floor = fmaxf(least, __uint_as_float(prefix));
  for_each_block(
      row, row.x, minus_infinity(), [&](int block) { return row.block_sum[block] < floor; },
      [&](int, bool active, const float(&v)[4]) {
        for (int j = 0; active && j < 4; ++j) {
          const float p = probability(v[j]);
          const uint32_t bits = __float_as_uint(p);
          if (p < least || bits == 0 || (bits & known) != prefix) continue;
          const uint32_t mantissa = (bits & 0x7fffffU) | 0x800000U;  // never denormal
          const uint32_t bin = (bits >> digit.shift) & (bins - 1);
          atomicAdd(&select.low[bin], mantissa & 0xfffU);
          atomicAdd(&select.high[bin], mantissa >> 12);
        }
      });
  __syncthreads();
  for (int i = threadIdx.x; i < static_cast<int>(bins); i += kThreads) {
    const int exponent = static_cast<int>(d == 0 ? i >> 2 : prefix >> 23);
    const double sum = static_cast<double>(uint64_t{select.high[i]} * 4096 + select.low[i]);
    select.shares[i] = ldexp(sum, exponent - 150);
  }
  __syncthreads();
}

// The first digit's bin to s.rank, 0 if all shares do not reach `wanted`, and the sum of those above it to
// s.base. Across exponents sums are rounded: in order, skipping empty bins. Ends synchronised.
__device__ __forceinline__ void find_exponent(Shared& s, int bins, double wanted) {
  if (threadIdx.x < 32) {
    double inside = 0.0;
    int found = 0;
    for (int top = bins - 1; top > 0 && found == 0; top -= 32) {
      const int mine = top - static_cast<int>(threadIdx.x);
      const double share = mine > 0 ? s.scratch.select.shares[mine] : 0.0;
      uint32_t votes = __ballot_sync(~0U, share > 0.0);
      for (; votes != 0; votes &= votes - 1) {
        const int lane = __ffs(votes) - 1;
        const double next = __shfl_sync(~0U, share, lane);
        if (!(inside + next < wanted)) {
          found = top - lane;
          break;
        }
        inside += next;
      }
    }
    if (threadIdx.x == 0) {
      s.rank = found;
      s.base = inside;
    }
  }
  __syncthreads();
}

// The nucleus' smallest probability and how many equal to it belong to it, among values from `least`
// up; see HostSampler::nucleus_border. Value 0: they do not reach `wanted`.
template <class Probability>
__device__ Border nucleus_border(const Row& row, double wanted, float least,
                                 Probability probability) {
  Shared& s = *row.s;
  auto& select = s.scratch.select;
  double base = 0.0;
  uint32_t prefix = 0;
  uint64_t units = 0;
  for (int d = 0; d < kNumRadixDigits; ++d) {
    const RadixDigit digit = radix_digit(d);
    const uint32_t bins = 1U << digit.bits;
    add_shares(row, d, prefix, least, probability);
    int bin = 0;
    if (d == 0) {
      find_exponent(s, static_cast<int>(bins), wanted);
      bin = s.rank;
      base = s.base;
      __syncthreads();
      if (bin == 0) return {};
    } else {
      double inside = 0.0;
      bin = find_bin(
          s, select.shares, static_cast<int>(bins), s.warp_double, &inside,
          [&](double before, double share) { return !(base + (before + share) < wanted); });
      base += inside;
    }
    prefix |= static_cast<uint32_t>(bin) << digit.shift;
    units = uint64_t{select.high[bin]} * 4096 + select.low[bin];
    __syncthreads();
  }
  const float value = __uint_as_float(prefix);
  const auto count = static_cast<long long>(ceil((wanted - base) / value));
  return {value, count < 1 ? 1 : count,
          static_cast<long long>(units / ((prefix & 0x7fffffU) | 0x800000U))};
}

}  // namespace turbomind::cuda::sampling
