// Quantisation of keys and values over the sixteen lanes of vec_*.inl: included once per instruction
// set after attention_split.inl. A code times a scale is exact in f32 (8 + 11 bits), so that a
// value read back has one rounding and is the same number everywhere.

inline float least_lane(F x) {
  alignas(64) float lanes[kLanes];
  f_store(lanes, x);
  float least = lanes[0];
  for (int i = 1; i < kLanes; ++i) least = lanes[i] < least ? lanes[i] : least;
  return least;
}

void quantize_kernel(const float* x, int dim, int bits, QuantizedVector& out) {
  F least = f_load(x);
  F most = least;
  F poison = f_mul(least, f_zero());  // NaN once a value is not finite
  for (int d = kLanes; d < dim; d += kLanes) {
    const F v = f_load(x + d);
    least = f_min(least, v);
    most = f_max(most, v);
    poison = f_fma(v, f_zero(), poison);
  }
  const bool finite = f_sum(poison) == 0.0F;
  const float levels = static_cast<float>((1 << bits) - 1);
  set_parameters(finite, least_lane(least), max_lane(most), levels, out);
  const float scale = f16_to_f32(out.scale);
  const F zero = f_set(f16_to_f32(out.zero));
  const bool flat = !(scale > 0.0F);
  for (int d = 0; d < dim; d += kLanes) {
    F q = f_zero();
    if (!flat) {
      q = f_div(f_sub(f_load(x + d), zero), f_set(scale));
      q = f_min(f_max(q, f_zero()), f_set(levels));
    }
    i_store_s8(reinterpret_cast<int8_t*>(out.codes + d), i_round(q));
  }
}

// Two vectors of tokens side by side: one read of the parameters serves all dimensions.
template <int kVectors, bool kNibbles>
inline void dequantize_keys(const QuantizedChunk& t, int first, float* keys) {
  F scale[kVectors];
  F zero[kVectors];
  #pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = f_load_f16(t.key_scale + first + v * kLanes);
    zero[v] = f_load_f16(t.key_zero + first + v * kLanes);
  }
  const uint8_t* from = t.keys + first;
  float* to = keys + first;
  for (int d = 0; d < t.head_dim; d += kNibbles ? 2 : 1, from += t.key_stride) {
    #pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const I codes = i_load_u8(from + v * kLanes);
      const F low = f_from_i(kNibbles ? i_and(codes, i_set(15)) : codes);
      f_store(to + v * kLanes, f_fma(low, scale[v], zero[v]));
      if constexpr (kNibbles) {
        const F high = f_from_i(i_sar<4>(codes));
        f_store(to + kChunkKeys + v * kLanes, f_fma(high, scale[v], zero[v]));
      }
    }
    to += (kNibbles ? 2 : 1) * kChunkKeys;
  }
}

inline void dequantize_value8(const uint8_t* from, int dim, F scale, F zero, float* to) {
  for (int d = 0; d < dim; d += kLanes) {
    f_store(to + d, f_fma(f_from_i(i_load_u8(from + d)), scale, zero));
  }
}

// The last vector of bytes may overlap the one before it: both write the same numbers.
inline void dequantize_value4(const uint8_t* from, int dim, F scale, F zero, float* to) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += kLanes) {
    const int at = half - i < kLanes ? half - kLanes : i;
    const I codes = i_load_u8(from + at);
    f_store(to + at, f_fma(f_from_i(i_and(codes, i_set(15))), scale, zero));
    f_store(to + half + at, f_fma(f_from_i(i_sar<4>(codes)), scale, zero));
  }
}

template <bool kNibbles>
inline void dequantize_chunk(const QuantizedChunk& t, float* keys, float* values) {
  int first = 0;
  for (; first + kLanes < t.tokens; first += 2 * kLanes) {
    dequantize_keys<2, kNibbles>(t, first, keys);
  }
  if (first < t.tokens) dequantize_keys<1, kNibbles>(t, first, keys);
  const int row = kNibbles ? t.head_dim / 2 : t.head_dim;
  for (int j = 0; j < t.tokens; ++j) {
    const F scale = f_set(f16_to_f32(t.value_scale[j]));
    const F zero = f_set(f16_to_f32(t.value_zero[j]));
    if constexpr (kNibbles) {
      dequantize_value4(t.values + j * row, t.head_dim, scale, zero, values + j * t.head_dim);
    } else {
      dequantize_value8(t.values + j * row, t.head_dim, scale, zero, values + j * t.head_dim);
    }
  }
}

void dequantize8_kernel(const QuantizedChunk& chunk, float* keys, float* values) {
  dequantize_chunk<false>(chunk, keys, values);
}
void dequantize4_kernel(const QuantizedChunk& chunk, float* keys, float* values) {
  dequantize_chunk<true>(chunk, keys, values);
}
