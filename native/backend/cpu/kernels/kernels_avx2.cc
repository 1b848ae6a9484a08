// AVX2 + FMA + F16C kernels. 4-bit dot products by vpmaddubsw: 15 * 128 * 2 = 3,840 fits 16 bits
// eight times over, so eight lines of k are added as i16 before they are widened.
#if defined(__x86_64__)
#include "backend/cpu/kernels/kernel_table.h"

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "backend/cpu/kernels/float_formats.h"

#include "backend/cpu/kernels/isa_avx2_begin.h"

namespace turbomind::cpu {
namespace avx2_kernels {
namespace {

constexpr int kFmaRows = 6;
constexpr int kFmaHalves = 1;

#include "backend/cpu/kernels/vec_avx2.inl"

#include "backend/cpu/kernels/rows.inl"

#include "backend/cpu/kernels/dense_rows.inl"

inline __m256i broadcast4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm256_set1_epi32(word);
}

// Columns [8 e, 8 e + 8) and [16 + 8 e, …) of one group: sums[nibble][plane], zero points applied.
struct Octets {
  __m256i v[2][2];
};

inline Octets octet_sums(const U4Shape& shape, const uint8_t* lines, const uint8_t* zeros,
                         const int8_t* planes, int64_t plane, int32_t minus_hi, int32_t minus_lo) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1);
  const __m256i start_hi = _mm256_set1_epi32(minus_hi), start_lo = _mm256_set1_epi32(minus_lo);
  Octets sums;
  for (int half = 0; half < 2; ++half) {
    const __m256i zero =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + half * 16)));
    sums.v[half][0] = _mm256_madd_epi16(zero, start_hi);  // the zero point's upper half is 0
    sums.v[half][1] = _mm256_madd_epi16(zero, start_lo);
  }
  for (int begin = 0; begin < shape.group; begin += 32) {
    const int8_t* hi = planes + (begin / shape.step) * 2 * plane + begin % shape.step;
    __m256i narrow[2][2] = {{_mm256_setzero_si256(), _mm256_setzero_si256()},
                            {_mm256_setzero_si256(), _mm256_setzero_si256()}};
    for (int i = 0; i < 32; i += 4) {
      const __m256i line = _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(lines + static_cast<int64_t>(begin + i) * 16));
      const __m256i first = _mm256_and_si256(line, mask);
      const __m256i second = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
      const __m256i x_hi = broadcast4(hi + i), x_lo = broadcast4(hi + plane + i);
      narrow[0][0] = _mm256_add_epi16(narrow[0][0], _mm256_maddubs_epi16(first, x_hi));
      narrow[0][1] = _mm256_add_epi16(narrow[0][1], _mm256_maddubs_epi16(first, x_lo));
      narrow[1][0] = _mm256_add_epi16(narrow[1][0], _mm256_maddubs_epi16(second, x_hi));
      narrow[1][1] = _mm256_add_epi16(narrow[1][1], _mm256_maddubs_epi16(second, x_lo));
    }
    for (int half = 0; half < 2; ++half) {
      for (int p = 0; p < 2; ++p) {
        sums.v[half][p] =
            _mm256_add_epi32(sums.v[half][p], _mm256_madd_epi16(narrow[half][p], ones));
      }
    }
  }
  return sums;
}

inline __m256 scales8(ScaleType type, const uint8_t* scales, int64_t at) {
  if (type == ScaleType::f16) {
    return _mm256_cvtph_ps(load_8x16(reinterpret_cast<const uint16_t*>(scales) + at));
  }
  if (type == ScaleType::bf16) return bf16_half(reinterpret_cast<const uint16_t*>(scales) + at);
  return _mm256_loadu_ps(reinterpret_cast<const float*>(scales) + at);
}

