// The loss of one direction: the native pass over a block of whole rows, compared with the formula in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../fastclip.h"
#include "check.h"

struct DirectionRun {
  Matrix dot, out;
  std::vector<float> row_norm, col_norm, factor;
  std::vector<int32_t> row_label, col_label;
  std::vector<int64_t> count;
  double scale;
  int64_t offset;
  bool exclude_self;
  fastclip_direction_sums sums{};

  // classes: number of labels, 0 for none
  DirectionRun(int64_t M, int64_t N, double scale, int classes = 0, int64_t offset = 0, bool exclude_self = false)
      : dot(M, N), out(dot), factor(M), count(M), scale(scale), offset(offset), exclude_self(exclude_self) {
    Random random;
    for (int64_t i = 0; i < M; ++i)
      for (int64_t j = 0; j < N; ++j) dot.at(i, j) = static_cast<float>(random.uniform(-1.0, 1.0));
    for (int64_t i = 0; i < M; ++i) row_norm.push_back(static_cast<float>(random.uniform(0.9, 1.0)));
    for (int64_t j = 0; j < N; ++j) col_norm.push_back(static_cast<float>(random.uniform(0.9, 1.0)));
    for (int64_t i = 0; i < M && classes > 0; ++i) row_label.push_back(static_cast<int32_t>(i % (classes + 1)));
    for (int64_t j = 0; j < N && classes > 0; ++j) col_label.push_back(static_cast<int32_t>(j % classes));
    for (int64_t i = 0; i < M; ++i)
      for (int64_t j = 0; j < N; ++j) count[i] += positive(i, j);
    for (auto* x : {&row_norm, &col_norm}) x->shrink_to_fit();
    for (auto* x : {&row_label, &col_label}) x->shrink_to_fit();
  }

  bool own(int64_t i, int64_t j) const { return i + offset == j; }
  bool positive(int64_t i, int64_t j) const {
    return row_label.empty() ? own(i, j) : row_label[i] == col_label[j] && !(exclude_self && own(i, j));
  }
  bool negative(int64_t i, int64_t j) const { return !positive(i, j) && !(exclude_self && own(i, j)); }

  void run(bool gradients, int threads) {
    out = dot;
    sums = {};
    std::fill(factor.begin(), factor.end(), NAN);
    const bool labels = !row_label.empty();
    const fastclip_block block{out.data.data(), out.stride, out.M, out.N, 0, 0, offset, exclude_self, nullptr};
    const fastclip_direction direction{row_norm.data(),
                                       col_norm.data(),
                                       scale,
                                       labels ? row_label.data() : nullptr,
                                       labels ? col_label.data() : nullptr,
                                       labels ? count.data() : nullptr,
                                       gradients ? factor.data() : nullptr};
    const int status = fastclip_cpu_direction(&block, &direction, &sums, threads);
    CHECK(status == FASTCLIP_OK, "status %d", status);
    out.check_gaps();
  }

  double logit(int64_t i, int64_t j) const { return dot.at(i, j) * (scale * row_norm[i]) * col_norm[j]; }

