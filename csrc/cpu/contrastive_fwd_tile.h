// Forward tile kernel: row and column statistics of one tile of z; z is never stored.
//
// Math      neg_i = log2 sum_{j negative} 2^z_ij, z_ij = dot_ij f_i f_j (units of log 2), likewise over i for columns;
//           pos_i = sum_{j positive} z_ij; with labels also the log2-sum-exp2 over the positives
// Program   two passes over a tile that fits the second-level cache: maxima, then exponentials
// Traffic   reads 4 M N bytes from memory once; writes 8 bytes a row and a column of the tile
// Precision fp32; exponentials relative to a maximum of the tile, or of each row and column where the tile's rows
//           and columns lie more than 2^48 apart: right for any logits, no bound on them is assumed
// Ragged    lanes beyond the last column are masked out of every sum
// Order     rows from first to last, lanes by halving: bitwise repeatable
#pragma once

#include "tile_common.h"

namespace {

using fastclip::FwdSide;
using fastclip::LogSum;

template <class Keep>
void log_sums(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep, LogSum row, LogSum col) {
  for (int64_t j = 0; j < t.N; ++j) col.max[j] = kNegInf, col.sum[j] = 0.0f;
  for (int64_t i = 0; i < t.M; ++i) {
    const float* dot = t.dot + i * t.row_stride;
    const auto keep_i = keep.row(i);
    const Simd::F factor = Simd::set1(image.factor[i]), minus_inf = Simd::set1(kNegInf);
    Simd::F top = minus_inf;
    for_columns(t.N, [&](int64_t j, auto lanes) {
      Simd::F z = Simd::mul(Simd::mul(load(lanes, dot + j), factor), load(lanes, text.factor + j));
      z = Simd::select(keep_i(j, mask_of(lanes)), z, minus_inf);
      top = Simd::max(top, z);
      store(lanes, col.max + j, Simd::max(load(lanes, col.max + j), z));
    });
    row.max[i] = reduce_max(top);
  }

  const Spread s = spread(row.max, t.M, col.max, t.N);
  const auto finite_offset = [](float* x, int64_t size) {  // an empty set's offset must not make NaN of its neighbours
    for (int64_t k = 0; k < size; ++k) x[k] = x[k] == kNegInf ? 0.0f : x[k];
  };
  if (s.close) {
    for (int64_t i = 0; i < t.M; ++i) row.max[i] = s.top;
    for (int64_t j = 0; j < t.N; ++j) col.max[j] = s.top;
  }
  finite_offset(row.max, t.M);
  finite_offset(col.max, t.N);

  for (int64_t i = 0; i < t.M; ++i) {
    const float* dot = t.dot + i * t.row_stride;
    const auto keep_i = keep.row(i);
    const Simd::F factor = Simd::set1(image.factor[i]), zero = Simd::set1(0.0f), offset = Simd::set1(row.max[i]);
    Simd::F sum = zero;
    const auto add = [&](int64_t j, auto lanes, Simd::F in_row, Simd::F in_col) {
      sum = Simd::add(sum, in_row);
      store(lanes, col.sum + j, Simd::add(load(lanes, col.sum + j), in_col));
    };
    const auto z_at = [&](int64_t j, auto lanes) {
      return Simd::mul(Simd::mul(load(lanes, dot + j), factor), load(lanes, text.factor + j));
    };
    if (s.close) {
      for_columns(t.N, [&](int64_t j, auto lanes) {
        const Simd::F e = exp2(Simd::sub(z_at(j, lanes), offset));
        const Simd::F kept = Simd::select(keep_i(j, mask_of(lanes)), e, zero);
        add(j, lanes, kept, kept);
      });
    } else {
      for_columns(t.N, [&](int64_t j, auto lanes) {
        const Simd::F z = z_at(j, lanes);
        const Simd::Mask kept = keep_i(j, mask_of(lanes));
        const Simd::F in_row = exp2(Simd::sub(z, offset)), in_col = exp2(Simd::sub(z, load(lanes, col.max + j)));
        add(j, lanes, Simd::select(kept, in_row, zero), Simd::select(kept, in_col, zero));
      });
    }
    row.sum[i] = reduce_add(sum);
  }
}

void clear(LogSum x, int64_t size) {
  for (int64_t k = 0; k < size; ++k) x.max[k] = x.sum[k] = 0.0f;
}

// Sum of z over the positives; false where the tile has none.
template <class Keep>
bool positive_sums(const Tile& t, const FwdSide& image, const FwdSide& text, const Keep& keep) {
  bool found = false;
  for (int64_t j = 0; j < t.N; ++j) text.pos_z[j] = 0.0f;
  for (int64_t i = 0; i < t.M; ++i) {
    const float* dot = t.dot + i * t.row_stride;
    const auto keep_i = keep.row(i);
    const Simd::F factor = Simd::set1(image.factor[i]), zero = Simd::set1(0.0f);
    Simd::F sum = zero;
    bool found_i = false;
    for_columns(t.N, [&](int64_t j, auto lanes) {
      const Simd::Mask kept = keep_i(j, mask_of(lanes));
      if (!Simd::any(kept)) return;
      found_i = true;
      Simd::F z = Simd::mul(Simd::mul(load(lanes, dot + j), factor), load(lanes, text.factor + j));
      z = Simd::select(kept, z, zero);
      sum = Simd::add(sum, z);
      store(lanes, text.pos_z + j, Simd::add(load(lanes, text.pos_z + j), z));
    });
    image.pos_z[i] = found_i ? reduce_add(sum) : 0.0f;
    found |= found_i;
  }
  return found;
}

void contrastive_fwd_tile(const Tile& t, const FwdSide& image, const FwdSide& text) {
  if (image.label == nullptr) {
    log_sums(t, image, text, OffDiagonal{t.positive}, image.neg, text.neg);
    for (int64_t j = 0; j < t.N; ++j) text.pos_z[j] = 0.0f;
    for (int64_t i = 0; i < t.M; ++i) {
      const int64_t j = t.positive + i;
      image.pos_z[i] = 0.0f;
      if (j < 0 || j >= t.N) continue;
      image.pos_z[i] = text.pos_z[j] = t.dot[i * t.row_stride + j] * image.factor[i] * text.factor[j];
    }
    return;
  }
  const SameLabel same{image.label, text.label, 0};
  log_sums(t, image, text, OtherLabel{same}, image.neg, text.neg);
  if (positive_sums(t, image, text, same)) {
    log_sums(t, image, text, same, image.pos, text.pos);
  } else {
    clear(image.pos, t.M);
    clear(text.pos, t.N);
  }
}

}  // namespace
