// Kinds of ops that kernels know too, apart from backend.h so that a new op recompiles no kernel.
#pragma once

#include <cstdint>

namespace turbomind {

enum class NormKind : uint8_t { rms, layer };

enum class Epilogue : uint8_t {
  none,
  gelu,      // exact, erf
  silu_mul,  // silu(gate) * up; weight loaded with PartOrder::gate_up; y is [T, N / 2]
  residual   // y += scale * result; scale [N] f32 or empty (1)
};

}  // namespace turbomind
