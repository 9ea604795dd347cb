// Backward tile kernel: turns one tile of dot products into the weights of the two gradient products, in place.
//
// Math      G_ij = d_neg_i 2^(z_ij - neg_i) + d_neg_j 2^(z_ij - neg_j) at negatives
//           G_ij = d_pos_i + d_pos_j + d_pos_lse_i 2^(z_ij - pos_lse_i) + d_pos_lse_j 2^(z_ij - pos_lse_j) at positives
//           G_ij = 0 at pairs that are neither
//           dot_ij <- r_i G_ij c_j and d_scale += sum_ij r_i G_ij c_j dot_ij
// Program   one pass over the tile
// Traffic   reads and writes 4 M N bytes once
// Precision fp32, with d_scale summed over a row in fp32 and over rows in fp64
//           one exponential per logit if the log-sum-exps of the tile differ by at most 48 units of log 2, else two
//           z never exceeds its log-sum-exps, so nothing overflows
// Ragged    lanes beyond the last column are neither read nor written
// Order     rows from first to last, lanes by halving: bitwise repeatable
//
// With one exponential, G_ij = E (a_i + b_j) at negatives with E = 2^(z_ij - c), a_i = d_neg_i 2^(c - neg_i) and
// b_j = d_neg_j 2^(c - neg_j). c is the number that is subtracted from every z of a tile (docs/mathematics.md), here in
// units of log 2 and called `offset` in code: the largest log-sum-exp of the tile.
#pragma once

#include "tile_common.h"

