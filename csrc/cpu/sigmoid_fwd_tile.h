// Sigmoid-loss tile kernel: adds up one tile of the loss and turns the tile into the weights of the two gradient
// products, in place.
//
// Math      z_ij = dot_ij f_i f_j + bias in natural units, x_ij = z_ij for negatives and -z_ij for positives
//           loss = sum_ij softplus(x_ij) with softplus(x) = max(x, 0) + log1p(t) and t = exp(-|x|)
//           G_ij = d loss / d z_ij = +-sigmoid(x_ij) with sigmoid(x) = (x >= 0 ? 1 : t) / (1 + t)
//           dot_ij <- r_i G_ij c_j, d_scale = sum_ij r_i G_ij c_j dot_ij and d_bias = sum_ij G_ij
//           a pair that is left out has neither a loss nor a G: a negative above a limit, or with exclude_self its own
// Program   one pass over the tile, positives (without labels at most one per row) are computed apart in fp64
// Traffic   reads 4 M N bytes once and, with gradients, writes them once
// Precision fp32, sums over a row in fp32 and over rows in fp64
//           log1p(t) = t P(t) and never log(1 + t), so a pair's loss keeps its digits down to 2^-100
// Ragged    lanes beyond the last column are neither read nor written, and masked out of the sums
// Order     rows from first to last, lanes by halving: bitwise repeatable
#pragma once

#include <math.h>

#include "tile_common.h"

