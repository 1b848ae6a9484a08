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

// The tile instructions with the tile's number as a template value (the intrinsics want a literal).
// Loads do not name the memory they read, so that vector code may move across them: what they read
// must be written out before, by publish_stores.
inline void publish_stores() { __asm__ volatile("" ::: "memory"); }
template <int kTile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile));
}
template <int kTile>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kSum, int kX, int kW>  // sum += x * w, int8 by int8
inline void tile_multiply_s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kW));
}
template <int kSum, int kX, int kW>  // sum += x * w, int8 by uint8
inline void tile_multiply_s8u8() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kW));
}
template <int kSum, int kX, int kW>  // sum += x * w, bf16 pairs
inline void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kX), "i"(kW));
}

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
  publish_stores();
  _tile_loadconfig(&config);
}

// One group of one block as B tiles of q - zero: [step][low nibbles, high nibbles][step / 4][64].
inline void u4_unpack_group(const U4Shape& shape, const uint8_t* block, int64_t g, int8_t* tiles) {
  const __m512i mask = _mm512_set1_epi8(15);
  const __m512i spread = _mm512_set1_epi32(0x01010101);
  const __m128i* zeros =
      reinterpret_cast<const __m128i*>(block + shape.zeros_offset + g * kBlockColumns);
  const __m512i zero0 = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(zeros)), spread);
  const __m512i zero1 =
      _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128(zeros + 1)), spread);
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

// Integer sums waiting to be scaled and added: one row block and group. Always 16 rows: what
// missing rows hold is added to sums that nobody reads.
struct U4Pending {
  const int32_t* sums = nullptr;     // [hi, lo][low columns, high columns][16][16]
  const float* row_scale = nullptr;  // [16]
  F scale[2];                        // of the 32 columns
  float* acc = nullptr;              // [16][32]
};

template <int kBegin, int kEnd>
inline void u4_add(const U4Pending& p) {
#pragma GCC unroll 16
  for (int r = kBegin; r < kEnd; ++r) {
    const F factor = f_set(p.row_scale[r]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int32_t* sums = p.sums + half * 256 + r * 16;
      const I hi{_mm512_load_si512(sums)}, lo{_mm512_load_si512(sums + 512)};
      float* to = p.acc + r * kBlockColumns + half * 16;
      const F value = f_from_i(i_add(i_shl<8>(hi), lo));
      f_store(to, f_fma(value, f_mul(p.scale[half], factor), f_load(to)));
    }
  }
}

template <int kLines>
inline void prefetch_lines(const int8_t* p) {
#pragma GCC unroll 16
  for (int i = 0; i < kLines; ++i)
    _mm_prefetch(reinterpret_cast<const char*>(p) + i * 64, _MM_HINT_T0);
}

// Sum tile kTile of the unit before goes to memory and starts anew.
template <int kTile>
inline void u4_turn(int32_t* store_to) {
  tile_store<kTile>(store_to + kTile * 256, 64);
  tile_zero<kTile>();
}

