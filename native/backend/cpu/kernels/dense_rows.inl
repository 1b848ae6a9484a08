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
    if (rows > 0)
      fma_rows<kType, (kRows > 4 ? 4 : kRows > 2 ? 2 : 1)>(block, k, x, x_stride, rows, acc);
  }
}

inline void dense_fma(DenseType type, const void* block, int64_t k, const float* x,
                      int64_t x_stride, int64_t rows, float* acc) {
  if (type == DenseType::f32) fma_rows<DenseType::f32, kFmaRows>(block, k, x, x_stride, rows, acc);
  if (type == DenseType::f16) fma_rows<DenseType::f16, kFmaRows>(block, k, x, x_stride, rows, acc);
  if (type == DenseType::bf16)
    fma_rows<DenseType::bf16, kFmaRows>(block, k, x, x_stride, rows, acc);
}

template <DenseType kType>
inline F load_weights_part(const void* row, int64_t at, int64_t count) {
  constexpr size_t kBytes = kType == DenseType::f32 ? 4 : 2;
  alignas(64) uint8_t lanes[64] = {};
  std::memcpy(lanes, static_cast<const uint8_t*>(row) + static_cast<size_t>(at) * kBytes,
              static_cast<size_t>(count) * kBytes);
  return load_weights<kType>(lanes, 0);
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
  if (i < n)
    sum[0] = f_fma(load_weights_part<kType>(row, i, n - i), f_load_part(x + i, n - i), sum[0]);
  return f_sum(f_add(f_add(sum[0], sum[1]), f_add(sum[2], sum[3])));
}

inline float dot(DenseType type, const void* row, const float* x, int64_t n) {
  if (type == DenseType::f32) return dot_row<DenseType::f32>(row, x, n);
  if (type == DenseType::f16) return dot_row<DenseType::f16>(row, x, n);
  return dot_row<DenseType::bf16>(row, x, n);
}

template <DenseType kType>
inline HeadRow pack_head_row_of(const void* row, int64_t n, uint8_t* out) {
  const auto load = [&](int64_t i) {
    return i + 16 <= n ? load_weights<kType>(row, i) : load_weights_part<kType>(row, i, n - i);
  };
  const I magnitude = i_set(0x7fffffff);
  I largest = i_set(0);
  for (int64_t i = 0; i < n; i += 16) largest = i_max(largest, i_and(i_bits(load(i)), magnitude));
  const float top = std::bit_cast<float>(i_max_lane(largest));
  const float scale = top / 31.0F;
  const F inverse = f_set(top > 1e-30F ? 31.0F / top : 0.0F);
  F residual = f_zero(), norm = f_zero();
  for (int64_t i = 0; i < n; i += 16) {
    const F w = load(i);
    const I u = i_round(f_mul(w, inverse));
    const F r = f_fma(f_from_i(u), f_set(-scale), w);
    residual = f_fma(r, r, residual);
    norm = f_fma(w, w, norm);
    alignas(16) int8_t bytes[16];
    i_store_s8(bytes, i_add(u, i_set(32)));
    for (int64_t j = i; j < std::min(n, i + 16); j += 4) {
      std::memcpy(out + j / 4 * 64, bytes + (j - i), 4);  // past n: u = 0, and x is 0 there
    }
  }
  // Sums of n / 16 fmas and a tree, relative error below 1e-4 for n <= 65536 (twice that covers r).
  return {scale, std::sqrt(f_sum(residual)) * 1.0002F + 1e-37F,
          std::sqrt(f_sum(norm)) * 1.0002F + 1e-37F};
}

inline HeadRow pack_head_row(DenseType type, const void* row, int64_t n, uint8_t* out) {
  if (type == DenseType::f32) return pack_head_row_of<DenseType::f32>(row, n, out);
  if (type == DenseType::f16) return pack_head_row_of<DenseType::f16>(row, n, out);
  return pack_head_row_of<DenseType::bf16>(row, n, out);
}