void u4_row(const U4Shape& shape, const uint8_t* block, const U4Rows& x, int row, float* acc) {
  const int64_t plane = static_cast<int64_t>(x.rows) * shape.step;
  __m256 total[2][2] = {{_mm256_setzero_ps(), _mm256_setzero_ps()},
                        {_mm256_setzero_ps(), _mm256_setzero_ps()}};  // [octet][nibble]
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t at = g * x.rows + row;
    const int8_t* planes = x.planes + g * shape.group / shape.step * 2 * plane + row * shape.step;
    const uint8_t* lines = block + shape.nibbles_offset + g * shape.group * 16;
    const uint8_t* zeros = block + shape.zeros_offset + g * kBlockColumns;
    const __m256 row_scale = _mm256_set1_ps(x.scale[at]);
    for (int e = 0; e < 2; ++e) {
      const Octets sums = octet_sums(shape, lines + 32 * e, zeros + 8 * e, planes, plane,
                                     x.minus_hi[at], x.minus_lo[at]);
      for (int half = 0; half < 2; ++half) {
        const __m256i both =
            _mm256_add_epi32(_mm256_slli_epi32(sums.v[half][0], 8), sums.v[half][1]);
        const __m256 scale =
            scales8(shape.scale_type, block, g * kBlockColumns + half * 16 + e * 8);
        total[e][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(both), _mm256_mul_ps(scale, row_scale),
                                         total[e][half]);
      }
    }
  }
  for (int e = 0; e < 2; ++e) {
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(acc + half * 16 + e * 8, total[e][half]);
  }
}

void u4_rows(const U4Shape& shape, const uint8_t* block, const U4Rows& x, int first, int count,
             float* acc) {
  for (int r = 0; r < count; ++r) u4_row(shape, block, x, first + r, acc + r * kBlockColumns);
}

inline __m256i load_line(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

inline __m256i broadcast_word(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}

// 63 * 128 * 2 < 2^15: vpmaddubsw cannot saturate.
void screen(const uint8_t* block, int64_t k, const int8_t* hi, const int8_t* lo,
            int64_t plane_stride, const int32_t* hi_start, const int32_t* lo_start, int rows,
            float* out) {
  const __m256i low_six = _mm256_set1_epi8(0x3f), ones = _mm256_set1_epi16(1);
  const auto dot = [&](__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
  };
  for (int r = 0; r < rows; ++r) {
    for (int half = 0; half < 2; ++half) {  // eight vocabulary rows
      __m256i sum_hi = _mm256_set1_epi32(hi_start[r]), sum_lo = _mm256_set1_epi32(lo_start[r]);
      const uint8_t* line = block + half * 32;
      for (int64_t i = 0; i < k; i += kHeadDepth, line += kHeadLineBytes) {
        const __m256i l0 = load_line(line), l1 = load_line(line + 64), l2 = load_line(line + 128);
        const __m256i a = _mm256_and_si256(_mm256_srli_epi32(l0, 6), _mm256_set1_epi8(0x03));
        const __m256i b = _mm256_and_si256(_mm256_srli_epi32(l1, 4), _mm256_set1_epi8(0x0c));
        const __m256i c = _mm256_and_si256(_mm256_srli_epi32(l2, 2), _mm256_set1_epi8(0x30));
        const __m256i w[4] = {_mm256_and_si256(l0, low_six), _mm256_and_si256(l1, low_six),
                              _mm256_and_si256(l2, low_six),
                              _mm256_or_si256(a, _mm256_or_si256(b, c))};
        const int8_t* x_hi = hi + r * plane_stride + i;
        const int8_t* x_lo = lo + r * plane_stride + i;
        for (int part = 0; part < 4; ++part) {
          sum_hi = dot(sum_hi, w[part], broadcast_word(x_hi + 4 * part));
          sum_lo = dot(sum_lo, w[part], broadcast_word(x_lo + 4 * part));
        }
      }
      _mm256_storeu_ps(out + r * 16 + half * 8,
                       _mm256_fmadd_ps(_mm256_set1_ps(256.0F), _mm256_cvtepi32_ps(sum_hi),
                                       _mm256_cvtepi32_ps(sum_lo)));
    }
  }
}

}  // namespace
}  // namespace avx2_kernels
}  // namespace turbomind::cpu

#include "backend/cpu/kernels/isa_end.h"

namespace turbomind::cpu {

const Kernels kAvx2Kernels = {
    .isa = Isa::avx2,
    .norm_stats = avx2_kernels::norm_stats,
    .norm_apply = avx2_kernels::norm_apply,
    .u4_quantize = avx2_kernels::u4_quantize,
    .u4_rows = avx2_kernels::u4_rows,
    .u4_tiles = nullptr,
    .dense_fma = avx2_kernels::dense_fma,
    .bf16_split = nullptr,
    .bf16_tiles = nullptr,
    .finish = avx2_kernels::finish,
    .dot = avx2_kernels::dot,
    .pack_head_row = avx2_kernels::pack_head_row,
    .screen = avx2_kernels::screen,
};

}  // namespace turbomind::cpu
#endif  // __x86_64__
