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

// Nibbles become numbers by setting exponent bits: a mantissa that ends in q is kMagic + q, with
// kMagic 128 for bf16 and 1024 for f16.
template <class T>
inline constexpr uint32_t kMagicBits = __is_same(T, __nv_bfloat16) ? 0x4300U : 0x6400U;

// One word per (row, group): the scale as T in bits 0..15, kMagic + zero point as T in bits 16..31.
template <class T>
__device__ __forceinline__ uint32_t group_word(T scale, uint32_t zero) {
  return reinterpret_cast<const uint16_t&>(scale) | (kMagicBits<T> | zero) << 16;
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

__device__ __forceinline__ uint32_t dequant_bf16(uint32_t word, uint32_t zero, uint32_t scale) {
  const uint32_t bits = masked_magic<0x000f000fU, 0x43004300U>(word);
  const __nv_bfloat162 value = __hmul2(__hsub2(reinterpret_cast<const __nv_bfloat162&>(bits),
                                               reinterpret_cast<const __nv_bfloat162&>(zero)),
                                       reinterpret_cast<const __nv_bfloat162&>(scale));
  return reinterpret_cast<const uint32_t&>(value);
}

template <class T>
__device__ __forceinline__ void dequant_word(uint32_t word, const GroupPairs& pairs,
                                             uint32_t (&a)[4]) {
  if constexpr (__is_same(T, __nv_bfloat16)) {
    // Seven bits of mantissa hold no second nibble: each pair is shifted down.
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a[j] = dequant_bf16(word >> (4 * j), j % 2 == 0 ? pairs.zero_low : pairs.zero_high,
                          j % 2 == 0 ? pairs.scale_low : pairs.scale_high);
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
