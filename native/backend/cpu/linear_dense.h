// Dense linear layers (f32, f16, bf16). Two families, one a machine and weight type for all M, so
// that a row's result does not depend on the batch: bf16 weights on AMX go through the matrix units
// with x as two bf16 terms (relative error of x at most 2^-17, products summed in f32); everything
// else is one f32 fma chain over k a result, bit-equal on scalar, AVX2 and AVX-512.
#pragma once

#include <memory>
#include <vector>

#include "backend/cpu/kernels/kernel_table.h"
#include "backend/cpu/mapped_memory.h"
#include "backend/cpu/packed_linear.h"

namespace turbomind::cpu {

class LinearDense final : public PackedLinear {
 public:
  LinearDense(const LinearSource& source, Isa isa, ThreadPool& pool);
  // What bytes() will be; and scratch_bytes of `rows` rows of the largest layer with K features.
  static size_t packed_bytes(const LinearSource& source, Isa isa);
  static size_t scratch_bound(int64_t rows, int64_t k);

  int64_t in_features() const override { return k_; }
  int64_t out_features() const override { return columns_; }
  size_t bytes() const override { return memory_.bytes() + bias_.size() * sizeof(float); }
  size_t scratch_bytes(int64_t rows) const override;
  void run(const LinearCall& call, void* scratch, ThreadPool& pool) const override;

 private:
  bool tiles() const { return family_tiles_; }
  const uint8_t* block(int64_t i) const {
    return memory_.data() + static_cast<size_t>(i) * block_bytes_;
  }
  void run_tiles(const LinearCall& call, uint16_t* planes, ThreadPool& pool) const;
  void run_fma(const LinearCall& call, float* normed, ThreadPool& pool) const;

  const Kernels& kernels_;
  bool family_tiles_ = false;
  DenseType type_ = DenseType::f32;
  int64_t k_ = 0;
  int64_t columns_ = 0;
  int64_t out_columns_ = 0;
  int64_t blocks_ = 0;
  size_t block_bytes_ = 0;
  PartOrder order_;
  MappedMemory memory_;
  std::vector<float> bias_;
};

// Throws Error{tensor_mismatch} unless `part.weight` is [N, K] (trailing dimensions may be several,
// as of a convolution) of a float type.
void check_dense_part(const LinearSource& source, const LinearPart& part);
DenseType dense_type(DType dtype);

}  // namespace turbomind::cpu
