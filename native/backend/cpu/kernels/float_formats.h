// Exact widening of 16-bit floats, one number at a time. Vector code uses the instructions; these
// are for the scalar kernels, packing and odd ends of rows.
#pragma once

#include <bit>
#include <cstdint>

#include "base/float_formats.h"

namespace turbomind::cpu {

using turbomind::bf16_to_f32;
using turbomind::f16_to_f32;

// Round to nearest even; NaN stays NaN.
inline uint16_t f32_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

}  // namespace turbomind::cpu
