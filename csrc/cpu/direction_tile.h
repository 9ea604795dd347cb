// One-direction tile kernel: losses of whole rows of logits, which it turns into the weights of the two gradient
// products, in place.
//
// Math      z_ij = dot_ij f_i f_j in units of log 2, E_ij = 2^(z_ij - m_i) with m_i the row's largest negative
//           neg_i = m_i + log2 S_i with S_i = sum over the negatives j of E_ij
//           loss_i = softplus(neg_i - pos_i) in natural units, with several positives as in docs/mathematics.md
//           dot_ij <- G_ij c_j / h_i and factor_i = h_i r_i, so that the weight of a logit is factor_i dot_ij
//           h_i = sigmoid(neg_i - pos_i) / S_i, which leaves E_ij c_j at the negatives and -S_i c_j at the positive;
//           h_i = 1 with several positives, and 0 without any
// Program   one row after the other, in three passes over a row that stay in the second-level cache
// Traffic   reads 4 M N bytes from memory once and, with gradients, writes them once
// Precision fp32, one exponential per logit; positives, sums over more than kTileN columns and losses in fp64
//           h_i may be 1e-30 or less in a solved batch: dividing by it keeps the weights from becoming subnormal
// Ragged    lanes beyond the last column are neither read nor written, and masked out of every sum
// Order     columns from first to last, lanes by halving: bitwise repeatable
#pragma once

#include <math.h>

#include "contrastive_fwd_tile.h"

