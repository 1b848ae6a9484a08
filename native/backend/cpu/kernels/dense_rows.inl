// Dense layers by fma, and the head's dot products, on sixteen logical lanes. Included inside the
// namespace of one instruction set, after its vec_*.inl. kFmaRows: rows of x whose sums fit the
// registers beside two vectors of weights.

template <DenseType kType>
inline F load_weights(const void* p, int64_t at) {
  if constexpr (kType == DenseType::f32) return f_load(static_cast<const float*>(p) + at);
  if constexpr (kType == DenseType::f16) return f_load_f16(static_cast<const uint16_t*>(p) + at);
  if constexpr (kType == DenseType::bf16) return f_load_bf16(static_cast<const uint16_t*>(p) + at);
}

// kRows x (16 * kHalves) results, one fma chain over k each.
template <DenseType kType, int kRows, int kHalves>
inline void fma_tile(const void* block, int64_t k, const float* x, int64_t x_stride, int column,
                     float* acc) {
  F sum[kRows][kHalves];
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHalves; ++h) sum[r][h] = f_zero();
  }
  for (int64_t i = 0; i < k; ++i) {
    F w[kHalves];
    for (int h = 0; h < kHalves; ++h) {
      w[h] = load_weights<kType>(block, i * kBlockColumns + column + h * 16);
    }
    for (int r = 0; r < kRows; ++r) {
      const F value = f_set(x[r * x_stride + i]);
      for (int h = 0; h < kHalves; ++h) sum[r][h] = f_fma(value, w[h], sum[r][h]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int h = 0; h < kHalves; ++h) f_store(acc + r * kBlockColumns + column + h * 16, sum[r][h]);
  }
}

template <DenseType kType, int kRows>
inline void fma_rows(const void* block, int64_t k, const float* x, int64_t x_stride, int64_t rows,
                     float* acc) {
  for (; rows >= kRows; rows -= kRows) {
    for (int column = 0; column < kBlockColumns; column += 16 * kFmaHalves) {
      fma_tile<kType, kRows, kFmaHalves>(block, k, x, x_stride, column, acc);
    }
    x += kRows * x_stride;
    acc += kRows * kBlockColumns;
  }
  if constexpr (kRows > 1) {
    if (rows > 0) fma_rows<kType, (kRows > 4 ? 4 : kRows > 2 ? 2 : 1)>(block, k, x, x_stride, rows, acc);
  }
}

inline void dense_fma(DenseType type, const void* block, int64_t k, const float* x, int64_t x_stride,
                      int64_t rows, float* acc) {
  if (type == DenseType::f32) fma_rows<DenseType::f32, kFmaRows>(block, k, x, x_stride, rows, acc);
  if (type == DenseType::f16) fma_rows<DenseType::f16, kFmaRows>(block, k, x, x_stride, rows, acc);
  if (type == DenseType::bf16) fma_rows<DenseType::bf16, kFmaRows>(block, k, x, x_stride, rows, acc);
}

// Four chains of sixteen lanes, then a fixed tree; the odd end goes to the first chain.
template <DenseType kType>
inline float dot_row(const void* row, const float* x, int64_t n) {
  F sum[4] = {f_zero(), f_zero(), f_zero(), f_zero()};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    for (int c = 0; c < 4; ++c) {
      sum[c] = f_fma(load_weights<kType>(row, i + 16 * c), f_load(x + i + 16 * c), sum[c]);
    }
  }
  for (; i + 16 <= n; i += 16) sum[0] = f_fma(load_weights<kType>(row, i), f_load(x + i), sum[0]);
  if (i < n) {
    constexpr size_t kBytes = kType == DenseType::f32 ? 4 : 2;
    alignas(64) uint8_t lanes[64] = {};
    std::memcpy(lanes, static_cast<const uint8_t*>(row) + static_cast<size_t>(i) * kBytes,
                static_cast<size_t>(n - i) * kBytes);
    sum[0] = f_fma(load_weights<kType>(lanes, 0), f_load_part(x + i, n - i), sum[0]);
  }
  return f_sum(f_add(f_add(sum[0], sum[1]), f_add(sum[2], sum[3])));
}

inline float dot(DenseType type, const void* row, const float* x, int64_t n) {
  if (type == DenseType::f32) return dot_row<DenseType::f32>(row, x, n);
  if (type == DenseType::f16) return dot_row<DenseType::f16>(row, x, n);
  return dot_row<DenseType::bf16>(row, x, n);
}
