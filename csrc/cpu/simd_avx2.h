// Eight fp32 lanes of AVX2 with FMA, with the same names as simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using F = __m256;
  using Mask = __m256i;  // all bits of a lane are set, or none
  static constexpr int64_t kLanes = 8;

  static __m256i lane_index() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static Mask all() { return _mm256_set1_epi32(-1); }
  static Mask first(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane_index());
  }
  static Mask without(Mask m, int64_t lane) {
    return _mm256_andnot_si256(_mm256_cmpeq_epi32(_mm256_set1_epi32(static_cast<int>(lane)), lane_index()), m);
  }
  static Mask and_not(Mask m, Mask drop) { return _mm256_andnot_si256(drop, m); }
  static Mask either(Mask a, Mask b) { return _mm256_or_si256(a, b); }
  static bool any(Mask m) { return !_mm256_testz_si256(m, m); }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m))); }
  static Mask equal(Mask m, const int32_t* p, int32_t value) {
    const __m256i loaded = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), m);
    return _mm256_and_si256(m, _mm256_cmpeq_epi32(loaded, _mm256_set1_epi32(value)));
  }

  static F set1(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(Mask m, const float* p) { return _mm256_maskload_ps(p, m); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(Mask m, float* p, F x) { _mm256_maskstore_ps(p, m, x); }
  static F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }

  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  // Rounds a product. Without this the compiler may fuse the product and the sum that follows into an FMA, which does
  // not round the product.
  static F rounded(F a) {
    __asm__("" : "+x"(a));
    return a;
  }

  static Mask above(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static Mask not_negative(F x) { return _mm256_castps_si256(_mm256_cmp_ps(x, set1(0.0f), _CMP_GE_OQ)); }

  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // As in simd_avx512.h, except that in place of a result above 2^127 it may return any number above 2^127, inf or NaN.
  static F scale_or_zero(F p, F n, F x, float floor) {
    const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_min_ps(n, set1(128.0f))), 23);
    const F scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), shift));
    const F keep = _mm256_cmp_ps(x, set1(floor), _CMP_NLT_UQ);
    return _mm256_and_ps(keep, select(_mm256_castps_si256(_mm256_cmp_ps(p, p, _CMP_UNORD_Q)), p, scaled));
  }
};

}  // namespace
