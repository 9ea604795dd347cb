// Forward tile kernel: row and column statistics of one tile of z. z is never stored.
//
// Math      z_ij = dot_ij f_i f_j in units of log 2
//           neg_i = log2 sum over the negatives j of 2^z_ij, and the same over i for columns
//           pos_i = sum over the positives j of z_ij, with labels also their log2-sum-exp2
//           other_i = sum over the negatives j of 2^(z_ij - c) u_ij, if u, the cosines of other features, are given
// Program   one pass over a tile that fits into the second-level cache, three if the check below fails
//           one more for the largest z of every row and column, if requested
// Traffic   reads 4 M N bytes from memory once, writes 8 bytes per row and column of the tile
// Precision fp32, one exponential per logit relative to the maximum of the tile's first row, for rows and columns alike
//           sums are checked; if the logits are too far apart, they are computed again, with the maximum of every row
//           and of every column, so no bound on the logits is assumed
// Ragged    lanes beyond the last column are masked out of every sum
// Order     rows from first to last, lanes by halving: bitwise repeatable
//
// c is the number that is subtracted from every z of a tile before the exponential (docs/mathematics.md), here in units
// of log 2 and called `offset` in code: the maximum of the tile's first row.
#pragma once

#include "tile_common.h"

namespace {

using fastclip::FwdSide;
using fastclip::LogSum;

// Range of an acceptable sum of exponentials 2^(z - c) with one c. Terms below 2^kExp2Floor were dropped; each is then
// less than 2^-52 of the sum.
constexpr float kSmallestSum = 0x1p-48f;
constexpr float kLargestSum = 0x1p120f;

// Policies for what is added up together with the exponentials. row(i).add is called for every vector of row i with the
// exponentials in the row and in the columns, `end` after the last row. `end` returns false if a sum is out of range.
struct Nothing {
  struct Row {
    template <class Lanes>
    void add(int64_t, Lanes, Simd::F, Simd::F) {}
    void end() {}
  };
  void begin() const {}
  Row row(int64_t) const { return {}; }
  bool end() const { return true; }
};

struct OtherCosines {
  const Tile& t;
  const FwdSide &image, &text;
  LogSum row_sums, col_sums;

