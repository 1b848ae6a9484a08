// The language model head. The full-precision rows stay in the checkpoint's file; a 6-bit copy (three
// eighths of bf16's bytes) finds the rows worth reading: of 151,936 random rows, some tens.
//
// Bound. For a row w and x, let u be the 6-bit row (integers, |u| <= 31), s its scale,
// r = w - s u; v the 16-bit x with scale a, d = x - a v, |d_i| <= 0.51 a, so ||d|| <= 0.51 a sqrt(H).
//   w.x - s a (u.v) = r.x + s u.d,  hence at most ||r|| ||x|| + (||w|| + ||r||) ||d|| in size.
// u.v is computed exactly as 256 hi + lo and rounded to f32 a few times; since v's largest element
// is 32639, ||256 hi|| and ||lo|| are below 2.1 ||v|| for H <= 65536, and these roundings together
// stay below 16 * 2^-24 (||w|| + ||r||)(||x|| + ||d||). The exact logit itself is an f32 sum with
// chains of H / 64 fmas and a tree: within (H / 64 + 8) 2^-24 ||w|| ||x|| of w.x. So
//   |logit - screened| <= ||r|| P + ||w|| Q,   P = 1.001 (||x|| + ||d||),
//   Q = 1.001 (||d|| + (H / 64 + 40) 2^-24 ||x||),
// where 1.001 covers the roundings of the bound itself; ||r|| and ||w|| are stored rounded up.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "backend/cpu/file_rows.h"
#include "backend/cpu/kernels/kernel_table.h"
#include "backend/cpu/mapped_memory.h"
#include "backend/cpu/packed_linear.h"

namespace turbomind::cpu {

class Head final : public PackedHead {
 public:
  Head(const LinearSource& source, Isa isa, ThreadPool& pool);
  // What bytes() will be; and the largest scratch_bytes of `rows` rows of a head [V, H].
  static size_t packed_bytes(const LinearSource& source);
  static size_t scratch_bound(int64_t rows, int64_t vocab, int64_t hidden);

  int64_t in_features() const override { return h_; }
  int64_t out_features() const override { return v_; }
  size_t bytes() const override;
  size_t scratch_bytes(int64_t rows) const override;
  void logits(const float* x, int64_t rows, float* y, void* scratch,
              ThreadPool& pool) const override;
  void best_logits(const float* x, int64_t rows, int k, float margin, float* scores, void* scratch,
                   ThreadPool& pool) const override;

 private:
  struct Scratch;
  class RowBuffer;
  void pack_block(int64_t block, const uint8_t* rows);
  const uint8_t* table_rows(int64_t n, int64_t count, RowBuffer& buffer) const;
  float exact(int64_t n, const uint8_t* row, const float* x) const;
  void check_readable() const;
  void screen(const Scratch& s, float* upper, ThreadPool& pool) const;
  void rescore(const float* x, float threshold, float* scores, int64_t begin, int64_t end) const;
  float least_of_best(const Scratch& s, int64_t row, int k, const float* x) const;
  Scratch lay_out(void* scratch, int64_t rows) const;
  void quantize(const float* x, const Scratch& s, int64_t row) const;

  const Kernels& kernels_;
  int64_t v_ = 0, h_ = 0;
  int64_t depth_ = 0;  // H rounded up to kHeadDepth
  int64_t block_bytes_ = 0;
  int64_t blocks_ = 0;  // of 16 rows; 0: no screening
  DenseType type_ = DenseType::f32;
  size_t row_bytes_ = 0;
  std::vector<uint8_t> small_;  // [V, H] of a head that is not screened
  FileRows file_;               // [V, H] of one that is: it stays in the checkpoint
  std::vector<float> bias_;     // [V] or empty
  MappedMemory memory_;         // [blocks][depth / 16][3][64] u8, see kernel_table.h
  mutable std::atomic<bool> unreadable_{false};
  std::vector<float> scale_, residual_, norm_;  // [V rounded up to 16]: s, ||r||, ||w||
};

}  // namespace turbomind::cpu
