// Vectors of 8 floats for the kernels, in AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace headrace {
namespace avx2 {

constexpr int W = 8;

struct vf {
  __m256 v;
};
struct vi {
  __m256i v;
};

#define HR_INLINE static inline __attribute__((always_inline))

HR_INLINE vf zero() { return {_mm256_setzero_ps()}; }
HR_INLINE vf set1(float x) { return {_mm256_set1_ps(x)}; }
HR_INLINE vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
HR_INLINE void store(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
HR_INLINE vf add(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
HR_INLINE vf sub(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
HR_INLINE vf mul(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
HR_INLINE vf div(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
HR_INLINE vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
HR_INLINE vf max(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
HR_INLINE vf min(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
HR_INLINE vf round(vf a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
HR_INLINE vi to_int(vf a) { return {_mm256_cvtps_epi32(a.v)}; }
HR_INLINE vf to_float(vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
HR_INLINE vi iset1(int32_t x) { return {_mm256_set1_epi32(x)}; }
HR_INLINE vf exponent(vi n) {  // 2^n as a float's bits
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.v, _mm256_set1_epi32(127)), 23))};
}
HR_INLINE vf bf16(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
// bfloat16 stand in pairs in 32 bits: the first in the low half
HR_INLINE vf first_of_pair(const float* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(_mm256_loadu_ps(p)), 16))};
}
HR_INLINE vf second_of_pair(const float* p) {
  return {_mm256_and_ps(_mm256_loadu_ps(p), _mm256_castsi256_ps(_mm256_set1_epi32(-65536)))};
}
HR_INLINE vf int8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
// all ones where first <= lane + at < last
HR_INLINE vf between(int at, int first, int last) {
  __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(at));
  __m256i low = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1));
  __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
  return {_mm256_castsi256_ps(_mm256_and_si256(low, high))};
}
HR_INLINE vf choose(vf mask, vf a, vf b) { return {_mm256_blendv_ps(b.v, a.v, mask.v)}; }
HR_INLINE vf keep_above(vf x, vf limit, vf value) {  // value where x > limit, else 0
  return {_mm256_and_ps(value.v, _mm256_cmp_ps(x.v, limit.v, _CMP_GT_OQ))};
}
// A bit for each lane where x >= limit.
HR_INLINE uint32_t reaching(vf x, vf limit) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_GE_OQ)));
}
// Whether any of some vectors had a NaN.
struct Nans {
  __m256 seen;
};
HR_INLINE Nans no_nans() { return {_mm256_setzero_ps()}; }
HR_INLINE void look(Nans& nans, vf x) { nans.seen = _mm256_or_ps(nans.seen, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)); }
HR_INLINE bool any(Nans nans) { return _mm256_movemask_ps(nans.seen) != 0; }
// Sums in float64, one for each lane.
struct Wide {
  __m256d low, high;
};
HR_INLINE Wide wide_zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
HR_INLINE void add_to(Wide& sums, vf a) {
  sums.low = _mm256_add_pd(sums.low, _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)));
  sums.high = _mm256_add_pd(sums.high, _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)));
}
HR_INLINE void store(double* p, Wide a) {
  _mm256_storeu_pd(p, a.low);
  _mm256_storeu_pd(p + 4, a.high);
}
HR_INLINE double sum(Wide a) {
  __m256d all = _mm256_add_pd(a.low, a.high);
  __m128d s = _mm_add_pd(_mm256_castpd256_pd128(all), _mm256_extractf128_pd(all, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
HR_INLINE float sum(vf a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
HR_INLINE float largest(vf a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

HR_INLINE int32_t word(const void* p) {
  int32_t x;
  std::memcpy(&x, p, 4);
  return x;
}

// Sums of 32 products each for 16 outputs: weights of 8 bits and of 4, of one group.
//
// AVX2 multiplies unsigned by signed bytes and adds pairs in 16 bits, which only 4-bit weights cannot
// overflow: 8 pairs of 15 * 127 are below 2^15. For 8 bits both operands are widened to 16; rows come
// as (0, 2, 1, 3) so that widening the weights is a mask and a shift.
constexpr bool WIDE_Q8 = true;

// Keeps a sum in its register: GCC would take integer sums apart and spill every product.
HR_INLINE void hold(__m256i& x) { asm("" : "+x"(x)); }

template <int R>
HR_INLINE void dot_q8(const uint8_t* w, const uint8_t* rows, int64_t stride, vi (&s)[R][2]) {
  const __m256i low_bytes = _mm256_set1_epi16(0xff);
#pragma GCC unroll 2
  for (int k = 0; k < 8; ++k) {
    __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k * 64));
    __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k * 64 + 32));
    __m256i even0 = _mm256_and_si256(w0, low_bytes), odd0 = _mm256_srli_epi16(w0, 8);
    __m256i even1 = _mm256_and_si256(w1, low_bytes), odd1 = _mm256_srli_epi16(w1, 8);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = rows + r * stride + k * 8;
      __m256i even = _mm256_set1_epi32(word(row)), odd = _mm256_set1_epi32(word(row + 4));
      s[r][0].v = _mm256_add_epi32(s[r][0].v, _mm256_madd_epi16(even0, even));
      s[r][1].v = _mm256_add_epi32(s[r][1].v, _mm256_madd_epi16(even1, even));
      hold(s[r][0].v);
      hold(s[r][1].v);
      s[r][0].v = _mm256_add_epi32(s[r][0].v, _mm256_madd_epi16(odd0, odd));
      s[r][1].v = _mm256_add_epi32(s[r][1].v, _mm256_madd_epi16(odd1, odd));
      hold(s[r][0].v);
      hold(s[r][1].v);
    }
  }
}

template <int R>
HR_INLINE void dot_q4(const uint8_t* w, const uint8_t* rows, int64_t stride, vi (&s)[R][2]) {
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256i t[R][2];
#pragma GCC unroll 8
  for (int j = 0; j < 4; ++j) {
    __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + j * 64));
    __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + j * 64 + 32));
    __m256i low0 = _mm256_and_si256(w0, nibble), low1 = _mm256_and_si256(w1, nibble);
    __m256i high0 = _mm256_and_si256(_mm256_srli_epi16(w0, 4), nibble);
    __m256i high1 = _mm256_and_si256(_mm256_srli_epi16(w1, 4), nibble);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = rows + r * stride + j * 4;
      __m256i low = _mm256_set1_epi32(word(row)), high = _mm256_set1_epi32(word(row + 16));
      __m256i a0 = _mm256_maddubs_epi16(low0, low), a1 = _mm256_maddubs_epi16(low1, low);
      t[r][0] = j == 0 ? a0 : _mm256_add_epi16(t[r][0], a0);
      t[r][1] = j == 0 ? a1 : _mm256_add_epi16(t[r][1], a1);
      hold(t[r][0]);
      hold(t[r][1]);
      t[r][0] = _mm256_add_epi16(t[r][0], _mm256_maddubs_epi16(high0, high));
      t[r][1] = _mm256_add_epi16(t[r][1], _mm256_maddubs_epi16(high1, high));
      hold(t[r][0]);
      hold(t[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    s[r][0].v = _mm256_madd_epi16(t[r][0], ones);
    s[r][1].v = _mm256_madd_epi16(t[r][1], ones);
  }
}

}  // namespace avx2
}  // namespace headrace
