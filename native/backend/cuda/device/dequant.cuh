// 4-bit weights to A fragments. A packed word holds the eight values of one lane for one k16 step:
// pair j (register j of the fragment: even j row g, odd j row g + 8) at bits 4j (even k) and 16 + 4j
// (odd k). A weight is (q - zero) * scale, rounded once to the activations' type T: q - zero is exact
// in bf16 and f16, the scale is of type T already. So it is the value that a checkpoint dequantised
// to T has, and its products need no scaling afterwards. Device only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace turbomind::cuda {

// Nibbles become numbers without a conversion. f16: set exponent bits, 0x6400 | q is 1024 + q.
// bf16: the bits of an integer n < 256 are the number n * 2^-133, since the least normal numbers go on where
// the subnormal ones end; so a byte's two nibbles are q and 16 q where they stand. One fma makes
// (q - zero) / 64 of them, whose factor is the scale times 64: both exact, and 2^133 at once would overflow.

// One word per (row, group): in bits 0..15 the scale, bf16: times 64; in bits 16..31 as T 1024 + zero
// point (f16) or -zero / 64 (bf16). A bf16 scale of 2^122 or more overflows.
template <class T>
__device__ __forceinline__ uint32_t group_word(T scale, uint32_t zero) {
  if constexpr (__is_same(T, __half)) {
    return reinterpret_cast<const uint16_t&>(scale) | (0x6400U | zero) << 16;
  } else {
    const T factor = __float2bfloat16(__bfloat162float(scale) * 64.0F);
    const T offset = __float2bfloat16(static_cast<float>(zero) * -0.015625F);
    return reinterpret_cast<const uint16_t&>(factor) |
           static_cast<uint32_t>(reinterpret_cast<const uint16_t&>(offset)) << 16;
  }
}

// Its two halves as numbers, for the reference.
template <class T>
__device__ __forceinline__ float group_scale(uint32_t word) {
  const auto bits = static_cast<uint16_t>(word);
  if constexpr (__is_same(T, __half)) return __half2float(reinterpret_cast<const T&>(bits));
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16&>(bits)) * 0.015625F;
}
template <class T>
__device__ __forceinline__ float group_zero(uint32_t word) {
  const auto bits = static_cast<uint16_t>(word >> 16);
  if constexpr (__is_same(T, __half)) return static_cast<float>(bits & 0xfU);
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16&>(bits)) * -64.0F;
}

// What dequantising needs of the groups of rows g and g + 8, each value twice in a word.
struct GroupPairs {
  uint32_t zero_low;
  uint32_t zero_high;
  uint32_t scale_low;
  uint32_t scale_high;
};

template <class T>
__device__ __forceinline__ GroupPairs group_pairs(uint32_t low, uint32_t high) {
  GroupPairs pairs{.zero_low = __byte_perm(low, 0, 0x3232),
                   .zero_high = __byte_perm(high, 0, 0x3232),
                   .scale_low = __byte_perm(low, 0, 0x1010),
                   .scale_high = __byte_perm(high, 0, 0x1010)};
  if constexpr (__is_same(T, __half)) {
    // Odd pairs stay at bits 4..7, so that they are 1024 + 16 q: -(64 + zero) for them.
    pairs.zero_high = (pairs.zero_high << 4 & 0x00f000f0U) | 0xd400d400U;
  }
  return pairs;
}

// (word & mask) | magic in one instruction; written in C it becomes two.
template <uint32_t kMask, uint32_t kMagic>
__device__ __forceinline__ uint32_t masked_magic(uint32_t word) {
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(word), "n"(kMask), "r"(kMagic));
  return bits;
}

template <uint32_t kFactor>
__device__ __forceinline__ uint32_t dequant_bf16(uint32_t bits, uint32_t zero, uint32_t scale) {
  constexpr uint32_t kFactors = kFactor << 16 | kFactor;
  const __nv_bfloat162 value = __hmul2(__hfma2(reinterpret_cast<const __nv_bfloat162&>(bits),
                                               reinterpret_cast<const __nv_bfloat162&>(kFactors),
                                               reinterpret_cast<const __nv_bfloat162&>(zero)),
                                       reinterpret_cast<const __nv_bfloat162&>(scale));
  return reinterpret_cast<const uint32_t&>(value);
}

template <class T>
__device__ __forceinline__ void dequant_word(uint32_t word, const GroupPairs& pairs,
                                             uint32_t (&a)[4]) {
  if constexpr (__is_same(T, __nv_bfloat16)) {
    constexpr uint32_t kTo127 = 0x7f00U;  // 2^127
    constexpr uint32_t kTo123 = 0x7d00U;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t shifted = j == 0 ? word : word >> 8;
      a[j] = dequant_bf16<kTo127>(shifted & 0x000f000fU, pairs.zero_low, pairs.scale_low);
      a[j + 1] = dequant_bf16<kTo123>(shifted & 0x00f000f0U, pairs.zero_high, pairs.scale_high);
    }
  } else {
    constexpr uint32_t kSixteenth = 0x2c002c00U;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t shifted = j == 0 ? word : word >> 8;
      const uint32_t low = masked_magic<0x000f000fU, 0x64006400U>(shifted);
      const uint32_t high = masked_magic<0x00f000f0U, 0x64006400U>(shifted);
      const __half2 even = __hmul2(__hsub2(reinterpret_cast<const __half2&>(low),
                                           reinterpret_cast<const __half2&>(pairs.zero_low)),
                                   reinterpret_cast<const __half2&>(pairs.scale_low));
      const __half2 odd = __hmul2(__hfma2(reinterpret_cast<const __half2&>(high),
                                          reinterpret_cast<const __half2&>(kSixteenth),
                                          reinterpret_cast<const __half2&>(pairs.zero_high)),
                                  reinterpret_cast<const __half2&>(pairs.scale_high));
      a[j] = reinterpret_cast<const uint32_t&>(even);
      a[j + 1] = reinterpret_cast<const uint32_t&>(odd);
    }
  }
}

}  // namespace turbomind::cuda