// One unit: a row block times one group. Between its products stand the stores of the unit before
// and the additions of the unit before that: vector, store and matrix work overlap only when the
// program mixes them, because tiles are not renamed and what waits for one holds back what follows
// (measured: 187 ns a unit one after the other; 56 ns for the products alone). `soon`: the 4 kB of
// x that the next unit will load; tile loads that miss the first cache stall everything.
inline void u4_unit(const U4Shape& shape, const int8_t* tiles, const int8_t* planes, int64_t plane,
                    int32_t* store_to, const U4Pending& add, const int8_t* soon) {
  const int64_t tile = static_cast<int64_t>(shape.step) * 16;
  publish_stores();
  tile_load<6>(tiles, 64);
  tile_load<4>(planes, shape.step);
  u4_turn<0>(store_to);
  tile_multiply_s8<0, 4, 6>();
  prefetch_lines<8>(soon);
  u4_add<0, 2>(add);
  tile_load<7>(tiles + tile, 64);
  u4_turn<1>(store_to);
  tile_multiply_s8<1, 4, 7>();
  prefetch_lines<8>(soon + 512);
  u4_add<2, 4>(add);
  tile_load<5>(planes + plane, shape.step);
  u4_turn<2>(store_to);
  tile_multiply_s8<2, 5, 6>();
  prefetch_lines<8>(soon + 1024);
  u4_add<4, 6>(add);
  u4_turn<3>(store_to);
  tile_multiply_s8<3, 5, 7>();
  prefetch_lines<8>(soon + 1536);
  u4_add<6, 8>(add);
  if (shape.group == shape.step) {
    u4_add<8, 16>(add);
    return;
  }
  tile_load<6>(tiles + 2 * tile, 64);
  tile_load<4>(planes + 2 * plane, shape.step);
  tile_multiply_s8<0, 4, 6>();
  prefetch_lines<8>(soon + 2048);
  u4_add<8, 10>(add);
  tile_load<7>(tiles + 3 * tile, 64);
  tile_multiply_s8<1, 4, 7>();
  prefetch_lines<8>(soon + 2560);
  u4_add<10, 12>(add);
  tile_load<5>(planes + 3 * plane, shape.step);
  tile_multiply_s8<2, 5, 6>();
  prefetch_lines<8>(soon + 3072);
  u4_add<12, 14>(add);
  tile_multiply_s8<3, 5, 7>();
  prefetch_lines<8>(soon + 3584);
  u4_add<14, 16>(add);
}

// Row blocks other than a lone one are multiplied as 16 rows: the last one's missing rows read
// whatever follows it in scratch, and their sums are ignored.
inline void u4_tiles(const U4Shape& shape, const uint8_t* block, const U4Rows* x, int row_blocks,
                     float* acc) {
  alignas(64) int8_t tiles[2][128 * kBlockColumns];
  alignas(64) int32_t sums[2][4 * 256] = {};
  // Missing rows too: what lay there could be denormal, and slow to add to.
  std::memset(acc, 0, static_cast<size_t>(row_blocks) * kTileRows * kBlockColumns * sizeof(float));
  const int rows = row_blocks == 1 ? x[0].rows : kTileRows;
  configure(rows, rows, shape.step);
  // `stored`: the unit whose sums the next unit stores; `ready`: whose sums lie in memory. The
  // first two units find sums of nothing there: zeros, added to zeros.
  alignas(64) static constexpr float kNoScale[kTileRows] = {};
  const U4Pending nothing = {sums[0], kNoScale, {f_zero(), f_zero()}, acc};
  U4Pending stored = nothing, ready = nothing;
  int turn = 0;
  u4_unpack_group(shape, block, 0, tiles[0]);
  for (int64_t g = 0; g < shape.groups; ++g) {
    if (g + 1 < shape.groups) u4_unpack_group(shape, block, g + 1, tiles[(g + 1) & 1]);
    const F scale0 = load_scales(shape.scale_type, block, g * kBlockColumns);
    const F scale1 = load_scales(shape.scale_type, block, g * kBlockColumns + 16);
    for (int b = 0; b < row_blocks; ++b, turn ^= 1) {
      const int64_t plane = static_cast<int64_t>(x[b].rows) * shape.step;
      const int8_t* planes = x[b].planes + g * shape.group / shape.step * 2 * plane;
      const bool last = b + 1 == row_blocks;
      const int8_t* soon = last ? x[0].planes + (g + 1) * x[0].rows * shape.group * 2
                                : x[b + 1].planes + g * x[b + 1].rows * shape.group * 2;
      u4_unit(shape, tiles[g & 1], planes, plane, sums[turn ^ 1], ready, soon);
      ready = stored;
      stored = {sums[turn],
                x[b].scale + g * x[b].rows,
                {scale0, scale1},
                acc + b * kTileRows * kBlockColumns};
    }
  }
  u4_add<0, kTileRows>(ready);
  tile_store<0>(sums[turn ^ 1], 64);
  tile_store<1>(sums[turn ^ 1] + 256, 64);
  tile_store<2>(sums[turn ^ 1] + 512, 64);
  tile_store<3>(sums[turn ^ 1] + 768, 64);
  u4_add<0, kTileRows>(stored);
  _tile_release();
}

