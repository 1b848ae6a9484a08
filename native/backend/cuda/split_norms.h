// Which norms run in two halves around the products of a step (gemm/gemm_table.h), and what the last
// product has left for the next: the host's side. Whether a norm is split depends on its kind, width and
// weights alone, never on the tokens of a step, so that a row takes the same path in every step.
// Engine thread.
#pragma once

#include <memory>
#include <unordered_map>

#include "backend/backend.h"
#include "backend/cuda/cuda_memory.h"
#include "backend/cuda/gemm/gemm_table.h"

namespace turbomind::cuda {

// Whether the CTAs of the product fold the strips of its tokens, or one kernel does before. On sm_90 warps without
// other work do it in steps of up to kFoldTokens tokens, and where a product has none it launches that kernel
// itself (gemm_sm90.cuh). Elsewhere all CTAs read the same strips at their start. Decides times, never bits.
constexpr bool folds_in_ctas(int sm, int64_t columns, int tokens) {
  if (sm == 90) return tokens <= kFoldTokens;
  return tokens <= 32 && few_strips(columns, strip_columns(WeightKind::awq, tokens), tokens);
}

class SplitNorms {
 public:
  SplitNorms() : vectors_(std::make_shared<Vectors>()) {}

  // Norm weights are vectors of the model: known by address while the buffer handed back lives.
  std::unique_ptr<Buffer> track(std::shared_ptr<Buffer> buffer, int64_t count);
  // Reads the largest magnitude of those that are new, once they have been loaded. Waits.
  void read_peaks(CudaStream stream);

  // Bytes of the two arrays for steps of `tokens` rows of at most `columns`.
  static size_t strip_bytes(int tokens, int64_t columns);
  static size_t scale_bytes(int tokens) { return static_cast<size_t>(tokens) * sizeof(float); }
  void reserve(DevicePool& pool, int tokens, int64_t columns);
  void release();

  // What the product that writes `tokens` rows of `columns`, with weights of kind `writer`, has to leave in z for
  // `norm`; its weight is null where this norm is not split.
  NextNorm next(const Norm& norm, WeightKind writer, int64_t columns, int tokens, void* z) const;
  // `rows` rows at x were written, and what `next` asked for beside them.
  void left(const void* x, int64_t rows, const Norm& norm, const NextNorm& next);
  // Rows at x, or with null what lay in z, were overwritten otherwise.
  void forget(const void* x = nullptr);
  // Whether z and strips of just this are there.
  bool has(const void* x, int64_t rows, const Norm& norm) const;
  // For the product that reads them; launches what folds the strips where its CTAs do not.
  InputNorm input(const LaunchContext& context, int64_t columns, int tokens) const;

 private:
  struct Vector {
    int64_t count = 0;
    bool known = false;
    float peak = 0.0F;  // 0: no power of two serves
  };
  using Vectors = std::unordered_map<const void*, Vector>;
  class TrackedVector;

  std::shared_ptr<Vectors> vectors_;
  std::unique_ptr<Buffer> strips_;
  std::unique_ptr<Buffer> scales_;
  int64_t max_columns_ = 0;
  // What is there; x null: nothing.
  const void* x_ = nullptr;
  const void* weight_ = nullptr;
  int64_t rows_ = 0;
  int strip_columns_ = kNarrowStrip;
  float peak_ = 1.0F;
  float eps_ = 0.0F;
};

}  // namespace turbomind::cuda