namespace {

using fastclip::DirectionSide;
using fastclip::DirectionSums;

constexpr double kLn2 = 0.693147180559945309417;

// Call body(j, lanes) for every vector of the N columns, and after every kTileN columns finished(): fp32 sums end
// there.
template <class Body, class Finished>
void for_parts(int64_t N, const Body& body, const Finished& finished) {
  for (int64_t begin = 0; begin < N; begin += kTileN) {
    for_columns(N - begin < kTileN ? N - begin : kTileN, [&](int64_t j, auto lanes) { body(begin + j, lanes); });
    finished();
  }
}

// The largest z of the kept columns, as it may be subtracted: 0 for an empty set, NaN if a logit overflowed.
template <class Keep>
float largest(const Logits& logits, int64_t N, const Keep& keep_i) {
  const float top = row_maximum(N, logits, keep_i, [](int64_t, auto, Simd::F) {});
  return top == kNegInf ? 0.0f : top == -kNegInf ? top - top : top;
}

// log2-sum-exp2 of a set of z is offset + log2(sum); sum = 0 if the set is empty. along: sum of E_ij c_j dot_ij.
struct Row {
  float offset;
  double sum = 0.0, along = 0.0;
  double lse() const { return offset + log2(sum); }
};

// Sum the kept columns of row i. With `kStore` their dot products become E_ij c_j. kSparse: most vectors keep none.
template <bool kStore, bool kSparse, class Keep>
Row sum_row(const Tile& t, const DirectionSide& image, const DirectionSide& text, int64_t i, const Keep& keep_i) {
  float* dot = t.dot + i * t.row_stride;
  Logits logits(t, image, text, i);
  Row row{largest(logits, t.N, keep_i)};
  logits.coarse = any_coarse(&row.offset, 1);
  const Simd::F offset = Simd::set1(row.offset), zero = Simd::set1(0.0f);
  Simd::F sum = zero, along = zero;
  const auto add = [&](int64_t j, auto lanes) {
    const Simd::Mask kept = keep_i(j, mask_of(lanes));
    if (kSparse && !Simd::any(kept)) return;
    const Simd::F e = Simd::select(kept, exp2(logits.minus(j, lanes, offset)), zero);
    sum = Simd::add(sum, e);
    if (!kStore) return;
    const Simd::F x = load(lanes, dot + j), weight = Simd::mul(e, load(lanes, text.factor + j));
    along = Simd::fma(weight, Simd::select(kept, x, zero), along);
    store(lanes, dot + j, Simd::select(kept, weight, x));
  };
  for_parts(t.N, add, [&] {
    row.sum += reduce_add(sum), row.along += reduce_add(along);
    sum = along = zero;
  });
  return row;
}

// The losses are computed by one piece of code with and without gradients: in two instances of a template, the compiler
// may fuse different multiply-adds, and their last bits would differ.
template <class Keep>
Row sum_negatives(bool store, const Tile& t, const DirectionSide& image, const DirectionSide& text, int64_t i,
                  const Keep& keep_i) {
  return store ? sum_row<true, false>(t, image, text, i, keep_i) : sum_row<false, false>(t, image, text, i, keep_i);
}

inline double natural_softplus(double x) { return (x < 0.0 ? 0.0 : x) + log1p(exp(-fabs(x))); }
inline double sigmoid_of(double x) { return x < 0.0 ? exp(x) / (1.0 + exp(x)) : 1.0 / (1.0 + exp(-x)); }

// Losses of pairs: the only positive of row i is the column in which the row meets the diagonal.
DirectionSums pair_rows(const Tile& t, const DirectionSide& image, const DirectionSide& text, float* factor) {
  DirectionSums sums;
  for (int64_t i = 0; i < t.M; ++i) {
    float* dot = t.dot + i * t.row_stride;
    const int64_t j = t.own + i;
    const bool here = j >= 0 && j < t.N;
    const double dot_j = here ? dot[j] : 0.0, pos = here ? exact_logit(t, image, text, i, j) : 0.0;
    const Row negatives = sum_negatives(factor != nullptr, t, image, text, i, NotOwn{j});
    const double x = (negatives.lse() - pos) * kLn2;
    sums.loss += natural_softplus(x);
    if (factor == nullptr) continue;
    const double h = negatives.sum == 0.0 ? 0.0 : sigmoid_of(x) / negatives.sum * image.inv_norm[i];
    factor[i] = static_cast<float>(h);
    sums.d_scale += h * negatives.along;
    if (!here) continue;
    dot[j] = static_cast<float>(-negatives.sum * text.factor[j]);
    sums.d_scale += h * dot[j] * dot_j;
  }
  return sums;
}

template <class Same>
double sum_of_positives(const Tile& t, const DirectionSide& image, const DirectionSide& text, int64_t i,
                        const Same& same_i) {
  double sum = 0.0;
  for_columns(t.N, [&](int64_t j, auto lanes) {
    for (uint32_t bits = Simd::bits(same_i(j, mask_of(lanes))); bits != 0; bits &= bits - 1)
      sum += exact_logit(t, image, text, i, j + __builtin_ctz(bits));
  });
  return sum;
}

// Multiply the weights E_ij c_j of the negatives by `factor`, and write (shift + slope 2^(z_ij - top)) c_j at the
// positives. Returns the sum of the latter times dot_ij.
template <class Same, class Other>
double weigh(const Tile& t, const DirectionSide& image, const DirectionSide& text, int64_t i, const Same& same_i,
             const Other& other_i, float factor, float top, float shift, float slope) {
  float* dot = t.dot + i * t.row_stride;
  const Logits logits(t, image, text, i, any_coarse(&top, 1));
  const Simd::F offset = Simd::set1(top), a = Simd::set1(shift), b = Simd::set1(slope), zero = Simd::set1(0.0f);
  Simd::F sum = zero;
  double along = 0.0;
  const auto columns = [&](int64_t j, auto lanes) {
    const Simd::Mask here = same_i(j, mask_of(lanes));
    const Simd::F x = load(lanes, dot + j);
    Simd::F weight = Simd::select(other_i(j, mask_of(lanes)), Simd::mul(x, Simd::set1(factor)), zero);
    if (Simd::any(here)) {
      const Simd::F positive =
          Simd::mul(Simd::fma(b, exp2(logits.minus(j, lanes, offset)), a), load(lanes, text.factor + j));
      weight = Simd::select(here, positive, weight);
      sum = Simd::fma(Simd::select(here, positive, zero), Simd::select(here, x, zero), sum);
    }
    store(lanes, dot + j, weight);
  };
  for_parts(t.N, columns, [&] { along += reduce_add(sum), sum = zero; });
  return along;
}

// Losses with labels. A row without a positive has loss 0.
template <class Same, class Other>
DirectionSums labelled_rows(const Tile& t, const DirectionSide& image, const DirectionSide& text, const Same& same,
                            const Other& other, float* factor) {
  DirectionSums sums;
  for (int64_t i = 0; i < t.M; ++i) {
    const auto same_i = same.row(i);
    const auto other_i = other.row(i);
    const int64_t count = image.count[i];
    const bool several = count > 1;
    const double n = static_cast<double>(count), pos = sum_of_positives(t, image, text, i, same_i);
    const Row positives = sum_row<false, true>(t, image, text, i, same_i);
    const Row negatives = sum_negatives(factor != nullptr, t, image, text, i, other_i);
    const double lse = several ? positives.lse() : pos, x = (negatives.lse() - lse) * kLn2;
    if (count > 0) sums.loss += natural_softplus(x) + (several ? (lse - pos / n) * kLn2 : 0.0);
    if (factor == nullptr) continue;
    const double d = negatives.sum == 0.0 ? 0.0 : sigmoid_of(x) / negatives.sum, share = several ? d : 1.0;
    const double h = (several ? 1.0 : count > 0 ? d : 0.0) * image.inv_norm[i];
    const double shift = several ? -1.0 / n : -negatives.sum, slope = several ? sigmoid_of(-x) / positives.sum : 0.0;
    const double along = weigh(t, image, text, i, same_i, other_i, static_cast<float>(share), positives.offset,
                               static_cast<float>(shift), static_cast<float>(slope));
    factor[i] = static_cast<float>(h);
    sums.d_scale += h * (share * negatives.along + along);
  }
  return sums;
}

DirectionSums direction_tile(const Tile& t, const DirectionSide& image, const DirectionSide& text, float* factor) {
  if (image.label == nullptr) return pair_rows(t, image, text, factor);
  const SameLabel same{image.label, text.label, 0};
  const OtherLabel other{same};
  if (!t.exclude_self) return labelled_rows(t, image, text, same, other, factor);
  const NotOwn not_own{t.own};
  return labelled_rows(t, image, text, Both<SameLabel>{same, not_own}, Both<OtherLabel>{other, not_own}, factor);
}

}  // namespace
