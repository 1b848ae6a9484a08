// Matrix-unit kernels. Included inside the namespace of AMX, after rows.inl. Tiles: 0-3 sums,
// 4-5 rows of x, 6-7 weights. Each function configures the tiles and releases them, so that a
// thread between ops carries no tile state through context switches.

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// x tiles: rows x depth_bytes; weight tiles: depth_bytes / 4 x 64 bytes; sums: rows x 16 words.
inline void configure(int rows0, int rows1, int depth_bytes) {
  TileConfig config;
  for (int t = 0; t < 4; ++t) {
    config.rows[t] = static_cast<uint8_t>(t < 2 ? rows0 : rows1);
    config.row_bytes[t] = 64;
  }
  config.rows[4] = static_cast<uint8_t>(rows0);
  config.rows[5] = static_cast<uint8_t>(rows1);
  config.row_bytes[4] = config.row_bytes[5] = static_cast<uint16_t>(depth_bytes);
  config.rows[6] = config.rows[7] = static_cast<uint8_t>(depth_bytes / 4);
  config.row_bytes[6] = config.row_bytes[7] = 64;
  _tile_loadconfig(&config);
}

// One group of one block as B tiles of q - zero: [step][low nibbles, high nibbles][step / 4][64].
inline void u4_unpack_group(const U4Shape& shape, const uint8_t* block, int64_t g, int8_t* tiles) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i spread = _mm512_set1_epi32(0x01010101);
  const __m128i* zeros =
      reinterpret_cast<const __m128i*>(block + shape.zeros_offset + g * kBlockColumns);
  const __m512i zero0 = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(zeros)), spread);
  const __m512i zero1 = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(zeros + 1)), spread);
  const uint8_t* line = block + shape.nibbles_offset + g * shape.group * 16;
  const int64_t tile = static_cast<int64_t>(shape.step) * 16;
  for (int step = 0; step < shape.group; step += shape.step) {
    for (int i = 0; i < shape.step; i += 4) {
      const __m512i both = _mm512_load_si512(line);
      _mm_prefetch(reinterpret_cast<const char*>(line) + kPrefetchBytes, _MM_HINT_T0);
      line += 64;
      const __m512i q0 = _mm512_and_si512(both, mask);
      const __m512i q1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
      _mm512_store_si512(tiles + i * 16, _mm512_sub_epi8(q0, zero0));
      _mm512_store_si512(tiles + tile + i * 16, _mm512_sub_epi8(q1, zero1));
    }
    tiles += 2 * tile;
  }
}

// sums [plane][half][16][16] = one row block times one group.
inline void u4_multiply_group(const U4Shape& shape, const int8_t* tiles, const int8_t* planes,
                              int64_t plane, int32_t* sums) {
  const int64_t tile = static_cast<int64_t>(shape.step) * 16;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < shape.group; step += shape.step) {
    _tile_loadd(6, tiles, 64);
    _tile_loadd(4, planes, shape.step);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, tiles + tile, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, planes + plane, shape.step);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    tiles += 2 * tile;
    planes += 2 * plane;
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

inline void u4_add_group(const int32_t* sums, const float* row_scale, int rows, F scale0, F scale1,
                         float* acc) {
  for (int r = 0; r < rows; ++r) {
    const F factor = f_set(row_scale[r]);
    for (int half = 0; half < 2; ++half) {
      const int32_t* hi = sums + half * 256 + r * 16;
      const I value = i_add(i_shl<8>(I{_mm512_load_si512(hi)}), I{_mm512_load_si512(hi + 512)});
      float* to = acc + r * kBlockColumns + half * 16;
      f_store(to, f_fma(f_from_i(value), f_mul(half == 0 ? scale0 : scale1, factor), f_load(to)));
    }
  }
}

