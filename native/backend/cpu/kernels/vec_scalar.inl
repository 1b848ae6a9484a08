// Sixteen logical lanes in plain C++: the reference for vec_avx2.inl and vec_avx512.inl. Every
// operation gives the same bits on all three, so kernels written on top of it do too. Included
// inside the namespace of one instruction set; F is 16 x f32, I is 16 x i32.
struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};

template <class Op>
inline F f_map(Op op) {
  F out;
  for (int i = 0; i < 16; ++i) out.v[i] = op(i);
  return out;
}
template <class Op>
inline I i_map(Op op) {
  I out;
  for (int i = 0; i < 16; ++i) out.v[i] = op(i);
  return out;
}

inline F f_set(float x) {
  return f_map([=](int) { return x; });
}
inline F f_zero() { return f_set(0.0F); }
inline F f_load(const float* p) {
  return f_map([=](int i) { return p[i]; });
}
inline void f_store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline F f_load_bf16(const uint16_t* p) {
  return f_map([=](int i) { return bf16_to_f32(p[i]); });
}
inline F f_load_f16(const uint16_t* p) {
  return f_map([=](int i) { return f16_to_f32(p[i]); });
}
inline F f_add(F a, F b) {
  return f_map([&](int i) { return a.v[i] + b.v[i]; });
}
inline F f_sub(F a, F b) {
  return f_map([&](int i) { return a.v[i] - b.v[i]; });
}
inline F f_mul(F a, F b) {
  return f_map([&](int i) { return a.v[i] * b.v[i]; });
}
inline F f_div(F a, F b) {
  return f_map([&](int i) { return a.v[i] / b.v[i]; });
}
inline F f_fma(F a, F b, F c) {
  return f_map([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// Like the instructions: the second operand where either is NaN.
inline F f_max(F a, F b) {
  return f_map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F f_min(F a, F b) {
  return f_map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F f_select_gt(F a, F b, F yes, F no) {
  return f_map([&](int i) { return a.v[i] > b.v[i] ? yes.v[i] : no.v[i]; });
}

inline I i_set(int32_t x) {
  return i_map([=](int) { return x; });
}
inline I i_add(I a, I b) {
  return i_map([&](int i) { return a.v[i] + b.v[i]; });
}
inline I i_sub(I a, I b) {
  return i_map([&](int i) { return a.v[i] - b.v[i]; });
}
inline I i_and(I a, I b) {
  return i_map([&](int i) { return a.v[i] & b.v[i]; });
}
inline I i_or(I a, I b) {
  return i_map([&](int i) { return a.v[i] | b.v[i]; });
}
inline I i_max(I a, I b) {
  return i_map([&](int i) { return std::max(a.v[i], b.v[i]); });
}
template <int kBits>
inline I i_shl(I a) {
  return i_map([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits); });
}
template <int kBits>
inline I i_sar(I a) {
  return i_map([&](int i) { return a.v[i] >> kBits; });
}
inline I i_load_u8(const uint8_t* p) {
  return i_map([=](int i) { return int32_t{p[i]}; });
}
inline void i_store_s8(int8_t* p, I a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline void i_store_u16(uint16_t* p, I a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<uint16_t>(a.v[i]);
}
// Round to nearest even; what does not fit becomes INT32_MIN, as cvtps2dq gives.
inline I i_round(F a) {
  return i_map([&](int i) {
    const bool fits = a.v[i] >= -2147483648.0F && a.v[i] < 2147483648.0F;
    return fits ? static_cast<int32_t>(std::nearbyint(a.v[i])) : INT32_MIN;
  });
}
inline F f_from_i(I a) {
  return f_map([&](int i) { return static_cast<float>(a.v[i]); });
}
inline F f_bits(I a) {
  F out;
  std::memcpy(out.v, a.v, sizeof(out.v));
  return out;
}
inline I i_bits(F a) {
  I out;
  std::memcpy(out.v, a.v, sizeof(out.v));
  return out;
}

// Lanes are added as a fixed tree: i with i + 8, then + 4, + 2, + 1.
inline float f_sum(F a) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
  }
  return a.v[0];
}
inline int32_t i_sum(I a) {
  int32_t sum = 0;
  for (int32_t x : a.v) sum += x;
  return sum;
}
inline int32_t i_max_lane(I a) { return *std::max_element(a.v, a.v + 16); }
