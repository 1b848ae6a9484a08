// Linear layers of the CPU backend: packing at load, and y = epilogue(x * W^T + bias).
//
// Numerics, the same on every instruction set for 4-bit weights: x is cut into groups of the
// weight's group size and each group rounded to 16-bit fixed point (two int8 planes, scale from the
// group's largest value); the integer dot products are exact; groups are added in order in f32 with
// fma. So a result depends on its own row alone, is bit-equal on scalar, AVX2, AVX-512 and AMX,
// and is within 5e-5 of the float32 product (rms, of a typical result).
// Dense weights (f32, f16, bf16): f32 accumulation with float32-class activations (bf16 matrix
// units get x as a sum of bf16 terms).
#pragma once

#include <cstddef>
#include <memory>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/thread_pool.h"

namespace turbomind::cpu {

struct LinearCall {
  const float* x = nullptr;    // [M, K]
  float* y = nullptr;          // [M, N], or [M, N / 2] for silu_mul
  int64_t rows = 0;            // M
  const Norm* norm = nullptr;  // applied to each row of x first, or null (f32 host vectors)
  Epilogue epilogue = Epilogue::none;
  const float* scale = nullptr;  // [N], residual only, or null
};

class PackedLinear : public LinearWeight {
 public:
  // Needs scratch_bytes(call.rows) bytes at `scratch` (64-byte aligned).
  virtual void run(const LinearCall& call, void* scratch, ThreadPool& pool) const = 0;
  virtual size_t scratch_bytes(int64_t rows) const = 0;
};

// Sizes without packing: bytes() of what pack_linear and pack_head would answer, and bounds of
// scratch_bytes for `rows` rows of any layer of at most K features, of a head [V, H].
size_t packed_linear_bytes(const LinearSource& source, Isa isa);
size_t packed_head_bytes(const LinearSource& source);
size_t linear_scratch_bound(int64_t rows, int64_t k);
size_t head_scratch_bound(int64_t rows, int64_t vocab, int64_t hidden);

// Repacks, using all threads, and drops the source's file pages as it goes.
// Throws Error{tensor_mismatch | unsupported_quantization}.
std::unique_ptr<PackedLinear> pack_linear(const LinearSource& source, Isa isa, ThreadPool& pool);

// The language model head: rows are scored with a 6-bit copy (three eighths of bf16's bytes), and every
// row that could be among the best k by a proven error bound is scored again in full precision, so
// the answer is that of the full-precision head.
class PackedHead : public LinearWeight {
 public:
  // All logits: y[M, V], full precision.
  virtual void logits(const float* x, int64_t rows, float* y, void* scratch,
                      ThreadPool& pool) const = 0;
  // Row m of `scores` [V] gets exact logits at least for the `k` best entries (ties included) and
  // for every entry whose exact logit is >= (k-th best exact logit) - margin; the others get
  // values below all of those.
  virtual void best_logits(const float* x, int64_t rows, int k, float margin, float* scores,
                           void* scratch, ThreadPool& pool) const = 0;
  virtual size_t scratch_bytes(int64_t rows) const = 0;
};
std::unique_ptr<PackedHead> pack_head(const LinearSource& source, Isa isa, ThreadPool& pool);

}  // namespace turbomind::cpu
