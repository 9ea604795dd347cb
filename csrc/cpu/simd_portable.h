// Eight fp32 lanes as plain loops, for any processor, with the same names as simd_avx512.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Simd {
  static constexpr int64_t kLanes = 8;
  struct F {
    float v[kLanes];
  };
  struct Mask {
    bool v[kLanes];
  };

  template <class Vector, class Lane>
  static Vector make(Lane lane) {
    Vector out;
    for (int k = 0; k < kLanes; ++k) out.v[k] = lane(k);
    return out;
  }
  template <class Lane>
  static F floats(Lane lane) {
    return make<F>(lane);
  }
  template <class Lane>
  static Mask mask(Lane lane) {
    return make<Mask>(lane);
  }

  static Mask all() {
    return mask([](int) { return true; });
  }
  static Mask first(int64_t count) {
    return mask([=](int k) { return k < count; });
  }
  static Mask without(Mask m, int64_t lane) {
    return mask([&](int k) { return m.v[k] && k != lane; });
  }
  static Mask and_not(Mask m, Mask drop) {
    return mask([&](int k) { return m.v[k] && !drop.v[k]; });
  }
  static Mask either(Mask a, Mask b) {
    return mask([&](int k) { return a.v[k] || b.v[k]; });
  }
  static bool any(Mask m) {
    for (bool lane : m.v)
      if (lane) return true;
    return false;
  }
  static uint32_t bits(Mask m) {
    uint32_t out = 0;
    for (int k = 0; k < kLanes; ++k) out |= static_cast<uint32_t>(m.v[k]) << k;
    return out;
  }
  static Mask equal(Mask m, const int32_t* p, int32_t value) {
    return mask([&](int k) { return m.v[k] && p[k] == value; });
  }

  static F set1(float x) {
    return floats([=](int) { return x; });
  }
  static F load(const float* p) {
    return floats([=](int k) { return p[k]; });
  }
  static F load(Mask m, const float* p) {
    return floats([&](int k) { return m.v[k] ? p[k] : 0.0f; });
  }
  static void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
  static void store(Mask m, float* p, F x) {
    for (int k = 0; k < kLanes; ++k)
      if (m.v[k]) p[k] = x.v[k];
  }
  static F select(Mask m, F yes, F no) {
    return floats([&](int k) { return m.v[k] ? yes.v[k] : no.v[k]; });
  }

  static F add(F a, F b) {
    return floats([&](int k) { return a.v[k] + b.v[k]; });
  }
  static F sub(F a, F b) {
    return floats([&](int k) { return a.v[k] - b.v[k]; });
  }
  static F mul(F a, F b) {
    return floats([&](int k) { return a.v[k] * b.v[k]; });
  }
  static F div(F a, F b) {
    return floats([&](int k) { return a.v[k] / b.v[k]; });
  }
  static F fma(F a, F b, F c) {
    return floats([&](int k) { return a.v[k] * b.v[k] + c.v[k]; });
  }
  static F fms(F a, F b, F c) {
    return floats([&](int k) { return a.v[k] * b.v[k] - c.v[k]; });
  }
  static F max(F a, F b) {  // returns b if either is NaN, like the x86 instruction
    return floats([&](int k) { return a.v[k] > b.v[k] ? a.v[k] : b.v[k]; });
  }
  // Rounds a product. Without this a compiler may fuse the product and the sum that follows into an FMA, which does not
  // round the product.
  static F rounded(F a) {
    return floats([&](int k) {
      const volatile float x = a.v[k];
      return x;
    });
  }

  static Mask above(F a, F b) {
    return mask([&](int k) { return a.v[k] > b.v[k]; });
  }
  static Mask not_negative(F x) {
    return mask([&](int k) { return x.v[k] >= 0.0f; });
  }

  static F round(F x) {  // adding and subtracting 1.5 2^23 rounds to nearest for |x| < 2^22
    return floats([&](int k) { return (x.v[k] + 12582912.0f) - 12582912.0f; });
  }
  static F scale_or_zero(F p, F n, F x, float floor) {
    return floats([&](int k) {
      if (x.v[k] < floor) return 0.0f;
      if (!(n.v[k] <= 127.0f)) return p.v[k] * __builtin_huge_valf();  // NaN stays
      const float power = bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.v[k]) + 127) << 23);
      return p.v[k] * power;
    });
  }

 private:
  static float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

}  // namespace
