// Vectors of 16 floats for the kernels, in AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace headrace {
namespace avx512 {

constexpr int W = 16;

struct vf {
  __m512 v;
};
struct vi {
  __m512i v;
};

#define HR_INLINE static inline __attribute__((always_inline))

HR_INLINE vf zero() { return {_mm512_setzero_ps()}; }
HR_INLINE vf set1(float x) { return {_mm512_set1_ps(x)}; }
HR_INLINE vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
HR_INLINE void store(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
HR_INLINE vf add(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
HR_INLINE vf sub(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
HR_INLINE vf mul(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
HR_INLINE vf div(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
HR_INLINE vf fma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HR_INLINE vf max(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
HR_INLINE vf min(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
HR_INLINE vf round(vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
HR_INLINE vi to_int(vf a) { return {_mm512_cvtps_epi32(a.v)}; }
HR_INLINE vf to_float(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
HR_INLINE vi iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
HR_INLINE vf exponent(vi n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
HR_INLINE vf bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
HR_INLINE vf first_of_pair(const float* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(_mm512_loadu_ps(p)), 16))};
}
HR_INLINE vf second_of_pair(const float* p) {
  return {_mm512_and_ps(_mm512_loadu_ps(p), _mm512_castsi512_ps(_mm512_set1_epi32(-65536)))};
}
HR_INLINE vf int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
HR_INLINE vf between(int at, int first, int last) {
  __m512i lane = _mm512_add_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(at));
  __mmask16 m = _mm512_cmpgt_epi32_mask(lane, _mm512_set1_epi32(first - 1)) &
                _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(last));
  return {_mm512_castsi512_ps(_mm512_maskz_set1_epi32(m, -1))};
}
HR_INLINE vf choose(vf mask, vf a, vf b) {
  __mmask16 m = _mm512_movepi32_mask(_mm512_castps_si512(mask.v));
  return {_mm512_mask_blend_ps(m, b.v, a.v)};
}
HR_INLINE vf keep_above(vf x, vf limit, vf value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_GT_OQ), value.v)};
}
HR_INLINE uint32_t reaching(vf x, vf limit) { return _mm512_cmp_ps_mask(x.v, limit.v, _CMP_GE_OQ); }
struct Nans {
  __mmask16 seen;
};
HR_INLINE Nans no_nans() { return {0}; }
HR_INLINE void look(Nans& nans, vf x) {
  nans.seen = static_cast<__mmask16>(nans.seen | _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q));
}
HR_INLINE bool any(Nans nans) { return nans.seen != 0; }
struct Wide {
  __m512d low, high;
};
HR_INLINE Wide wide_zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
HR_INLINE void add_to(Wide& sums, vf a) {
  sums.low = _mm512_add_pd(sums.low, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
  sums.high = _mm512_add_pd(sums.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
}
HR_INLINE void store(double* p, Wide a) {
  _mm512_storeu_pd(p, a.low);
  _mm512_storeu_pd(p + 8, a.high);
}
HR_INLINE double sum(Wide a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high)); }
HR_INLINE float sum(vf a) { return _mm512_reduce_add_ps(a.v); }
HR_INLINE float largest(vf a) { return _mm512_reduce_max_ps(a.v); }

HR_INLINE int32_t word(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Sums of 32 products each for 16 outputs; VNNI adds four products into 32 bits, exactly.
constexpr bool WIDE_Q8 = false;

template <int R>
HR_INLINE void dot_q8(const uint8_t* w, const uint8_t* rows, int64_t stride, vi (&s)[R][1]) {
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) {
    __m512i w0 = _mm512_loadu_si512(w + k * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m512i a = _mm512_set1_epi32(word(rows + r * stride + k * 4));
      s[r][0].v = _mm512_dpbusd_epi32(s[r][0].v, w0, a);
    }
  }
}

template <int R>
HR_INLINE void dot_q4(const uint8_t* w, const uint8_t* rows, int64_t stride, vi (&s)[R][1]) {
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) s[r][0].v = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    __m512i w0 = _mm512_loadu_si512(w + j * 64);
    __m512i low = _mm512_and_si512(w0, nibble);
    __m512i high = _mm512_and_si512(_mm512_srli_epi16(w0, 4), nibble);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = rows + r * stride + j * 4;
      s[r][0].v = _mm512_dpbusd_epi32(s[r][0].v, low, _mm512_set1_epi32(word(row)));
      s[r][0].v = _mm512_dpbusd_epi32(s[r][0].v, high, _mm512_set1_epi32(word(row + 16)));
    }
  }
}

}  // namespace avx512
}  // namespace headrace