namespace {

using fastclip::BwdSide;

// One c serves a whole tile if all its log-sum-exps differ by at most this many powers of two. Weights below
// 2^kExp2Floor, which are dropped, are then less than 2^-52 of the largest of their row and column.
constexpr float kOffsetSpread = 48.0f;

// The maximum, and whether every element above -inf is within kOffsetSpread of it (false with NaN or +inf).
struct Spread {
  float top = kNegInf;
  bool close = true;
};

inline Spread spread(const float* a, int64_t size_a, const float* b, int64_t size_b) {
  Spread s;
  for (int64_t k = 0; k < size_a; ++k) s.top = max(s.top, a[k]);
  for (int64_t k = 0; k < size_b; ++k) s.top = max(s.top, b[k]);
  const auto check = [&](const float* x, int64_t size) {
    for (int64_t k = 0; k < size; ++k) s.close &= (x[k] == kNegInf) | (s.top - x[k] <= kOffsetSpread);
  };
  check(a, size_a);
  check(b, size_b);
  return s;
}

// The two numbers of a weight d 2^(z - lse). An empty set contributes 0.
struct Term {
  float d;
  float lse;
  float relative_to(float offset) const { return d == 0.0f ? 0.0f : d * exp2(offset - lse); }
};
inline Term term(const float* d, const float* lse, int64_t k) {
  return lse[k] == kNegInf ? Term{0.0f, 0.0f} : Term{d[k], lse[k]};
}

// Weight of the negatives in row i, before r_i c_j.
struct OneExp {  // E (a_i + b_j)
  const float* b;
  Simd::F offset, a;
  static constexpr bool coarse = false;
  template <class Lanes>
  Simd::F operator()(int64_t j, Lanes lanes, const Logits& logits) const {
    return Simd::mul(exp2(logits.minus(j, lanes, offset)), Simd::add(a, load(lanes, b + j)));
  }
  template <class Lanes>
  Simd::F operator()(int64_t j, Lanes lanes, const Logits& logits, const Kept& kept) const {
    const Simd::F zero = Simd::set1(0.0f);
    const Simd::F sum = Simd::add(Simd::select(kept.row, a, zero), Simd::select(kept.col, load(lanes, b + j), zero));
    return Simd::mul(exp2(logits.minus(j, lanes, offset)), sum);
  }
};

struct TwoExp {
  const float *d, *lse;  // vectors of the columns
  Simd::F d_row, lse_row;
  bool coarse;
  template <class Lanes>
  Simd::F operator()(int64_t j, Lanes lanes, const Logits& logits) const {
    const Simd::F in_row = exp2(logits.minus(j, lanes, lse_row));
    const Simd::F in_col = exp2(logits.minus(j, lanes, load(lanes, lse + j)));
    return Simd::fma(d_row, in_row, Simd::mul(load(lanes, d + j), in_col));
  }
  template <class Lanes>
  Simd::F operator()(int64_t j, Lanes lanes, const Logits& logits, const Kept& kept) const {
    // An exponential that does not count may be infinite
    const Simd::F zero = Simd::set1(0.0f);
    const Simd::F in_row = Simd::select(kept.row, exp2(logits.minus(j, lanes, lse_row)), zero);
    const Simd::F in_col = Simd::select(kept.col, exp2(logits.minus(j, lanes, load(lanes, lse + j))), zero);
    return Simd::fma(d_row, in_row, Simd::mul(load(lanes, d + j), in_col));
  }
};

// Weights of the negatives where they are kept, else 0.
template <class Negative, class Lanes>
inline Simd::F where(Simd::Mask kept, const Negative& negative, int64_t j, Lanes lanes, const Logits& logits) {
  return Simd::select(kept, negative(j, lanes, logits), Simd::set1(0.0f));
}
template <class Negative, class Lanes>
inline Simd::F where(const Kept& kept, const Negative& negative, int64_t j, Lanes lanes, const Logits& logits) {
  return Simd::select(Simd::either(kept.row, kept.col), negative(j, lanes, logits, kept), Simd::set1(0.0f));
}

// Weigh row i. On entry to `positive(j, lanes, g)`, g holds weights by the formula of the negatives. The function
// replaces the weights of the positives among them.
template <class Keep, class Negative, class Positive>
float bwd_row(const Tile& t, const BwdSide& image, const BwdSide& text, int64_t i, const Keep& keep_i,
              const Negative& negative, const Positive& positive) {
  float* dot = t.dot + i * t.row_stride;
  const Logits logits(t, image, text, i, negative.coarse);
  const Simd::F inv_norm = Simd::set1(image.inv_norm[i]), zero = Simd::set1(0.0f);
  Simd::F d_scale = zero;
  for_columns(t.N, [&](int64_t j, auto lanes) {
    const Simd::F x = load(lanes, dot + j);
    const auto kept = kept_of(keep_i, j, lanes, logits);
    const Simd::F g = positive(j, lanes, where(kept, negative, j, lanes, logits));
    const Simd::F weight = Simd::mul(Simd::mul(g, inv_norm), load(lanes, text.inv_norm + j));
    d_scale = Simd::fma(weight, x, d_scale);
    store(lanes, dot + j, weight);
  });
  return reduce_add(d_scale);
}

template <class Row>
double bwd_rows(const Tile& t, const BwdSide& image, const BwdSide& text, const Row& row) {
  double d_scale = 0.0;
  const bool coarse = any_coarse(image.neg, t.M) | any_coarse(text.neg, t.N);
  Spread s = spread(image.neg, t.M, text.neg, t.N);
  s.close &= !coarse;
  const float offset = s.top == kNegInf ? 0.0f : s.top;
  float col_d[kTileN], col_lse[kTileN];
  for (int64_t j = 0; j < t.N; ++j) {
    const Term c = term(text.d_neg, text.neg, j);
    col_d[j] = s.close ? c.relative_to(offset) : c.d;
    col_lse[j] = c.lse;
  }
  for (int64_t i = 0; i < t.M; ++i) {
    const Term r = term(image.d_neg, image.neg, i);
    if (s.close) {
      d_scale += row(i, OneExp{col_d, Simd::set1(offset), Simd::set1(r.relative_to(offset))});
    } else {
      d_scale += row(i, TwoExp{col_d, col_lse, Simd::set1(r.d), Simd::set1(r.lse), coarse});
    }
  }
  return d_scale;
}

template <class Same, class Other>
double labelled_bwd_tile(const Tile& t, const BwdSide& image, const BwdSide& text, const Same& same,
                         const Other& other) {
  float col_d[kTileN], col_lse[kTileN];
  for (int64_t j = 0; j < t.N; ++j) {
    const Term c = term(text.d_pos_lse, text.pos_lse, j);
    col_d[j] = c.d, col_lse[j] = c.lse;
  }
  const bool coarse = any_coarse(image.pos_lse, t.M) | any_coarse(text.pos_lse, t.N);
  return bwd_rows(t, image, text, [&](int64_t i, const auto& negative) {
    const Term r = term(image.d_pos_lse, image.pos_lse, i);
    const TwoExp softmax{col_d, col_lse, Simd::set1(r.d), Simd::set1(r.lse), coarse};
    const Simd::F d_row = Simd::set1(image.d_pos[i]);
    const Logits logits(t, image, text, i, coarse);
    const Same same_i = same.row(i);
    const auto positive = [&](int64_t j, auto lanes, Simd::F g) {
      const Simd::Mask here = same_i(j, mask_of(lanes));
      if (!Simd::any(here)) return g;
      const Simd::F d_pos = Simd::add(d_row, load(lanes, text.d_pos + j));
      return Simd::select(here, Simd::add(d_pos, softmax(j, lanes, logits)), g);
    };
    return static_cast<double>(bwd_row(t, image, text, i, other.row(i), negative, positive));
  });
}

template <class Keep>
double unlabelled_bwd_tile(const Tile& t, const BwdSide& image, const BwdSide& text, const Keep& keep) {
  return bwd_rows(t, image, text, [&](int64_t i, const auto& negative) {
    float* dot = t.dot + i * t.row_stride;
    const int64_t j = t.own + i;
    const bool here = j >= 0 && j < t.N;
    const float dot_j = here ? dot[j] : 0.0f;
    const auto untouched = [](int64_t, auto, Simd::F g) { return g; };
    double d_scale = bwd_row(t, image, text, i, keep.row(i), negative, untouched);
    if (here) {
      dot[j] = (image.d_pos[i] + text.d_pos[j]) * image.inv_norm[i] * text.inv_norm[j];
      d_scale += static_cast<double>(dot[j]) * dot_j;
    }
    return d_scale;
  });
}

// Call body(keep), with the limits if there are any.
template <class Keep, class Body>
double with_limits(const BwdSide& image, const BwdSide& text, const Keep& keep, const Body& body) {
  return image.limit == nullptr ? body(keep) : body(Limited<Keep>(keep, image.limit, text.limit));
}

double contrastive_bwd_tile(const Tile& t, const BwdSide& image, const BwdSide& text) {
  const NotOwn not_own{t.own};
  if (image.label == nullptr) {
    return with_limits(image, text, not_own,
                       [&](const auto& keep) { return unlabelled_bwd_tile(t, image, text, keep); });
  }
  const auto labelled = [&](const auto& same, const auto& other) {
    return with_limits(image, text, other,
                       [&](const auto& keep) { return labelled_bwd_tile(t, image, text, same, keep); });
  };
  const SameLabel same{image.label, text.label, 0};
  const OtherLabel other{same};
  if (!t.exclude_self) return labelled(same, other);
  return labelled(Both<SameLabel>{same, not_own}, Both<OtherLabel>{other, not_own});
}

}  // namespace
