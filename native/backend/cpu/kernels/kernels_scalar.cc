// Plain C++ kernels: run anywhere and judge every other table (4-bit results must be bit-equal).
#include "backend/cpu/kernels/kernel_table.h"

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels/float_formats.h"

namespace turbomind::cpu {
namespace scalar_kernels {
namespace {

constexpr int kFmaRows = 1;
constexpr int kFmaHalves = 1;

#include "backend/cpu/kernels/vec_scalar.inl"

#include "backend/cpu/kernels/rows.inl"

#include "backend/cpu/kernels/dense_rows.inl"

// Exact integer dot products of one group: [plane][column].
struct GroupSums {
  int32_t v[2][kBlockColumns];
};

GroupSums group_sums(const U4Shape& shape, const uint8_t* nibbles, const U4Rows& x, int row,
                     int64_t g) {
  GroupSums sums = {};
  for (int i = 0; i < shape.group; ++i) {
    const int64_t k = g * shape.group + i;
    const int8_t* plane =
        x.planes + (k / shape.step) * 2 * x.rows * shape.step + row * shape.step + k % shape.step;
    const int32_t hi = plane[0];
    const int32_t lo = plane[x.rows * shape.step];
    const uint8_t* line = nibbles + (k / 4) * 64 + k % 4;
    for (int n = 0; n < 16; ++n) {
      const int32_t first = line[4 * n] & 15;
      const int32_t second = line[4 * n] >> 4;
      sums.v[0][n] += first * hi;
      sums.v[1][n] += first * lo;
      sums.v[0][n + 16] += second * hi;
      sums.v[1][n + 16] += second * lo;
    }
  }
  return sums;
}

void u4_rows(const U4Shape& shape, const uint8_t* block, const U4Rows& x, int first, int count,
             float* acc) {
  const uint8_t* zeros = block + shape.zeros_offset;
  for (int r = 0; r < count; ++r) {
    F sum[2] = {f_zero(), f_zero()};
    for (int64_t g = 0; g < shape.groups; ++g) {
      const GroupSums sums = group_sums(shape, block + shape.nibbles_offset, x, first + r, g);
      const int64_t at = g * x.rows + first + r;
      for (int half = 0; half < 2; ++half) {
        const F value = f_map([&](int n) {
          const int column = half * 16 + n;
          const int32_t zero = zeros[g * kBlockColumns + column];
          const int32_t hi = sums.v[0][column] + zero * x.minus_hi[at];
          const int32_t lo = sums.v[1][column] + zero * x.minus_lo[at];
          return static_cast<float>(hi * 256 + lo);  // |.| <= 15 * 128 * 32639 < 2^26: exact in i32
        });
        const F scale = load_scales(shape.scale_type, block, g * kBlockColumns + half * 16);
        sum[half] = f_fma(value, f_mul(scale, f_set(x.scale[at])), sum[half]);
      }
    }
    f_store(acc + r * kBlockColumns, sum[0]);
    f_store(acc + r * kBlockColumns + 16, sum[1]);
  }
}

void screen(const uint8_t* block, int64_t k, const int8_t* hi, const int8_t* lo,
            int64_t plane_stride, const int32_t* hi_start, const int32_t* lo_start, int rows,
            float* out) {
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < 16; ++n) {
      int32_t sum_hi = hi_start[r], sum_lo = lo_start[r];
      for (int64_t i = 0; i < k; ++i) {
        const uint8_t* line = block + i / kHeadDepth * kHeadLineBytes + 4 * n + i % 4;
        const int64_t part = i % kHeadDepth / 4;
        const int32_t weight = part < 3 ? line[64 * part] & 63
                                        : line[0] >> 6 | line[64] >> 6 << 2 | line[128] >> 6 << 4;
        sum_hi += weight * hi[r * plane_stride + i];
        sum_lo += weight * lo[r * plane_stride + i];
      }
      out[r * 16 + n] = std::fma(256.0F, static_cast<float>(sum_hi), static_cast<float>(sum_lo));
    }
  }
}

}  // namespace
}  // namespace scalar_kernels

const Kernels kScalarKernels = {
    .isa = Isa::scalar,
    .norm_stats = scalar_kernels::norm_stats,
    .norm_apply = scalar_kernels::norm_apply,
    .u4_quantize = scalar_kernels::u4_quantize,
    .u4_rows = scalar_kernels::u4_rows,
    .u4_tiles = nullptr,
    .dense_fma = scalar_kernels::dense_fma,
    .bf16_split = nullptr,
    .bf16_tiles = nullptr,
    .finish = scalar_kernels::finish,
    .dot = scalar_kernels::dot,
    .pack_head_row = scalar_kernels::pack_head_row,
    .screen = scalar_kernels::screen,
};

}  // namespace turbomind::cpu
