// 4-bit linear layers (AWQ): packing, and the plan of one call: quantise the rows of x, then blocks
// of 32 output columns in parallel, each finished (bias, activation, residual) by the thread that
// computed it. Kernels do the arithmetic; see kernels/kernel_table.h for the layouts.
#pragma once

#include <memory>
#include <vector>

#include "backend/cpu/kernels/kernel_table.h"
#include "backend/cpu/mapped_memory.h"
#include "backend/cpu/packed_linear.h"

namespace turbomind::cpu {

// Bias of all parts in the packed column order, padded with zeros to whole blocks; empty if no part
// has one. Throws Error{tensor_mismatch} for a bias of the wrong shape or type.
std::vector<float> pack_bias(const LinearSource& source, int64_t blocks);

// Where output column `n` of the packed order comes from; part -1: padding.
struct SourceColumn {
  int part = -1;
  int64_t column = 0;
};
SourceColumn source_column(const LinearSource& source, int64_t packed_column);
int64_t packed_blocks(const LinearSource& source);  // of 32 columns

// Applies `finish` to one block's sums: `acc` [rows][32] are rows [row, row + rows) of block
// `block`.
void finish_block(const Kernels& kernels, const LinearCall& call, const std::vector<float>& bias,
                  int64_t out_columns, int64_t block, int64_t row, int64_t rows, const float* acc);

// Bytes of the packed bias of pack_bias.
size_t bias_bytes(const LinearSource& source, int64_t blocks);

class LinearU4 final : public PackedLinear {
 public:
  LinearU4(const LinearSource& source, Isa isa, ThreadPool& pool);
  // What bytes() will be; and scratch_bytes of `rows` rows of the largest layer with K features.
  static size_t packed_bytes(const LinearSource& source);
  static size_t scratch_bound(int64_t rows, int64_t k);

  int64_t in_features() const override { return shape_.k; }
  int64_t out_features() const override { return columns_; }
  size_t bytes() const override { return memory_.bytes() + bias_.size() * sizeof(float); }
  size_t scratch_bytes(int64_t rows) const override;
  void run(const LinearCall& call, void* scratch, ThreadPool& pool) const override;

 private:
  struct RowBlocks;
  const uint8_t* block(int64_t i) const { return memory_.data() + i * shape_.block_bytes; }
  RowBlocks lay_out(void* scratch, int64_t rows) const;
  void quantize(const LinearCall& call, const RowBlocks& x, ThreadPool& pool) const;
  void run_few_rows(const LinearCall& call, const RowBlocks& x, ThreadPool& pool) const;
  void run_tiles(const LinearCall& call, const RowBlocks& x, ThreadPool& pool) const;

  const Kernels& kernels_;
  U4Shape shape_;
  int64_t columns_ = 0;      // of all parts
  int64_t out_columns_ = 0;  // results a row: columns_, or half of it for gate_up
  int64_t blocks_ = 0;
  PartOrder order_;
  MappedMemory memory_;
  std::vector<float> bias_;
};

}  // namespace turbomind::cpu