  void check() {
    run(true, 2);
    double loss = 0.0, d_scale = 0.0, d_scale_sum = 0.0;
    const double tolerance = 2e-6 + 4e-7 * std::fabs(scale);
    for (int64_t i = 0; i < dot.M; ++i) {
      double neg = -HUGE_VAL, lse = -HUGE_VAL, pos = 0.0;
      const auto add = [](double a, double b) {
        const double top = std::max(a, b);
        return top == -HUGE_VAL ? top : top + std::log(std::exp(a - top) + std::exp(b - top));
      };
      for (int64_t j = 0; j < dot.N; ++j) {
        if (negative(i, j)) neg = add(neg, logit(i, j));
        if (positive(i, j)) lse = add(lse, logit(i, j)), pos += logit(i, j);
      }
      if (row_label.empty()) count[i] = 1, lse = pos;  // the logit of a positive outside the matrix counts as 0
      const double n = static_cast<double>(count[i]), x = count[i] == 0 ? -HUGE_VAL : neg - lse;
      if (count[i] > 0) loss += std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))) + lse - pos / n;
      const double away = 1.0 / (1.0 + std::exp(-x)), near = 1.0 / (1.0 + std::exp(x));
      for (int64_t j = 0; j < dot.N; ++j) {
        double g = 0.0, size = 0.0;
        if (negative(i, j) && count[i] > 0) g = size = away * std::exp(logit(i, j) - neg);
        if (positive(i, j)) g = count[i] == 1 ? -away : near * std::exp(logit(i, j) - lse) - 1.0 / n;
        if (positive(i, j)) size = count[i] == 1 ? away : near * std::exp(logit(i, j) - lse) + 1.0 / n;
        const double norms = static_cast<double>(row_norm[i]) * col_norm[j], ours = 1.0 * factor[i] * out.at(i, j);
        d_scale += g * norms * dot.at(i, j), d_scale_sum += std::fabs(size * norms * dot.at(i, j));
        CHECK(std::fabs(ours - g * norms) <= tolerance * size + 1e-29, "weight (%lld, %lld): %.9g, expected %.9g",
              static_cast<long long>(i), static_cast<long long>(j), ours, g * norms);
      }
    }
    CHECK(std::fabs(sums.loss - loss) <= 1e-5 * loss, "loss %.12g, expected %.12g", sums.loss, loss);
    CHECK(std::fabs(sums.d_scale - d_scale) <= tolerance * d_scale_sum, "d_scale %.9g %.9g", sums.d_scale, d_scale);

    const double with_gradients = sums.loss;
    run(false, 3);
    CHECK(sums.loss == with_gradients, "loss %.17g without gradients, %.17g with", sums.loss, with_gradients);
    CHECK(out.data == dot.data, "the block was changed without gradients");
  }
};

template <class Shapes>
void direction_accurate(const Shapes& shapes) {
  for (const auto& [M, N] : shapes) {
    DirectionRun(M, N, 10.0).check();
    for (int classes : {1, 9, 2000}) {
      DirectionRun(M, N, 10.0, classes).check();
      DirectionRun(M, N, 10.0, classes, 1, /*exclude_self=*/true).check();
    }
  }
  for (double scale : {0.0, -5.0, 400.0}) {
    DirectionRun(66, 1030, scale, 0, 3).check();
    DirectionRun(66, 1030, scale, 30, -3, /*exclude_self=*/true).check();
  }
}

inline void direction_threads() {
  for (int classes : {0, 40}) {
    DirectionRun first(300, 1100, 10.0, classes);
    first.run(true, 1);
    for (int threads : {2, 3, 8}) {
      DirectionRun other(300, 1100, 10.0, classes);
      other.run(true, threads);
      CHECK(other.out.data == first.out.data && other.factor == first.factor &&
                std::memcmp(&other.sums, &first.sums, sizeof first.sums) == 0,
            "%d threads", threads);
    }
  }
}

inline void direction_refusals() {
  float x[4] = {};
  int32_t label[2] = {};
  fastclip_direction_sums sums{};
  const fastclip_block block{x, 2, 2, 2, 0, 0, 0, 0, nullptr};
  fastclip_block part = block;
  part.j0 = 2;
  const fastclip_direction good{nullptr, nullptr, 1.0, nullptr, nullptr, nullptr, nullptr};
  fastclip_direction one_norm = good, one_label = good;
  one_norm.image_inv_norm = x, one_label.image_label = label;
  const auto refuses = [&](const fastclip_block* b, const fastclip_direction* d, fastclip_direction_sums* s) {
    return fastclip_cpu_direction(b, d, s, 1) == FASTCLIP_INVALID_ARGUMENT;
  };
  CHECK(fastclip_cpu_direction(&block, &good, &sums, 1) == FASTCLIP_OK, "good");
  CHECK(refuses(&part, &good, &sums), "a part of the columns");
  CHECK(refuses(&block, &one_norm, &sums), "norms on one side");
  CHECK(refuses(&block, &one_label, &sums), "labels on one side");
  CHECK(refuses(&block, nullptr, &sums) && refuses(&block, &good, nullptr), "null");
}
