// The functions that differ by instruction set, as one constant table per level, and the plain
// structures they take. No kernel allocates, throws or knows of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"
#include "backend/cpu/isa.h"
#include "backend/cpu/kernels/row_norm.h"

namespace turbomind::cpu {

inline constexpr int kBlockColumns = 32;  // output columns of one weight block
inline constexpr int kTileRows = 16;      // rows of x in one row block

struct NormStats {
  float mean = 0.0F;  // layer norm only
  float inv = 1.0F;
};

// 4-bit weights ------------------------------------------------------------------------------

enum class ScaleType : uint8_t { f16, bf16, f32 };

// A block of 32 output columns, all K: scales [groups][32], zeros u8 [groups][32], then for every
// 4 values of k one 64-byte line: byte 4 n + i holds q(k + i) of column n (low nibble) and of
// column n + 16 (high nibble). That is a row of an AMX B tile and an operand of vpdpbusd.
struct U4Shape {
  int64_t k = 0;
  int64_t groups = 0;
  int group = 0;  // 32, 64 or 128
  int step = 0;   // min(group, 64): depth of one tile
  ScaleType scale_type = ScaleType::f16;
  size_t zeros_offset = 0;
  size_t nibbles_offset = 0;
  size_t block_bytes = 0;
};

// x as 16-bit fixed point, `rows` (<= 16) rows: x = scale * (256 hi + lo).
// planes: [k / step][hi, lo][rows][step] int8; scale, minus_hi, minus_lo: [groups][rows], the
// latter two minus the group's sum of hi and of lo.
struct U4Rows {
  int8_t* planes = nullptr;
  float* scale = nullptr;
  int32_t* minus_hi = nullptr;
  int32_t* minus_lo = nullptr;
  int rows = 0;
};

// Dense weights ------------------------------------------------------------------------------

// f32, f16 or bf16 for the fma kernels: blocks of 32 columns, [k][32].
enum class DenseType : uint8_t { f32, f16, bf16 };

// Results ------------------------------------------------------------------------------------

// y = epilogue(acc + bias) for `rows` rows of one block. Columns are the block's: `valid` of them
// exist (of the 16 results of silu_mul).
struct Finish {
  const float* acc = nullptr;    // [rows][32]
  const float* bias = nullptr;   // [32] or null
  const float* scale = nullptr;  // [valid] or null; residual
  Epilogue epilogue = Epilogue::none;
  float* y = nullptr;  // first row, first column of the block
  int64_t y_stride = 0;
  int64_t rows = 0;
  int valid = 0;
};

// Screening weights: 6 bits a value, u in [-31, 31] stored as u + 32. For every 16 values of k a block
// of 16 vocabulary rows has three 64-byte lines. Byte 4 n + i of line l holds u(k + 4 l + i) of row n
// in its low six bits; its top two bits are bits 2 l and 2 l + 1 of u(k + 12 + i).
inline constexpr int kHeadDepth = 16;       // k is padded to a multiple of this
inline constexpr int kHeadLineBytes = 192;  // for 16 rows and 16 values of k

// What screening must know of a row w and its 6-bit form u: w = scale * u + r.
struct HeadRow {
  float scale = 0.0F;
  float residual = 0.0F;  // at least ||r||
  float norm = 0.0F;      // at least ||w||
};

struct Kernels {
  Isa isa;

  NormStats (*norm_stats)(const RowNorm& norm, const float* x, int64_t n);
  // y = norm(x) given the stats; y may be x.
  void (*norm_apply)(const RowNorm& norm, const NormStats& stats, const float* x, float* y,
                     int64_t n);

  // Row `row` of a row block from x [shape.k]; norm may be null.
  void (*u4_quantize)(const U4Shape& shape, const RowNorm* norm, const float* x, const U4Rows& out,
                      int row);
  // acc[count][32] = rows [first, first + count) of the row block times one weight block.
  void (*u4_rows)(const U4Shape& shape, const uint8_t* block, const U4Rows& x, int first, int count,
                  float* acc);
  // The same for several row blocks at once on matrix units, or null. acc: 16 rows a row block.
  void (*u4_tiles)(const U4Shape& shape, const uint8_t* block, const U4Rows* x, int row_blocks,
                   float* acc);

  // acc[rows][32] = x[rows][k] (row stride x_stride) times a block; one fma chain over k a result.
  void (*dense_fma)(DenseType type, const void* block, int64_t k, const float* x, int64_t x_stride,
                    int64_t rows, float* acc);
  // Matrix units, or null both. x in two bf16 terms: planes [k / 32][hi, lo][rows][32] bf16.
  void (*bf16_split)(const RowNorm* norm, const NormStats& stats, const float* x, int64_t k,
                     uint16_t* planes, int rows, int row);
  // `count` neighbouring blocks of [k / 32][2][16][16][2] bf16; rows: of all row blocks; the sums
  // of block i go to acc + i * acc_stride, [rows rounded up to 16][32].
  void (*bf16_tiles)(const uint16_t* blocks, int count, int64_t k, const uint16_t* planes,
                     int64_t rows, float* acc, int64_t acc_stride);

  void (*finish)(const Finish& args);

  // Head: sum over i of row[i] * x[i], in one fixed order.
  float (*dot)(DenseType type, const void* row, const float* x, int64_t n);
  // One row to 6 bits, a byte each: u = round(w / scale) + 32 at out + (i / 4) * 64 + i % 4.
  HeadRow (*pack_head_row)(DenseType type, const void* row, int64_t n, uint8_t* out);
  // Screening: out[r][16] = for a block of 16 vocabulary rows in 6 bits the dot products with row r's
  // planes, less the offset (the start values): 256 * hi + lo as f32 (two roundings). k % 16 == 0.
  void (*screen)(const uint8_t* block, int64_t k, const int8_t* hi, const int8_t* lo,
                 int64_t plane_stride, const int32_t* hi_start, const int32_t* lo_start, int rows,
                 float* out);
};

// The table for `isa`, which this machine must have.
const Kernels& kernels_for(Isa isa);

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;

}  // namespace turbomind::cpu
