// Exact widening of 16-bit floats, one number at a time. Vector code uses the instructions; these
// are for the scalar kernels, packing and odd ends of rows.
#pragma once

#include <bit>
#include <cstdint>

#include "base/float_formats.h"

namespace turbomind::cpu {

using turbomind::bf16_to_f32;
using turbomind::f16_to_f32;

// Round to nearest even; finite numbers past the largest f16 become it, NaN stays NaN.
inline uint16_t f32_to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
  if (magnitude == 0x7f800000U) return static_cast<uint16_t>(sign | 0x7c00U);
  if (magnitude >= 0x477fe000U) return static_cast<uint16_t>(sign | 0x7bffU);  // 65504
  if (magnitude < 0x38800000U) {  // below 2^-14: a whole number of 2^-24
    // Adding 2^-1 leaves a float whose last bit is 2^-24, rounded as f32 sums are.
    const float sum = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000U));
  }
  const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
}

// Round to nearest even; NaN stays NaN.
inline uint16_t f32_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

}  // namespace turbomind::cpu