namespace {

using fastclip::SigmoidSide;
using fastclip::SigmoidSums;

struct Softplus {
  Simd::F value, derivative;
};

// exp(x) for x <= 0. x log2(e) is formed in two parts, so that a large x does not lose digits before the exponential.
inline Simd::F exp_of_negative(Simd::F x) {
  const Simd::F log2e = Simd::set1(1.44269502e+00f), log2e_low = Simd::set1(1.92596303e-08f);
  const Simd::F y = Simd::mul(x, log2e);
  const Simd::F lost = Simd::fma(x, log2e_low, Simd::fms(x, log2e, y));
  const Simd::F n = Simd::round(y);
  return exp2_of_parts(n, Simd::add(Simd::sub(y, n), lost), y);
}

inline Softplus softplus(Simd::F x) {
  const Simd::F zero = Simd::set1(0.0f), one = Simd::set1(1.0f);
  const Simd::F t = exp_of_negative(Simd::sub(zero, Simd::max(x, Simd::sub(zero, x))));  // exp(-abs(x))
  Simd::F p = Simd::set1(-3.243645187e-03f);
  p = Simd::fma(p, t, Simd::set1(1.984974928e-02f));
  p = Simd::fma(p, t, Simd::set1(-5.695631355e-02f));
  p = Simd::fma(p, t, Simd::set1(1.060332805e-01f));
  p = Simd::fma(p, t, Simd::set1(-1.530539989e-01f));
  p = Simd::fma(p, t, Simd::set1(1.967587173e-01f));
  p = Simd::fma(p, t, Simd::set1(-2.495412081e-01f));
  p = Simd::fma(p, t, Simd::set1(3.332996070e-01f));
  p = Simd::fma(p, t, Simd::set1(-4.999990165e-01f));
  p = Simd::fma(p, t, one);
  return {Simd::fma(p, t, Simd::max(x, zero)),
          Simd::div(Simd::select(Simd::not_negative(x), one, t), Simd::add(one, t))};
}

// Compute the negatives of row i, those that `keep_i` selects. All other elements get the weight 0.
template <bool kGradients, class Keep>
SigmoidSums sigmoid_row(const Tile& t, const SigmoidSide& image, const SigmoidSide& text, float bias, int64_t i,
                        const Keep& keep_i) {
  float* dot = t.dot + i * t.row_stride;
  const Logits logits(t, image, text, i);
  const Simd::F zero = Simd::set1(0.0f), minus_bias = Simd::set1(-bias), inv_norm = Simd::set1(image.inv_norm[i]);
  Simd::F loss = zero, d_scale = zero, d_bias = zero;
  for_columns(t.N, [&](int64_t j, auto lanes) {
    const Simd::Mask kept = for_both(kept_of(keep_i, j, lanes, logits));
    const Softplus s = softplus(logits.minus(j, lanes, minus_bias));
    loss = Simd::add(loss, Simd::select(kept, s.value, zero));
    if (kGradients) {
      const Simd::F g = Simd::select(kept, s.derivative, zero);
      const Simd::F weight = Simd::mul(Simd::mul(g, inv_norm), load(lanes, text.inv_norm + j));
      d_scale = Simd::fma(weight, load(lanes, dot + j), d_scale);
      d_bias = Simd::add(d_bias, g);
      store(lanes, dot + j, weight);
    }
  });
  return {reduce_add(loss), reduce_add(d_scale), reduce_add(d_bias)};
}

// Policies for the positives: in_row(t, i, visit) calls visit(j) for every positive of row i.
struct OwnPair {  // without labels
  template <class Visit>
  void in_row(const Tile& t, int64_t i, Visit visit) const {
    const int64_t j = t.own + i;
    if (j >= 0 && j < t.N) visit(j);
  }
};

template <class Same>
struct Labelled {
  Same same;
  template <class Visit>
  void in_row(const Tile& t, int64_t i, Visit visit) const {
    const Same same_i = same.row(i);
    for_columns(t.N, [&](int64_t j, auto lanes) {
      for (uint32_t bits = Simd::bits(same_i(j, mask_of(lanes))); bits != 0; bits &= bits - 1)
        visit(j + __builtin_ctz(bits));
    });
  }
};

template <bool kGradients, class Positives, class Keep>
SigmoidSums sigmoid_rows(const Tile& t, const SigmoidSide& image, const SigmoidSide& text, float bias,
                         const Positives& positives, const Keep& keep) {
  SigmoidSums sums;
  float dots[kTileN];  // of the positives of a row, which the pass over the row overwrites
  for (int64_t i = 0; i < t.M; ++i) {
    float* dot = t.dot + i * t.row_stride;
    positives.in_row(t, i, [&](int64_t j) { dots[j] = dot[j]; });
    const SigmoidSums row = sigmoid_row<kGradients>(t, image, text, bias, i, keep.row(i));
    sums.loss += row.loss, sums.d_scale += row.d_scale, sums.d_bias += row.d_bias;
    const double factor = static_cast<double>(image.factor[i]) + image.factor_low[i];
    positives.in_row(t, i, [&](int64_t j) {
      const double dot_j = dots[j], x = -(dot_j * factor * text.factor[j] + bias), e = exp(-fabs(x));
      sums.loss += (x < 0.0 ? 0.0 : x) + log1p(e);
      if (!kGradients) return;
      const double g = -(x < 0.0 ? e : 1.0) / (1.0 + e);
      dot[j] = static_cast<float>(g * image.inv_norm[i] * text.inv_norm[j]);
      sums.d_scale += dot[j] * dot_j;
      sums.d_bias += g;
    });
  }
  return sums;
}

template <class Positives, class Keep>
SigmoidSums with_gradients(const Tile& t, const SigmoidSide& image, const SigmoidSide& text, float bias, bool gradients,
                           const Positives& positives, const Keep& keep) {
  return gradients ? sigmoid_rows<true>(t, image, text, bias, positives, keep)
                   : sigmoid_rows<false>(t, image, text, bias, positives, keep);
}

template <class Positives, class Keep>
SigmoidSums with_limits(const Tile& t, const SigmoidSide& image, const SigmoidSide& text, float bias, bool gradients,
                        const Positives& positives, const Keep& keep) {
  if (image.limit == nullptr) return with_gradients(t, image, text, bias, gradients, positives, keep);
  return with_gradients(t, image, text, bias, gradients, positives, Limited<Keep>(keep, image.limit, text.limit));
}

SigmoidSums sigmoid_fwd_tile(const Tile& t, const SigmoidSide& image, const SigmoidSide& text, float bias,
                             bool gradients) {
  const NotOwn not_own{t.own};
  if (image.label == nullptr) return with_limits(t, image, text, bias, gradients, OwnPair{}, not_own);
  const SameLabel same{image.label, text.label, 0};
  const OtherLabel other{same};
  if (!t.exclude_self) return with_limits(t, image, text, bias, gradients, Labelled<SameLabel>{same}, other);
  return with_limits(t, image, text, bias, gradients, Labelled<Both<SameLabel>>{{same, not_own}},
                     Both<OtherLabel>{other, not_own});
}

}  // namespace
