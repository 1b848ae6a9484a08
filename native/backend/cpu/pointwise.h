// Row-wise ops of the CPU backend outside linear layers: norms on their own, embedding look-up.
// Engine thread and its team; each row depends on itself alone.
#pragma once

#include "backend/backend.h"
#include "backend/cpu/file_rows.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/thread_pool.h"

namespace turbomind::cpu {

// x [rows, n] → y [rows, n]; y may be x.
void normalize_rows(const Norm& norm, const float* x, float* y, int64_t rows, int64_t n, Isa isa,
                    ThreadPool& pool);

// count values of dtype f32, f16 or bf16 to float.
void to_float(const void* from, DType dtype, int64_t count, float* to);

// [V, H] table, kept as a view of the mapped file: only the rows that are asked for are read.
class CpuEmbedding : public LinearWeight {
 public:
  // Throws Error{tensor_mismatch}.
  explicit CpuEmbedding(ConstTensorView table);
  int64_t in_features() const override { return table_.shape[1]; }   // H
  int64_t out_features() const override { return table_.shape[0]; }  // V
  size_t bytes() const override { return 0; }                        // stays in the file
  // False when the weight file was cut meanwhile.
  [[nodiscard]] bool read_row(TokenId id, float* to) const;

 private:
  ConstTensorView table_;
  FileRows rows_;
};

void embed(const EmbedArgs& args, std::span<const TokenId> token_ids, ThreadPool& pool);

}  // namespace turbomind::cpu