// `screen` for up to 16 rows at once; few rows are as fast on vectors.
inline void screen_tiles(const uint8_t* block, int64_t k, const int8_t* hi, const int8_t* lo,
                         int64_t plane_stride, const int32_t* hi_start, const int32_t* lo_start,
                         int rows, float* out) {
  if (rows <= 4 || rows > kTileRows || k % 64 != 0) {
    screen(block, k, hi, lo, plane_stride, hi_start, lo_start, rows, out);
    return;
  }
  alignas(64) int32_t sums[2][256];
  configure(rows, rows, 64);
  tile_zero<0>();
  tile_zero<1>();
  alignas(64) uint8_t tile[2][1024];
  for (int64_t i = 0; i < k; i += 64) {
    uint8_t* to = tile[i / 64 & 1];
    for (int64_t j = 0; j < 64; j += kHeadDepth) {
      const HeadLines lines = head_lines(block + (i + j) / kHeadDepth * kHeadLineBytes);
      for (int part = 0; part < 4; ++part) _mm512_store_si512(to + j * 16 + part * 64, lines.v[part]);
    }
    publish_stores();
    tile_load<6>(to, 64);
    tile_load<4>(hi + i, plane_stride);
    tile_multiply_s8u8<0, 4, 6>();
    tile_load<5>(lo + i, plane_stride);
    tile_multiply_s8u8<1, 5, 6>();
  }
  tile_store<0>(sums[0], 64);
  tile_store<1>(sums[1], 64);
  _tile_release();
  for (int r = 0; r < rows; ++r) {
    const I sum_hi = i_add(I{_mm512_load_si512(sums[0] + r * 16)}, i_set(hi_start[r]));
    const I sum_lo = i_add(I{_mm512_load_si512(sums[1] + r * 16)}, i_set(lo_start[r]));
    f_store(out + r * 16, f_fma(f_set(256.0F), f_from_i(sum_hi), f_from_i(sum_lo)));
  }
}

// Two bf16 terms of one (normed) row: x = hi + lo + at most 2^-17 |x|. k is padded to 32 by zeros.
inline I bf16_round(F x) {  // bits of the nearest bf16 in the low half; finite x
  const I bits = i_bits(x);
  const I odd = i_and(i_sar<16>(bits), i_set(1));
  return i_sar<16>(i_add(bits, i_add(odd, i_set(0x7fff))));
}

inline void bf16_store_terms(F value, uint16_t* hi_to, uint16_t* lo_to) {
  const I hi = bf16_round(value);
  i_store_u16(hi_to, hi);
  i_store_u16(lo_to, bf16_round(f_sub(value, f_bits(i_shl<16>(hi)))));
}

inline void bf16_split(const RowNorm* norm, const NormStats& stats, const float* x, int64_t k,
                       uint16_t* planes, int rows, int row) {
  const int64_t plane = static_cast<int64_t>(rows) * 32;
  uint16_t* to = planes + row * 32;
  for (int64_t i = 0; i < k; i += 32, to += 2 * plane) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * 16, count = std::clamp<int64_t>(k - at, 0, 16);
      const auto load = [&](const float* p) {
        return count == 16 ? f_load(p + at) : count == 0 ? f_zero() : f_load_part(p + at, count);
      };
      F value = load(x);
      if (norm != nullptr) {
        const F bias = norm->bias != nullptr ? load(norm->bias) : f_zero();
        value =
            norm_lanes(stats, value, load(norm->weight), bias);  // past k: weight and bias are 0
      }
      bf16_store_terms(value, to + half * 16, to + plane + half * 16);
    }
  }
}

