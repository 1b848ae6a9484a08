// The split kernel over the sixteen lanes of vec_*.inl and a register block of kBlockRows rows by
// kBlockVectors vectors: included once per instruction set, inside that set's brackets and an
// anonymous namespace.

// One register block of C = A B: rows of A are broadcast, B holds 16 * kVectors columns.
struct BlockTask {
  const float* a;            // [rows, kRowStride]
  const float* const* b;     // chunks of `chunk` rows
  int b_stride;
  int b_column;
  int chunk;                 // rows of B behind one pointer
  int depth;                 // rows of B in all
  float* c;                  // [rows, c_stride]
  int c_stride;
};

template <int kRows, int kVectors>
inline void multiply_block(const BlockTask& t) {
  F sum[kRows][kVectors];
  #pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    #pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = f_zero();
  }
  const float* a = t.a;
  for (int done = 0, i = 0; done < t.depth; done += t.chunk, ++i) {
    const float* b = t.b[i] + t.b_column;
    const int end = t.depth - done < t.chunk ? t.depth - done : t.chunk;
    for (int k = 0; k < end; ++k, b += t.b_stride, ++a) {
      F row[kVectors];
      #pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = f_load(b + v * kLanes);
      #pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const F x = f_set(a[r * kRowStride]);
        #pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = f_fma(x, row[v], sum[r][v]);
      }
    }
  }
  #pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    #pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      f_store(t.c + r * t.c_stride + v * kLanes, sum[r][v]);
    }
  }
}

template <int kRows, int kVectors>
inline void multiply_rows(int rows, const BlockTask& t) {
  if (rows == kRows) {
    multiply_block<kRows, kVectors>(t);
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1, kVectors>(rows, t);
  }
}

// All rows of the tile, kVectors vectors of columns at t.b_column.
template <int kVectors>
inline void multiply_tile(int rows, BlockTask t) {
  for (int done = 0; done < rows; done += kBlockRows) {
    multiply_rows<kBlockRows, kVectors>(rows - done < kBlockRows ? rows - done : kBlockRows, t);
    t.a += kBlockRows * kRowStride;
    t.c += kBlockRows * t.c_stride;
  }
}

inline void multiply_columns(int rows, int columns, BlockTask t) {
  const int first = t.b_column;
  float* c = t.c;
  int done = 0;
  for (; done + kBlockVectors * kLanes <= columns; done += kBlockVectors * kLanes) {
    t.b_column = first + done;
    t.c = c + done;
    multiply_tile<kBlockVectors>(rows, t);
  }
  for (; done < columns; done += kLanes) {
    t.b_column = first + done;
    t.c = c + done;
    multiply_tile<1>(rows, t);
  }
}

inline F exp_nonpositive_v(F x) {
  using namespace exp_constants;
  const F shifted = f_fma(x, f_set(kLog2E), f_set(kRound));
  const F n = f_sub(shifted, f_set(kRound));
  F r = f_fma(n, f_set(-kLn2High), x);
  r = f_fma(n, f_set(-kLn2Low), r);
  F y = f_set(kQ4);
  y = f_fma(y, r, f_set(kQ3));
  y = f_fma(y, r, f_set(kQ2));
  y = f_fma(y, r, f_set(kQ1));
  y = f_fma(y, r, f_set(kQ0));
  y = f_fma(y, r, f_set(1.0F));
  y = f_fma(y, r, f_set(1.0F));
  // The low bits of `shifted` are n: moved to the exponent they multiply by 2^n.
  const F power = f_bits(i_add(i_shl<23>(i_bits(shifted)), i_set(0x3f800000)));
  return f_select_gt(f_set(kLowest), x, f_zero(), f_mul(y, power));
}

alignas(64) constexpr float kLaneIndex[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                  8, 9, 10, 11, 12, 13, 14, 15};

inline float max_lane(F x) {
  alignas(64) float lanes[kLanes];
  f_store(lanes, x);
  float max = lanes[0];
  for (int i = 1; i < kLanes; ++i) max = lanes[i] > max ? lanes[i] : max;
  return max;
}

// Scores of one row → exponentials, zeros up to `columns`.
inline void softmax_row(const SplitTask& t, int row, int columns) {
  constexpr float kMinusInfinity = -__builtin_inff();
  float* p = t.scores + row * kRowStride;
  const int limit = t.limits[row] > 0 ? t.limits[row] : 0;
  const F scale = f_set(t.scale);
  const F lowest = f_set(kMinusInfinity);
  F best = lowest;
  for (int j = 0; j < limit; j += kLanes) {
    F s = f_mul(f_load(p + j), scale);
    if (limit - j < kLanes) s = f_select_gt(f_set(static_cast<float>(limit - j)), f_load(kLaneIndex), s, lowest);
    f_store(p + j, s);
    best = f_max(best, s);
  }
  const float max = max_lane(best);
  const F shift = f_set(max);
  F sum = f_zero();
  int j = 0;
  for (; j < limit; j += kLanes) {
    const F e = exp_nonpositive_v(f_sub(f_load(p + j), shift));
    f_store(p + j, e);
    sum = f_add(sum, e);
  }
  for (; j < columns; j += kLanes) f_store(p + j, f_zero());
  t.max[row] = limit > 0 ? max : kMinusInfinity;
  t.sum[row] = f_sum(sum);
}

void split_kernel(const SplitTask& t) {
  const int columns = (t.num_keys + kLanes - 1) / kLanes * kLanes;
  // scores
  for (int j = 0; j < columns; j += kChunkKeys) {
    const int width = columns - j < kChunkKeys ? columns - j : kChunkKeys;
    multiply_columns(t.rows, width,
                     {t.q, t.keys + j / kChunkKeys, t.key_stride, 0, t.head_dim, t.head_dim,
                      t.scores + j, kRowStride});
  }
  // probabilities
  for (int row = 0; row < t.rows; ++row) softmax_row(t, row, columns);
  // weighted values
  multiply_columns(t.rows, t.head_dim,
                   {t.scores, t.values, t.head_dim, 0, kChunkKeys, t.num_keys, t.out, t.head_dim});
}

// Eight rows of eight columns.
inline void transpose8(const float* from, int from_stride, float* to, int to_stride) {
  __m256 r[8];
  __m256 s[8];
  #pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
  #pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  #pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  #pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

void transpose16_kernel(const float* from, int from_stride, int columns, float* to,
                        int to_stride) {
  for (int c = 0; c < columns; c += 8) {
    transpose8(from + c, from_stride, to + c * to_stride, to_stride);
    transpose8(from + 8 * from_stride + c, from_stride, to + c * to_stride + 8, to_stride);
  }
}