// The sums of one row block are added while the matrix unit works on the next.
inline void u4_tiles(const U4Shape& shape, const uint8_t* block, const U4Rows* x, int row_blocks,
                     float* acc) {
  alignas(64) int8_t tiles[128 * kBlockColumns];
  alignas(64) int32_t sums[2][4 * 256];
  for (int b = 0; b < row_blocks; ++b) {
    std::memset(acc + b * kTileRows * kBlockColumns, 0,
                static_cast<size_t>(x[b].rows) * kBlockColumns * sizeof(float));
  }
  int rows = x[0].rows;
  configure(rows, rows, shape.step);
  for (int64_t g = 0; g < shape.groups; ++g) {
    u4_unpack_group(shape, block, g, tiles);
    const F scale0 = load_scales(shape.scale_type, block, g * kBlockColumns);
    const F scale1 = load_scales(shape.scale_type, block, g * kBlockColumns + 16);
    for (int b = 0; b <= row_blocks; ++b) {
      if (b < row_blocks) {
        if (x[b].rows != rows) {
          rows = x[b].rows;
          configure(rows, rows, shape.step);
        }
        const int64_t plane = static_cast<int64_t>(rows) * shape.step;
        u4_multiply_group(shape, tiles, x[b].planes + g * shape.group / shape.step * 2 * plane, plane,
                          sums[b & 1]);
      }
      if (b > 0) {
        const U4Rows& done = x[b - 1];
        u4_add_group(sums[(b - 1) & 1], done.scale + g * done.rows, done.rows, scale0, scale1,
                     acc + (b - 1) * kTileRows * kBlockColumns);
      }
    }
  }
  _tile_release();
}

// Two bf16 terms of one (normed) row: x = hi + lo + at most 2^-17 |x|. k is padded to 32 by zeros.
inline I bf16_round(F x) {  // bits of the nearest bf16 in the low half; finite x
  const I bits = i_bits(x);
  const I odd = i_and(i_sar<16>(bits), i_set(1));
  return i_sar<16>(i_add(bits, i_add(odd, i_set(0x7fff))));
}

inline void bf16_split(const RowNorm* norm, const NormStats& stats, const float* x, int64_t k,
                       uint16_t* planes, int rows, int row) {
  const int64_t plane = static_cast<int64_t>(rows) * 32;
  for (int64_t i = 0; i < k; i += 32) {
    alignas(64) float values[32] = {};
    const int64_t count = std::min<int64_t>(32, k - i);
    if (norm != nullptr) {
      RowNorm part = *norm;
      part.weight += i;
      if (part.bias != nullptr) part.bias += i;
      norm_apply(part, stats, x + i, values, count);
    } else {
      std::memcpy(values, x + i, static_cast<size_t>(count) * sizeof(float));
    }
    uint16_t* to = planes + i / 32 * 2 * plane + row * 32;
    for (int half = 0; half < 2; ++half) {
      const F value = f_load(values + half * 16);
      const I hi = bf16_round(value);
      const I lo = bf16_round(f_sub(value, f_bits(i_shl<16>(hi))));
      i_store_u16(to + half * 16, hi);
      i_store_u16(to + plane + half * 16, lo);
    }
  }
}

// Two row blocks (or one, of rows0 rows) times one block of 32 columns, all of k.
template <bool kTwo>
inline void bf16_multiply(const uint16_t* block, int64_t steps, const uint16_t* x0, int64_t plane0,
                          const uint16_t* x1, int64_t plane1, float* acc0, float* acc1) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, block, 64);
    _tile_loadd(4, x0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, block + 512, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, x1, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_loadd(4, x0 + plane0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, x1 + plane1, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      x1 += 2 * plane1;
    }
    x0 += 2 * plane0;
    block += 1024;
  }
  _tile_stored(0, acc0, kBlockColumns * sizeof(float));
  _tile_stored(1, acc0 + 16, kBlockColumns * sizeof(float));
  if constexpr (kTwo) {
    _tile_stored(2, acc1, kBlockColumns * sizeof(float));
    _tile_stored(3, acc1 + 16, kBlockColumns * sizeof(float));
  }
}

inline void bf16_tiles(const uint16_t* block, int64_t k, const uint16_t* planes, int64_t rows,
                       float* acc) {
  const int64_t steps = (k + 31) / 32;
  int configured0 = 0, configured1 = 0;
  while (rows > 0) {
    const int rows0 = static_cast<int>(std::min<int64_t>(rows, kTileRows));
    const int rows1 = static_cast<int>(std::min<int64_t>(rows - rows0, kTileRows));
    if (rows0 != configured0 || rows1 != configured1) {
      configure(rows0, std::max(rows1, 1), 64);
      configured0 = rows0;
      configured1 = rows1;
    }
    const uint16_t* x1 = planes + steps * 2 * rows0 * 32;
    float* acc1 = acc + kTileRows * kBlockColumns;
    if (rows1 > 0) {
      bf16_multiply<true>(block, steps, planes, rows0 * 32, x1, rows1 * 32, acc, acc1);
    } else {
      bf16_multiply<false>(block, steps, planes, rows0 * 32, x1, 0, acc, acc1);
    }
    planes = x1 + steps * 2 * rows1 * 32;
    acc += 2 * kTileRows * kBlockColumns;
    rows -= rows0 + rows1;
  }
  _tile_release();
}
