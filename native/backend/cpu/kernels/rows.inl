// Row norms, activations to fixed point, and epilogues, written once on sixteen logical lanes.
// Included inside the namespace of one instruction set, after its vec_*.inl.

// Rows end anywhere: the last lanes read and write through a buffer.
inline F f_load_part(const float* p, int64_t count) {
  alignas(64) float lanes[16] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(float));
  return f_load(lanes);
}
inline void f_store_part(float* p, F a, int64_t count) {
  alignas(64) float lanes[16];
  f_store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

inline float row_mean(const float* x, int64_t n) {
  F sum = f_zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sum = f_add(sum, f_load(x + i));
  if (i < n) sum = f_add(sum, f_load_part(x + i, n - i));
  return f_sum(sum) / static_cast<float>(n);
}

// Mean of (x - mean)^2; lanes past the end must not count.
inline float row_square_mean(const float* x, int64_t n, float mean) {
  const F center = f_set(mean);
  F sum = f_zero();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F d = f_sub(f_load(x + i), center);
    sum = f_fma(d, d, sum);
  }
  if (i < n) {
    alignas(64) float lanes[16] = {};
    for (int64_t j = i; j < n; ++j) lanes[j - i] = x[j] - mean;
    const F d = f_load(lanes);
    sum = f_fma(d, d, sum);
  }
  return f_sum(sum) / static_cast<float>(n);
}

inline NormStats norm_stats(const RowNorm& norm, const float* x, int64_t n) {
  NormStats stats;
  if (norm.kind == NormKind::layer) stats.mean = row_mean(x, n);
  stats.inv = 1.0F / std::sqrt(row_square_mean(x, n, stats.mean) + norm.eps);
  return stats;
}

// x - 0 and + 0 change no bits that matter, so one formula serves both kinds.
inline F norm_lanes(const NormStats& stats, F x, F weight, F bias) {
  return f_fma(f_mul(f_sub(x, f_set(stats.mean)), f_set(stats.inv)), weight, bias);
}

inline void norm_apply(const RowNorm& norm, const NormStats& stats, const float* x, float* y,
                       int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const F bias = norm.bias != nullptr ? f_load(norm.bias + i) : f_zero();
    f_store(y + i, norm_lanes(stats, f_load(x + i), f_load(norm.weight + i), bias));
  }
  if (i == n) return;
  const F bias = norm.bias != nullptr ? f_load_part(norm.bias + i, n - i) : f_zero();
  f_store_part(
      y + i,
      norm_lanes(stats, f_load_part(x + i, n - i), f_load_part(norm.weight + i, n - i), bias),
      n - i);
}

// One group of x to integers v = 256 hi + lo in [-32639, 32639], x ~ scale * v. A group without a
// value above 1e-30 becomes zero (its reciprocal would overflow). Comparing bits keeps NaN; it and
// infinity make the row's results NaN.
// Sixteen values go to hi + i and lo + i of the tile that holds k = i, `next` bytes a tile.
inline void quantize_group(const float* x, int group, int step, int64_t next, int8_t* hi,
                           int8_t* lo, float* scale, int32_t* minus_hi, int32_t* minus_lo) {
  const I magnitude = i_set(0x7fffffff);
  I largest = i_set(0);
  for (int i = 0; i < group; i += 16)
    largest = i_max(largest, i_and(i_bits(f_load(x + i)), magnitude));
  const float top = std::bit_cast<float>(i_max_lane(largest));
  const bool finite = top <= 3.4028235e38F;
  const bool usable = finite && top >= 1e-30F;
  const F factor = f_set(32639.0F / top);
  I sum_hi = i_set(0), sum_lo = i_set(0);
  for (int begin = 0; begin < group; begin += step, hi += next, lo += next) {
    if (!usable) {
      std::memset(hi, 0, static_cast<size_t>(step));
      std::memset(lo, 0, static_cast<size_t>(step));
      continue;
    }
    for (int i = 0; i < step; i += 16) {
      const I v = i_round(f_mul(f_load(x + begin + i), factor));
      const I low = i_sar<24>(i_shl<24>(v));
      const I high = i_sar<8>(i_sub(v, low));
      i_store_s8(hi + i, high);
      i_store_s8(lo + i, low);
      sum_hi = i_add(sum_hi, high);
      sum_lo = i_add(sum_lo, low);
    }
  }
  // NaN times 0: every result of a row that is not finite says so.
  *scale = usable ? top / 32639.0F : finite ? 0.0F : std::bit_cast<float>(0x7fc00000);
  *minus_hi = -i_sum(sum_hi);
  *minus_lo = -i_sum(sum_lo);
}

inline void u4_quantize(const U4Shape& shape, const RowNorm* norm, const float* x,
                        const U4Rows& out, int row) {
  const NormStats stats = norm != nullptr ? norm_stats(*norm, x, shape.k) : NormStats{};
  alignas(64) float normed[128];
  const int64_t plane = static_cast<int64_t>(out.rows) * shape.step;
  int8_t* to = out.planes + row * shape.step;
  for (int64_t g = 0; g < shape.groups; ++g, to += shape.group / shape.step * 2 * plane) {
    const float* values = x + g * shape.group;
    if (norm != nullptr) {
      RowNorm part = *norm;
      part.weight += g * shape.group;
      if (part.bias != nullptr) part.bias += g * shape.group;
      norm_apply(part, stats, values, normed, shape.group);
      values = normed;
    }
    const int64_t at = g * out.rows + row;
    quantize_group(values, shape.group, shape.step, 2 * plane, to, to + plane, out.scale + at,
                   out.minus_hi + at, out.minus_lo + at);
  }
}