// Two row blocks (or one) times one block of columns over `steps` tiles of k. Sums go on from acc
// unless `first`. The next step's tiles are asked for a step ahead: loads that miss stall the
// products.
template <bool kTwo>
inline void bf16_multiply(const uint16_t* block, int64_t steps, const uint16_t* x0, int64_t plane0,
                          const uint16_t* x1, int64_t plane1, float* acc0, float* acc1,
                          bool first) {
  constexpr int64_t kStride = kBlockColumns * sizeof(float);
  constexpr int64_t kAhead =
      kTwo ? 1024 : 2048;  // weights: one row block takes half the time a step
  publish_stores();
  if (first) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  } else {
    tile_load<0>(acc0, kStride);
    tile_load<1>(acc0 + 16, kStride);
    if constexpr (kTwo) {
      tile_load<2>(acc1, kStride);
      tile_load<3>(acc1 + 16, kStride);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    const int8_t* soon0 = reinterpret_cast<const int8_t*>(x0 + 2 * plane0);
    const int8_t* soon1 = reinterpret_cast<const int8_t*>(x1 + 2 * plane1);
    const int8_t* soon_w = reinterpret_cast<const int8_t*>(block + kAhead);
    tile_load<6>(block, 64);
    tile_load<4>(x0, 64);
    tile_multiply_bf16<0, 4, 6>();
    prefetch_lines<16>(soon_w);
    tile_load<7>(block + 512, 64);
    tile_multiply_bf16<1, 4, 7>();
    prefetch_lines<16>(soon_w + 1024);
    if constexpr (kTwo) {
      tile_load<5>(x1, 64);
      tile_multiply_bf16<2, 5, 6>();
      prefetch_lines<16>(soon0);
      tile_multiply_bf16<3, 5, 7>();
      prefetch_lines<16>(soon0 + 1024);
    }
    tile_load<4>(x0 + plane0, 64);
    tile_multiply_bf16<0, 4, 6>();
    tile_multiply_bf16<1, 4, 7>();
    if constexpr (kTwo) {
      prefetch_lines<16>(soon1);
      tile_load<5>(x1 + plane1, 64);
      tile_multiply_bf16<2, 5, 6>();
      prefetch_lines<16>(soon1 + 1024);
      tile_multiply_bf16<3, 5, 7>();
      x1 += 2 * plane1;
    }
    x0 += 2 * plane0;
    block += 1024;
  }
  tile_store<0>(acc0, kStride);
  tile_store<1>(acc0 + 16, kStride);
  if constexpr (kTwo) {
    tile_store<2>(acc1, kStride);
    tile_store<3>(acc1 + 16, kStride);
  }
}

// A pair of row blocks over 256 of k (32 kB) stays in the first cache while all blocks of columns
// pass; sums rest in `acc` between such pieces, which changes no bit.
inline void bf16_tiles(const uint16_t* blocks, int count, int64_t k, const uint16_t* planes,
                       int64_t rows, float* acc, int64_t acc_stride) {
  constexpr int64_t kPiece = 8;
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
    const int64_t plane0 = rows0 * 32, plane1 = rows1 * 32;
    const uint16_t* second = planes + steps * 2 * plane0;
    const int64_t piece = count > 1 ? kPiece : steps;
    for (int64_t s = 0; s < steps; s += piece) {
      const int64_t part = std::min(piece, steps - s);
      const uint16_t* x0 = planes + s * 2 * plane0;
      const uint16_t* x1 = second + s * 2 * plane1;
      for (int i = 0; i < count; ++i) {
        const uint16_t* block = blocks + (i * steps + s) * 1024;
        float* acc0 = acc + i * acc_stride;
        float* acc1 = acc0 + kTileRows * kBlockColumns;
        if (rows1 > 0) {
          bf16_multiply<true>(block, part, x0, plane0, x1, plane1, acc0, acc1, s == 0);
        } else {
          bf16_multiply<false>(block, part, x0, plane0, x1, plane1, acc0, acc1, s == 0);
        }
      }
    }
    planes = second + steps * 2 * plane1;
    acc += 2 * kTileRows * kBlockColumns;
    rows -= rows0 + rows1;
  }
  _tile_release();
}
