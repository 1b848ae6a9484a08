// 4-bit and 8-bit dot products by vpdpbusd, for a few rows of x. Included inside the namespace of
// AVX-512 and of AMX (which takes them for single rows), after rows.inl.

inline __m512i broadcast4(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

// How far ahead of its use a line of weights is asked for; past the end of a block lies the next.
constexpr int64_t kPrefetchBytes = 8192;

template <int kRows>
inline void u4_some_rows(const U4Shape& shape, const uint8_t* block, const U4Rows& x, int first,
                         float* acc) {
  const __m512i mask = _mm512_set1_epi8(15);
  const int64_t plane = static_cast<int64_t>(x.rows) * shape.step;
  const uint8_t* line = block + shape.nibbles_offset;
  const int8_t* planes = x.planes + first * shape.step;
  F total[kRows][2];
  for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = f_zero();
  for (int64_t g = 0; g < shape.groups; ++g) {
    const int64_t at = g * x.rows + first;
    const __m128i* zeros =
        reinterpret_cast<const __m128i*>(block + shape.zeros_offset + g * kBlockColumns);
    const __m512i zero0 = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros));
    const __m512i zero1 = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros + 1));
    __m512i hi[kRows][2], lo[kRows][2];
    for (int r = 0; r < kRows; ++r) {  // start from minus zero * sum(x): both fit 16 bits
      const __m512i minus_hi = _mm512_set1_epi32(x.minus_hi[at + r]);
      const __m512i minus_lo = _mm512_set1_epi32(x.minus_lo[at + r]);
      hi[r][0] = _mm512_madd_epi16(zero0, minus_hi);
      hi[r][1] = _mm512_madd_epi16(zero1, minus_hi);
      lo[r][0] = _mm512_madd_epi16(zero0, minus_lo);
      lo[r][1] = _mm512_madd_epi16(zero1, minus_lo);
    }
    for (int step = 0; step < shape.group; step += shape.step) {
      for (int i = 0; i < shape.step; i += 4) {
        const __m512i both = _mm512_load_si512(line);
        _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
        line += 64;
        const __m512i q0 = _mm512_and_si512(both, mask);
        const __m512i q1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
        for (int r = 0; r < kRows; ++r) {
          const __m512i x_hi = broadcast4(planes + r * shape.step + i);
          const __m512i x_lo = broadcast4(planes + plane + r * shape.step + i);
          hi[r][0] = _mm512_dpbusd_epi32(hi[r][0], q0, x_hi);
          hi[r][1] = _mm512_dpbusd_epi32(hi[r][1], q1, x_hi);
          lo[r][0] = _mm512_dpbusd_epi32(lo[r][0], q0, x_lo);
          lo[r][1] = _mm512_dpbusd_epi32(lo[r][1], q1, x_lo);
        }
      }
      planes += 2 * plane;
    }
    for (int half = 0; half < 2; ++half) {
      const F scale = load_scales(shape.scale_type, block, g * kBlockColumns + half * 16);
      for (int r = 0; r < kRows; ++r) {
        const I value = i_add(i_shl<8>(I{hi[r][half]}), I{lo[r][half]});
        total[r][half] =
            f_fma(f_from_i(value), f_mul(scale, f_set(x.scale[at + r])), total[r][half]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    f_store(acc + r * kBlockColumns, total[r][0]);
    f_store(acc + r * kBlockColumns + 16, total[r][1]);
  }
}

inline void u4_rows(const U4Shape& shape, const uint8_t* block, const U4Rows& x, int first,
                    int count, float* acc) {
  for (; count >= 4; count -= 4, first += 4, acc += 4 * kBlockColumns) {
    u4_some_rows<4>(shape, block, x, first, acc);
  }
  if (count == 3) u4_some_rows<3>(shape, block, x, first, acc);
  if (count == 2) u4_some_rows<2>(shape, block, x, first, acc);
  if (count == 1) u4_some_rows<1>(shape, block, x, first, acc);
}

// Three lines of a head block to the four lines of bytes (u + 32) that they hold.
struct HeadLines {
  __m512i v[4];
};
inline HeadLines head_lines(const uint8_t* line) {
  const __m512i low_six = _mm512_set1_epi8(0x3f);
  const __m512i l0 = _mm512_load_si512(line);
  const __m512i l1 = _mm512_load_si512(line + 64);
  const __m512i l2 = _mm512_load_si512(line + 128);
  for (int p = 0; p < kHeadLineBytes; p += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(line) + p + kPrefetchBytes, _MM_HINT_T0);
  }
  // 0xf8: a | (b & c). The top bit pairs of the three lines make the fourth value.
  __m512i last = _mm512_and_si512(_mm512_srli_epi32(l0, 6), _mm512_set1_epi8(0x03));
  last = _mm512_ternarylogic_epi32(last, _mm512_srli_epi32(l1, 4), _mm512_set1_epi8(0x0c), 0xf8);
  last = _mm512_ternarylogic_epi32(last, _mm512_srli_epi32(l2, 2), _mm512_set1_epi8(0x30), 0xf8);
  return {{_mm512_and_si512(l0, low_six), _mm512_and_si512(l1, low_six),
           _mm512_and_si512(l2, low_six), last}};
}

template <int kRows>
inline void screen_rows(const uint8_t* block, int64_t k, const int8_t* hi, const int8_t* lo,
                        int64_t plane_stride, const int32_t* hi_start, const int32_t* lo_start,
                        float* out) {
  __m512i sum_hi[kRows], sum_lo[kRows];
  for (int r = 0; r < kRows; ++r) {
    sum_hi[r] = _mm512_set1_epi32(hi_start[r]);
    sum_lo[r] = _mm512_set1_epi32(lo_start[r]);
  }
  const uint8_t* line = block;
  for (int64_t i = 0; i < k; i += kHeadDepth, line += kHeadLineBytes) {
    const HeadLines w = head_lines(line);
    for (int r = 0; r < kRows; ++r) {
      const int8_t* x_hi = hi + r * plane_stride + i;
      const int8_t* x_lo = lo + r * plane_stride + i;
      for (int part = 0; part < 4; ++part) {
        sum_hi[r] = _mm512_dpbusd_epi32(sum_hi[r], w.v[part], broadcast4(x_hi + 4 * part));
        sum_lo[r] = _mm512_dpbusd_epi32(sum_lo[r], w.v[part], broadcast4(x_lo + 4 * part));
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    f_store(out + r * 16, f_fma(f_set(256.0F), f_from_i(I{sum_hi[r]}), f_from_i(I{sum_lo[r]})));
  }
}

inline void screen(const uint8_t* block, int64_t k, const int8_t* hi, const int8_t* lo,
                   int64_t plane_stride, const int32_t* hi_start, const int32_t* lo_start, int rows,
                   float* out) {
  for (; rows >= 8; rows -= 8) {
    screen_rows<8>(block, k, hi, lo, plane_stride, hi_start, lo_start, out);
    hi += 8 * plane_stride;
    lo += 8 * plane_stride;
    hi_start += 8;
    lo_start += 8;
    out += 8 * 16;
  }
  for (; rows >= 2; rows -= 2) {
    screen_rows<2>(block, k, hi, lo, plane_stride, hi_start, lo_start, out);
    hi += 2 * plane_stride;
    lo += 2 * plane_stride;
    hi_start += 2;
    lo_start += 2;
    out += 2 * 16;
  }
  if (rows == 1) screen_rows<1>(block, k, hi, lo, plane_stride, hi_start, lo_start, out);
}
