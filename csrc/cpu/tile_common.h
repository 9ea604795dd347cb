// Vector code shared by the tile kernels. Each instruction set's file includes it once, after its simd_*.h.
//
// Everything is in an unnamed namespace, and no template of the standard library is used. Otherwise the linker could
// merge code compiled for AVX-512 with code that older processors run.
#pragma once

#include "tile.h"

namespace {

using fastclip::kTileM;
using fastclip::kTileN;
using fastclip::Tile;

constexpr float kNegInf = -__builtin_huge_valf();

// Exponentials below 2^kExp2Floor become 0, because subnormal numbers are slow.
constexpr float kExp2Floor = -100.0f;

// 2^(n + f) with an integer n and |f| up to about 1/2, relative error 8e-8. 0 if x, their rounded sum, is below
// kExp2Floor.
inline Simd::F exp2_of_parts(Simd::F n, Simd::F f, Simd::F x) {
  Simd::F p = Simd::set1(1.534581243e-04f);
  p = Simd::fma(p, f, Simd::set1(1.339993090e-03f));
  p = Simd::fma(p, f, Simd::set1(9.618489072e-03f));
  p = Simd::fma(p, f, Simd::set1(5.550328642e-02f));
  p = Simd::fma(p, f, Simd::set1(2.402264625e-01f));
  p = Simd::fma(p, f, Simd::set1(6.931471825e-01f));
  p = Simd::fma(p, f, Simd::set1(1.0f));
  return Simd::scale_or_zero(p, n, x, kExp2Floor);
}

// 2^x; NaN stays NaN.
inline Simd::F exp2(Simd::F x) {
  const Simd::F n = Simd::round(x);
  return exp2_of_parts(n, Simd::sub(x, n), x);
}

inline float exp2(float x) {
  float out[Simd::kLanes];
  Simd::store(out, exp2(Simd::set1(x)));
  return out[0];
}

inline float max(float a, float b) { return a > b ? a : b; }

inline float reduce_max(Simd::F x) {
  float lane[Simd::kLanes];
  Simd::store(lane, x);
  for (int64_t width = Simd::kLanes / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lane[k] = max(lane[k], lane[k + width]);
  return lane[0];
}

inline float reduce_add(Simd::F x) {
  float lane[Simd::kLanes];
  Simd::store(lane, x);
  for (int64_t width = Simd::kLanes / 2; width > 0; width /= 2)
    for (int64_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0];
}

// Tag for vectors inside the row: it turns masked loads and stores into plain ones.
struct Full {};
inline Simd::F load(Full, const float* p) { return Simd::load(p); }
inline Simd::F load(Simd::Mask m, const float* p) { return Simd::load(m, p); }
inline void store(Full, float* p, Simd::F x) { Simd::store(p, x); }
inline void store(Simd::Mask m, float* p, Simd::F x) { Simd::store(m, p, x); }
inline Simd::Mask mask_of(Full) { return Simd::all(); }
inline Simd::Mask mask_of(Simd::Mask m) { return m; }

// Call body(j, lanes) for every vector of a row of N columns.
template <class Body>
inline void for_columns(int64_t N, Body body) {
  int64_t j = 0;
  for (; j + Simd::kLanes <= N; j += Simd::kLanes) body(j, Full{});
  if (j < N) body(j, Simd::first(N - j));
}

// At logits of this size, the rounding error of a logit may exceed the range of exp2. A logit must then be rounded
// before the maximum (which is rounded) is subtracted, or the exponential of the maximum itself could become 0 or
// infinite.
constexpr float kCoarse = 0x1p27f;

inline bool any_coarse(const float* x, int64_t size) {
  bool coarse = false;
  for (int64_t k = 0; k < size; ++k) coarse |= (x[k] >= kCoarse) | ((x[k] <= -kCoarse) & (x[k] != kNegInf));
  return coarse;
}

// The logits of row i, z in units of log 2.
struct Logits {
  const float *dot, *col_factor;
  Simd::F row_factor, row_factor_low;
  bool coarse;
  template <class Side>
  Logits(const Tile& t, const Side& image, const Side& text, int64_t i, bool coarse = false)
      : dot(t.dot + i * t.row_stride),
        col_factor(text.factor),
        row_factor(Simd::set1(image.factor[i])),
        row_factor_low(Simd::set1(image.factor_low[i])),
        coarse(coarse) {}

  template <class Lanes>
  Simd::F operator()(int64_t j, Lanes lanes) const {
    return Simd::mul(half(j, lanes), load(lanes, col_factor + j));
  }
  // z minus `offset`, which is c, or the maximum or log-sum-exp of a row or column. The difference is rounded once if
  // the processor has FMA, which keeps the digits of a small difference of large numbers.
  template <class Lanes>
  Simd::F minus(int64_t j, Lanes lanes, Simd::F offset) const {
    if (coarse) return Simd::sub(Simd::rounded((*this)(j, lanes)), offset);
    return Simd::fms(half(j, lanes), load(lanes, col_factor + j), offset);
  }

 private:
  template <class Lanes>
  Simd::F half(int64_t j, Lanes lanes) const {
    const Simd::F x = load(lanes, dot + j);
    return Simd::fma(x, row_factor, Simd::mul(x, row_factor_low));
  }
};

// Policies that select the logits of row i for a pass: keep.row(i)(j, lanes) is a mask.
struct NotOwn {  // negatives without labels
  int64_t own;
  NotOwn row(int64_t i) const { return {own + i}; }
  Simd::Mask operator()(int64_t j, Simd::Mask lanes) const {
    const int64_t lane = own - j;
    return lane >= 0 && lane < Simd::kLanes ? Simd::without(lanes, lane) : lanes;
  }
};

struct SameLabel {  // positives with labels
  const int32_t *image, *text;
  int32_t label;
  SameLabel row(int64_t i) const { return {image, text, image[i]}; }
  Simd::Mask operator()(int64_t j, Simd::Mask lanes) const { return Simd::equal(lanes, text + j, label); }
};

struct OtherLabel {  // negatives with labels
  SameLabel same;
  OtherLabel row(int64_t i) const { return {same.row(i)}; }
  Simd::Mask operator()(int64_t j, Simd::Mask lanes) const { return Simd::and_not(lanes, same(j, lanes)); }
};

template <class Keep>
struct Both {  // a policy, without the diagonal
  Keep keep;
  NotOwn not_own;
  Both row(int64_t i) const { return {keep.row(i), not_own.row(i)}; }
  Simd::Mask operator()(int64_t j, Simd::Mask lanes) const { return keep(j, not_own(j, lanes)); }
};

template <class Keep>
struct Limited {  // a policy, with the largest z that counts for a row and for a column
  Keep keep;
  const float *row_limit, *col_limit;
  Simd::F limit;
  Limited(const Keep& keep, const float* row_limit, const float* col_limit, int64_t i = 0)
      : keep(keep), row_limit(row_limit), col_limit(col_limit), limit(Simd::set1(row_limit[i])) {}
  Limited row(int64_t i) const { return {keep.row(i), row_limit, col_limit, i}; }
};

struct Kept {  // logits that count for their row, and those that count for their column
  Simd::Mask row, col;
};
inline Simd::Mask for_row(Simd::Mask kept) { return kept; }
inline Simd::Mask for_col(Simd::Mask kept) { return kept; }
inline Simd::Mask for_row(const Kept& kept) { return kept.row; }
inline Simd::Mask for_col(const Kept& kept) { return kept.col; }
inline Simd::Mask for_both(Simd::Mask kept) { return kept; }
inline Simd::Mask for_both(const Kept& kept) { return Simd::and_not(kept.row, Simd::and_not(kept.row, kept.col)); }

// Apply a policy of row i: one mask if rows and columns keep the same logits, else a `Kept`. Every pass compares the
// same rounded z with the limits, so that all passes keep the same logits.
template <class Keep, class Lanes>
inline Simd::Mask kept_of(const Keep& keep_i, int64_t j, Lanes lanes, const Logits&) {
  return keep_i(j, mask_of(lanes));
}
template <class Keep, class Lanes>
inline Kept kept_of(const Limited<Keep>& keep_i, int64_t j, Lanes lanes, const Logits& logits) {
  const Simd::Mask kept = keep_i.keep(j, mask_of(lanes));
  const Simd::F z = Simd::rounded(logits(j, lanes));
  return {Simd::and_not(kept, Simd::above(z, keep_i.limit)),
          Simd::and_not(kept, Simd::above(z, load(lanes, keep_i.col_limit + j)))};
}

}  // namespace
