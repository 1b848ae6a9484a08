// 4-bit weights to A fragments. A packed word holds the eight values of one lane for one k16 step:
// pair j (register j of the fragment) at bits 4j (even k) and 16 + 4j (odd k). Values come out as
// q - zero, an integer of at most 5 bits and so exact in bf16 and f16; the scale is applied to the
// f32 accumulators of its group, so 4-bit weights lose nothing to rounding. Device only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace turbomind::cuda {

// One word per (row, group): scale in bits 0..15 (f16 or bf16), zero point in bits 16..23.
__device__ __forceinline__ float group_scale(uint32_t meta, bool scale_is_bf16) {
  return scale_is_bf16 ? __uint_as_float(meta << 16)
                       : __half2float(__ushort_as_half(static_cast<unsigned short>(meta)));
}

// magic + zero in both halves; magic is 128 for bf16 and 1024 for f16, whose last mantissa bits are
// then the units.
template <class T>
__device__ __forceinline__ uint32_t zero_pair(uint32_t meta) {
  constexpr uint32_t kMagic = __is_same(T, __nv_bfloat16) ? 0x4300U : 0x6400U;
  const uint32_t half = kMagic | ((meta >> 16) & 0xfU);
  return half | (half << 16);
}

template <class T>
__device__ __forceinline__ void dequant_word(uint32_t word, uint32_t zero_low, uint32_t zero_high,
                                             uint32_t (&a)[4]) {
  constexpr uint32_t kMagic = __is_same(T, __nv_bfloat16) ? 0x43004300U : 0x64006400U;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // (word & nibbles) | magic in one instruction; written in C it becomes two.
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"
        : "=r"(bits)
        : "r"(word >> (4 * j)), "n"(0x000f000f), "r"(kMagic));
    const uint32_t zero = (j % 2 == 0) ? zero_low : zero_high;  // rows g and g + 8
    if constexpr (__is_same(T, __nv_bfloat16)) {
      const __nv_bfloat162 value = __hsub2(reinterpret_cast<const __nv_bfloat162&>(bits),
                                           reinterpret_cast<const __nv_bfloat162&>(zero));
      a[j] = reinterpret_cast<const uint32_t&>(value);
    } else {
      const __half2 value =
          __hsub2(reinterpret_cast<const __half2&>(bits), reinterpret_cast<const __half2&>(zero));
      a[j] = reinterpret_cast<const uint32_t&>(value);
    }
  }
}

}  // namespace turbomind::cuda
