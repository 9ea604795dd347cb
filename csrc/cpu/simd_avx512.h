// Sixteen fp32 lanes of AVX-512F. The three simd_*.h headers define the same names; read simd_portable.h first.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using F = __m512;
  using Mask = __mmask16;
  static constexpr int64_t kLanes = 16;

  static Mask all() { return 0xFFFF; }
  static Mask first(int64_t count) { return static_cast<Mask>((1u << count) - 1); }
  static Mask without(Mask m, int64_t lane) { return static_cast<Mask>(m & ~(1u << lane)); }
  static Mask and_not(Mask m, Mask drop) { return static_cast<Mask>(m & ~drop); }
  static Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
  static bool any(Mask m) { return m != 0; }
  static uint32_t bits(Mask m) { return m; }
  static Mask equal(Mask m, const int32_t* p, int32_t value) {
    return _mm512_mask_cmpeq_epi32_mask(m, _mm512_maskz_loadu_epi32(m, p), _mm512_set1_epi32(value));
  }

  static F set1(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(Mask m, const float* p) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(Mask m, float* p, F x) { _mm512_mask_storeu_ps(p, m, x); }
  static F select(Mask m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  // Rounds a product. Without this the compiler may fuse the product and the sum that follows into an FMA, which does
  // not round the product.
  static F rounded(F a) {
    __asm__("" : "+v"(a));
    return a;
  }

  static Mask above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }             // false for NaN
  static Mask not_negative(F x) { return _mm512_cmp_ps_mask(x, set1(0.0f), _CMP_GE_OQ); }  // false for NaN

  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // p 2^n if x >= floor, else 0. n is an integer. A NaN in x stays NaN.
  static F scale_or_zero(F p, F n, F x, float floor) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(floor), _CMP_NLT_UQ), p, n);
  }
};

}  // namespace
