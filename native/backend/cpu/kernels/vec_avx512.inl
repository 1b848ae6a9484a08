// vec_scalar.inl's sixteen lanes as one zmm register.
struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

inline F f_set(float x) { return {_mm512_set1_ps(x)}; }
inline F f_zero() { return {_mm512_setzero_ps()}; }
inline F f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F f_load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
inline F f_load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F f_add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F f_sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F f_mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F f_div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F f_fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F f_max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F f_select_gt(F a, F b, F yes, F no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), no.v, yes.v)};
}

inline I i_set(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I i_add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I i_sub(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I i_and(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I i_or(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I i_max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
template <int kBits>
inline I i_shl(I a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline I i_sar(I a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
inline I i_load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void i_store_s8(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline void i_store_u16(uint16_t* p, I a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
inline I i_round(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F f_from_i(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F f_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline I i_bits(F a) { return {_mm512_castps_si512(a.v)}; }

inline float f_sum(F a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline int32_t i_sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline int32_t i_max_lane(I a) { return _mm512_reduce_max_epi32(a.v); }
