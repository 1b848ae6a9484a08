// RMSNorm and LayerNorm of one row in f32. The sum runs over sixteen lanes (element i belongs to
// lane i mod 16) which are then added as a fixed tree, so every instruction set, thread count and
// fused or stand-alone caller gets the same bits.
#pragma once

#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/isa.h"

namespace turbomind::cpu {

struct RowNorm {
  NormKind kind = NormKind::rms;
  const float* weight = nullptr;  // [n]
  const float* bias = nullptr;    // [n] or null
  float eps = 1e-6F;
};

// Views of a Norm whose vectors lie in host memory as f32. Throws Error{internal} otherwise.
RowNorm row_norm_of(const Norm& norm, int64_t n);

// y = norm(x); y may be x.
void row_norm(const RowNorm& norm, const float* x, float* y, int64_t n, Isa isa);

}  // namespace turbomind::cpu
