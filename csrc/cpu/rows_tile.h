// Row kernels: norms of the features before the products, and gradients from the rows of the products.
//
// Math      inv_norm_i = 1 / max(|x_i|, 1e-12)
//           raw_i <- factor outer_i (raw_i - inv_norm_i^2 <raw_i, x_i> x_i)
//           no projection if the norm was clamped or the features are not normalised
// Program   one row after the other, each read from memory once
// Precision squares and their sums in fp64, which neither overflow nor vanish
//           dot products in fp32 over at most kPart terms, and in fp64 over these parts
// Order     lanes by halving, parts from first to last: bitwise repeatable
#pragma once

#include "tile_common.h"

namespace {

constexpr int64_t kPart = 4096;

inline double dot_part(const float* a, const float* b, int64_t size) {
  constexpr int64_t kChains = 4, kStep = kChains * Simd::kLanes;
  Simd::F sum[kChains];
  for (auto& s : sum) s = Simd::set1(0.0f);
  int64_t k = 0;
  for (; k + kStep <= size; k += kStep)
    for (int64_t c = 0; c < kChains; ++c)
      sum[c] = Simd::fma(Simd::load(a + k + c * Simd::kLanes), Simd::load(b + k + c * Simd::kLanes), sum[c]);
  for_columns(size - k, [&](int64_t j, auto lanes) {
    sum[0] = Simd::fma(load(lanes, a + k + j), load(lanes, b + k + j), sum[0]);
  });
  return reduce_add(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3])));
}

inline double dot_of_rows(const float* a, const float* b, int64_t size) {
  double sum = 0.0;
  for (int64_t k = 0; k < size; k += kPart) sum += dot_part(a + k, b + k, size - k < kPart ? size - k : kPart);
  return sum;
}

inline double norm(const float* x, int64_t size) {
  constexpr int64_t kChains = 16;  // independent sums, which hide the latency of an addition
  double sum[kChains] = {};
  int64_t k = 0;
  for (; k + kChains <= size; k += kChains)
    for (int64_t c = 0; c < kChains; ++c) sum[c] += static_cast<double>(x[k + c]) * x[k + c];
  for (; k < size; ++k) sum[0] += static_cast<double>(x[k]) * x[k];
  for (int64_t width = kChains / 2; width > 0; width /= 2)
    for (int64_t c = 0; c < width; ++c) sum[c] += sum[c + width];
  return __builtin_sqrt(sum[0]);
}

void norms_of_rows(const fastclip::Rows& rows, double* out) {
  for (int64_t i = 0; i < rows.M; ++i) out[i] = norm(rows.x + i * rows.x_stride, rows.D);
}

void finish_rows(const fastclip::Rows& rows, const fastclip::Finish& f) {
  for (int64_t i = 0; i < rows.M; ++i) {
    float* raw = f.raw + i * f.raw_stride;
    const float* x = rows.x + i * rows.x_stride;
    const Simd::F factor = Simd::set1(f.outer == nullptr ? f.factor : f.outer[i] * f.factor);
    // A clamped norm is a constant: no projection
    if (f.inv_norm == nullptr || f.inv_norm[i] * static_cast<float>(fastclip::kSmallestNorm) >= 1.0f) {
      for_columns(rows.D,
                  [&](int64_t j, auto lanes) { store(lanes, raw + j, Simd::mul(load(lanes, raw + j), factor)); });
      continue;
    }
    const double r = f.inv_norm[i];
    const Simd::F minus_along = Simd::set1(static_cast<float>(-dot_of_rows(raw, x, rows.D) * r * r));
    for_columns(rows.D, [&](int64_t j, auto lanes) {
      const Simd::F across = Simd::fma(load(lanes, x + j), minus_along, load(lanes, raw + j));
      store(lanes, raw + j, Simd::mul(across, factor));
    });
  }
}

}  // namespace
