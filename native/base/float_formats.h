// Exact widening of 16-bit floats, one number at a time. Pure functions.
#pragma once

#include <bit>
#include <cstdint>

namespace turbomind {

inline float bf16_to_f32(uint16_t x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x) << 16);
}

inline float f16_to_f32(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000U) << 16;
  const uint32_t exponent = (x >> 10) & 0x1fU;
  const uint32_t mantissa = x & 0x3ffU;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
  if (exponent != 0)
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  // Subnormal: mantissa * 2^-24, exact in f32.
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8F;
  return sign != 0 ? -magnitude : magnitude;
}

}  // namespace turbomind