  struct Row {
    const OtherCosines& all;
    int64_t i;
    Simd::F row_factor, sum;
    template <class Lanes>
    void add(int64_t j, Lanes lanes, Simd::F in_row, Simd::F in_col) {
      const Simd::F x = load(lanes, all.t.other + i * all.t.row_stride + j);
      float* col = all.col_sums.other + j;
      sum = Simd::fma(in_row, Simd::mul(x, load(lanes, all.text.other_factor + j)), sum);
      store(lanes, col, Simd::fma(in_col, Simd::mul(x, row_factor), load(lanes, col)));
    }
    void end() { all.row_sums.other[i] = reduce_add(sum) * all.image.other_factor[i]; }
  };
  void begin() const {
    for (int64_t j = 0; j < t.N; ++j) col_sums.other[j] = 0.0f;
  }
  Row row(int64_t i) const { return {*this, i, Simd::set1(image.other_factor[i]), Simd::set1(0.0f)}; }
  bool end() const {
    bool good = true;
    const auto in_range = [](float x) { return x >= -kLargestSum && x <= kLargestSum; };
    for (int64_t j = 0; j < t.N; ++j) col_sums.other[j] *= text.other_factor[j], good &= in_range(col_sums.other[j]);
    for (int64_t i = 0; i < t.M; ++i) good &= in_range(row_sums.other[i]);
    return good;
  }
};

template <class Keep, class ColMax>
float row_maximum(int64_t N, const Logits& logits, const Keep& keep_i, const ColMax& into_columns) {
  const Simd::F minus_inf = Simd::set1(kNegInf);
  Simd::F top = minus_inf;
  for_columns(N, [&](int64_t j, auto lanes) {
    const Simd::F z = logits(j, lanes);
    const auto kept = kept_of(keep_i, j, lanes, logits);
    top = Simd::max(top, Simd::select(for_row(kept), z, minus_inf));
    into_columns(j, lanes, Simd::select(for_col(kept), z, minus_inf));
  });
  return reduce_max(top);
}

// Sums of 2^(z - c) with one c for the whole tile. Returns false if the result must not be used: c is so far from the
// maximum of a row or column that digits may be lost, a set is empty, or a number is not finite.
template <class Keep, class Also>
bool one_exponential(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep, const Also& also,
                     LogSum row, LogSum col) {
  const auto ignore = [](int64_t, auto, Simd::F) {};
  const float guess = row_maximum(t.N, Logits(t, image, text, 0), keep.row(0), ignore);
  const Simd::F offset = Simd::set1(guess), zero = Simd::set1(0.0f);
  for (int64_t j = 0; j < t.N; ++j) col.max[j] = guess, col.sum[j] = 0.0f;
  also.begin();
  bool good = true;
  for (int64_t i = 0; i < t.M; ++i) {
    const Logits logits(t, image, text, i);
    const auto keep_i = keep.row(i);
    auto also_i = also.row(i);
    Simd::F sum = zero;
    for_columns(t.N, [&](int64_t j, auto lanes) {
      const auto kept = kept_of(keep_i, j, lanes, logits);
      const Simd::F e = exp2(logits.minus(j, lanes, offset));
      const Simd::F in_row = Simd::select(for_row(kept), e, zero), in_col = Simd::select(for_col(kept), e, zero);
      sum = Simd::add(sum, in_row);
      store(lanes, col.sum + j, Simd::add(load(lanes, col.sum + j), in_col));
      also_i.add(j, lanes, in_row, in_col);
    });
    also_i.end();
    row.max[i] = guess;
    row.sum[i] = reduce_add(sum);
    good &= row.sum[i] >= kSmallestSum && row.sum[i] <= kLargestSum;
  }
  for (int64_t j = 0; j < t.N; ++j) good &= col.sum[j] >= kSmallestSum && col.sum[j] <= kLargestSum;
  return also.end() && good;
}

// Largest z of every row and column, -inf if no element is kept.
template <class Keep>
void maxima(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep, float* row_top,
            float* col_top) {
  for (int64_t j = 0; j < t.N; ++j) col_top[j] = kNegInf;
  for (int64_t i = 0; i < t.M; ++i) {
    row_top[i] = row_maximum(t.N, Logits(t, image, text, i), keep.row(i), [&](int64_t j, auto lanes, Simd::F z) {
      store(lanes, col_top + j, Simd::max(load(lanes, col_top + j), z));
    });
  }
}

// Sums relative to the maximum of each row and of each column, accurate for any logits.
template <class Keep, class Also>
void two_exponentials(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep, const Also& also,
                      LogSum row, LogSum col) {
  // Each row and column subtracts its maximum, with two exceptions. An empty set has the maximum -inf and subtracts 0,
  // because -inf would produce NaN. If a logit overflowed, the maximum is +inf and NaN is subtracted, so that the
  // result is NaN. An FMA would subtract +inf from the product before it rounds it: the exponential of a finite number
  // minus infinity is 0, and would hide the overflow.
  const auto offset_of = [](float top) { return top == kNegInf ? 0.0f : top == -kNegInf ? top - top : top; };
  maxima(t, image, text, keep, row.max, col.max);
  for (int64_t i = 0; i < t.M; ++i) row.max[i] = offset_of(row.max[i]);
  for (int64_t j = 0; j < t.N; ++j) col.max[j] = offset_of(col.max[j]), col.sum[j] = 0.0f;
  const bool coarse = any_coarse(row.max, t.M) | any_coarse(col.max, t.N);
  also.begin();
  for (int64_t i = 0; i < t.M; ++i) {
    const Logits logits(t, image, text, i, coarse);
    const auto keep_i = keep.row(i);
    auto also_i = also.row(i);
    const Simd::F offset = Simd::set1(row.max[i]), zero = Simd::set1(0.0f);
    Simd::F sum = zero;
    for_columns(t.N, [&](int64_t j, auto lanes) {
      const auto kept = kept_of(keep_i, j, lanes, logits);
      const Simd::F in_row = Simd::select(for_row(kept), exp2(logits.minus(j, lanes, offset)), zero);
      const Simd::F in_col = Simd::select(for_col(kept), exp2(logits.minus(j, lanes, load(lanes, col.max + j))), zero);
      sum = Simd::add(sum, in_row);
      store(lanes, col.sum + j, Simd::add(load(lanes, col.sum + j), in_col));
      also_i.add(j, lanes, in_row, in_col);
    });
    also_i.end();
    row.sum[i] = reduce_add(sum);
  }
  also.end();
}

template <class Keep, class Also>
void log_sums(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep, const Also& also, LogSum row,
              LogSum col) {
  if (!one_exponential(t, image, text, keep, also, row, col)) two_exponentials(t, image, text, keep, also, row, col);
}

void clear(LogSum x, int64_t size) {
  for (int64_t k = 0; k < size; ++k) x.max[k] = x.sum[k] = 0.0f;
}

template <class Side>
double exact_logit(const Tile& t, const Side& image, const Side& text, int64_t i, int64_t j) {
  const double factor = static_cast<double>(image.factor[i]) + image.factor_low[i];
  return t.dot[i * t.row_stride + j] * factor * text.factor[j];
}

// Sum z over the positives in fp64. Returns false if the tile has no positive.
template <class Same>
bool positive_sums(const Tile& t, const FwdSide& image, const FwdSide& text, const Same& same) {
  bool found = false;
  for (int64_t j = 0; j < t.N; ++j) text.pos_z[j] = 0.0;
  for (int64_t i = 0; i < t.M; ++i) {
    const Same same_i = same.row(i);
    double sum = 0.0;
    for_columns(t.N, [&](int64_t j, auto lanes) {
      for (uint32_t bits = Simd::bits(same_i(j, mask_of(lanes))); bits != 0; bits &= bits - 1) {
        const int64_t k = j + __builtin_ctz(bits);
        const double z = exact_logit(t, image, text, i, k);
        sum += z, text.pos_z[k] += z;
        found = true;
      }
    });
    image.pos_z[i] = sum;
  }
  return found;
}

template <class Keep, class Also>
void negatives_of(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep, const Also& also) {
  log_sums(t, image, text, keep, also, image.neg, text.neg);
  if (image.neg_top != nullptr) maxima(t, image, text, keep, image.neg_top, text.neg_top);
}

template <class Keep, class Also = Nothing>
void negatives(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep, const Also& also = {}) {
  if (image.limit == nullptr) {
    negatives_of(t, image, text, keep, also);
  } else {
    negatives_of(t, image, text, Limited<Keep>(keep, image.limit, text.limit), also);
  }
}

template <class Same, class Other>
void labelled_tile(const Tile& t, const FwdSide& image, const FwdSide& text, const Same& same, const Other& other) {
  negatives(t, image, text, other);
  if (positive_sums(t, image, text, same)) {
    log_sums(t, image, text, same, Nothing{}, image.pos, text.pos);
  } else {
    clear(image.pos, t.M);
    clear(text.pos, t.N);
  }
  if (image.pos_top != nullptr) maxima(t, image, text, same, image.pos_top, text.pos_top);
}

void contrastive_fwd_tile(const Tile& t, const FwdSide& image, const FwdSide& text) {
  const NotOwn not_own{t.own};
  if (image.label == nullptr) {
    if (t.other == nullptr) {
      negatives(t, image, text, not_own);
    } else {
      negatives(t, image, text, not_own, OtherCosines{t, image, text, image.neg, text.neg});
    }
    for (int64_t j = 0; j < t.N; ++j) text.pos_z[j] = 0.0;
    for (int64_t i = 0; i < t.M; ++i) {
      const int64_t j = t.own + i;
      image.pos_z[i] = 0.0;
      if (j < 0 || j >= t.N) continue;
      image.pos_z[i] = text.pos_z[j] = exact_logit(t, image, text, i, j);
    }
    return;
  }
  const SameLabel same{image.label, text.label, 0};
  const OtherLabel other{same};
  if (t.exclude_self) {
    labelled_tile(t, image, text, Both<SameLabel>{same, not_own}, Both<OtherLabel>{other, not_own});
  } else {
    labelled_tile(t, image, text, same, other);
  }
}

}  // namespace