// e^x for x in [-87, 88] (clamped; NaN stays): 2^n times a polynomial on [-ln2/2, ln2/2].
inline F f_exp(F x) {
  x = f_max(f_set(-87.0F), x);
  x = f_min(f_set(88.0F), x);
  const I n = i_round(f_mul(x, f_set(1.44269504F)));
  const F whole = f_from_i(n);
  F r = f_fma(whole, f_set(-0.693145752F), x);  // ln 2 in two parts, the first with few bits
  r = f_fma(whole, f_set(-1.42860677e-6F), r);
  F p = f_set(0.00138294115F);
  p = f_fma(p, r, f_set(0.00837477762F));
  p = f_fma(p, r, f_set(0.0416683592F));
  p = f_fma(p, r, f_set(0.166664213F));
  p = f_fma(p, r, f_set(0.499999911F));
  p = f_fma(p, r, f_set(1.0F));
  p = f_fma(p, r, f_set(1.0F));
  return f_mul(p, f_bits(i_shl<23>(i_add(n, i_set(127)))));
}

// erf with absolute error below 1.5e-7: an odd polynomial up to 1, beyond it 1 - exp(-P(|x|)) with
// P fitted to -log(erfc). Both sets of coefficients are least squares fits on Chebyshev nodes.
inline F f_erf(F x) {
  const F s = f_mul(x, x);
  F small = f_set(7.88249745e-05F);
  small = f_fma(small, s, f_set(-0.000801885501F));
  small = f_fma(small, s, f_set(0.00518931216F));
  small = f_fma(small, s, f_set(-0.0268543288F));
  small = f_fma(small, s, f_set(0.112835974F));
  small = f_fma(small, s, f_set(-0.37612626F));
  small = f_fma(small, s, f_set(1.12837911F));
  small = f_mul(small, x);
  const F size = f_bits(i_and(i_bits(x), i_set(0x7fffffff)));
  const F t = f_min(f_set(4.0F), size);
  F p = f_set(-1.19549111e-06F);
  p = f_fma(p, t, f_set(3.83312072e-05F));
  p = f_fma(p, t, f_set(-0.000539681118F));
  p = f_fma(p, t, f_set(0.00452663703F));
  p = f_fma(p, t, f_set(-0.0258478541F));
  p = f_fma(p, t, f_set(0.109207608F));
  p = f_fma(p, t, f_set(0.632629037F));
  p = f_fma(p, t, f_set(1.12982416F));
  p = f_fma(p, t, f_set(-0.000231501399F));
  const F tail = f_sub(f_set(1.0F), f_exp(f_sub(f_zero(), p)));
  const I sign = i_and(i_bits(x), i_set(INT32_MIN));
  return f_select_gt(size, f_set(1.0F), f_bits(i_or(i_bits(tail), sign)), small);
}

inline F f_gelu(F x) {
  const F half = f_mul(f_set(0.5F), x);
  return f_fma(half, f_erf(f_mul(x, f_set(0.707106781F))), half);
}

inline F f_silu(F x) { return f_div(x, f_add(f_set(1.0F), f_exp(f_sub(f_zero(), x)))); }

inline F finish_lanes(const Finish& f, F value, const float* y, const float* scale) {
  if (f.epilogue == Epilogue::gelu) return f_gelu(value);
  if (f.epilogue == Epilogue::none) return value;
  return scale != nullptr ? f_fma(f_load(scale), value, f_load(y)) : f_add(f_load(y), value);
}

inline void finish_half(const Finish& f, int64_t row, int half, int columns) {
  const int begin = half * 16;
  F value = f_load(f.acc + row * kBlockColumns + begin);
  if (f.bias != nullptr) value = f_add(value, f_load(f.bias + begin));
  float* y = f.y + row * f.y_stride + begin;
  const float* scale = f.scale != nullptr ? f.scale + begin : nullptr;
  if (columns >= 16) {
    f_store(y, finish_lanes(f, value, y, scale));
    return;
  }
  alignas(64) float old[16] = {}, factors[16] = {};
  const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
  if (f.epilogue == Epilogue::residual) std::memcpy(old, y, bytes);
  if (scale != nullptr) std::memcpy(factors, scale, bytes);
  f_store_part(y, finish_lanes(f, value, old, scale != nullptr ? factors : nullptr), columns);
}

inline void finish_silu_mul(const Finish& f, int64_t row) {
  F gate = f_load(f.acc + row * kBlockColumns);
  F up = f_load(f.acc + row * kBlockColumns + 16);
  if (f.bias != nullptr) {
    gate = f_add(gate, f_load(f.bias));
    up = f_add(up, f_load(f.bias + 16));
  }
  const F result = f_mul(f_silu(gate), up);
  float* y = f.y + row * f.y_stride;
  if (f.valid >= 16) {
    f_store(y, result);
  } else {
    f_store_part(y, result, f.valid);
  }
}

inline void finish(const Finish& f) {
  for (int64_t row = 0; row < f.rows; ++row) {
    if (f.epilogue == Epilogue::silu_mul) {
      finish_silu_mul(f, row);
      continue;
    }
    finish_half(f, row, 0, f.valid);
    if (f.valid > 16) finish_half(f, row, 1, f.valid - 16);
  }
}

inline F load_scales(ScaleType type, const uint8_t* scales, int64_t at) {
  if (type == ScaleType::f16) return f_load_f16(reinterpret_cast<const uint16_t*>(scales) + at);
  if (type == ScaleType::bf16) return f_load_bf16(reinterpret_cast<const uint16_t*>(scales) + at);
  return f_load(reinterpret_cast<const float*>(scales) + at);
}
