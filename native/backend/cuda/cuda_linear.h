// A linear layer's weights on the GPU: the matrix as the GEMMs read it, and the memory it lies in.
// Filled by cuda_weights.cc; not changed after that.
#pragma once

#include <memory>

#include "backend/backend.h"
#include "backend/cuda/gemm/gemm_table.h"

namespace turbomind::cuda {

class CudaLinear final : public LinearWeight {
 public:
  int64_t in_features() const override { return matrix.k; }
  int64_t out_features() const override { return matrix.n; }
  size_t bytes() const override;

  PackedMatrix matrix;
  // Shared with conversions under way; weights also by an embedding table and a tied head.
  std::shared_ptr<Buffer> weights;
  std::shared_ptr<Buffer> meta;
  std::shared_ptr<Buffer> bias;
};

}  // namespace turbomind::cuda
