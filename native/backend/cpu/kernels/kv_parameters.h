// Scale and zero of one quantised head vector, the same few scalar operations on every instruction
// set. See KvCacheSpec::bits for the format.
#pragma once

#include <cstdint>

#include "backend/cpu/kernels/attention_kernels.h"
#include "backend/cpu/kernels/float_formats.h"

namespace turbomind::cpu {

// `levels`: 2^bits - 1. Adding 0 turns -0 into 0: the order in which lanes meet must not show.
inline void set_parameters(bool finite, float least, float most, float levels,
                           QuantizedVector& out) {
  constexpr uint16_t kNan = 0x7e00;
  out.zero = finite ? f32_to_f16(least + 0.0F) : kNan;
  out.scale = finite ? f32_to_f16((most - least) / levels + 0.0F) : kNan;
}

}  // namespace turbomind::cpu
