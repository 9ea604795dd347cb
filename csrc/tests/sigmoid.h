// Cases and checks of the sigmoid loss on a CPU, against the formula in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../fastclip.h"
#include "check.h"

// One block.
struct SigmoidRun {
  Matrix dot, out;
  std::vector<float> row_norm, col_norm;
  double scale, bias;
  int64_t offset;
  bool exclude_self = false;
  std::vector<int32_t> row_label, col_label;  // empty without labels
  std::vector<float> row_limit, col_limit;    // empty without limits
  fastclip_sigmoid_sums sums{};

  SigmoidRun(int64_t M, int64_t N, double scale, double bias, int64_t offset)
      : dot(M, N), out(dot), scale(scale), bias(bias), offset(offset) {
    Random random;
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) dot.at(i, j) = static_cast<float>(random.uniform(-1.0, 1.0));
      row_norm.push_back(static_cast<float>(random.uniform(0.9, 1.0)));
    }
    for (int64_t j = 0; j < N; ++j) col_norm.push_back(static_cast<float>(random.uniform(0.9, 1.0)));
    for (auto* x : {&row_norm, &col_norm}) x->shrink_to_fit();
  }

  SigmoidRun& with_labels(bool exclude) {
    exclude_self = exclude;
    for (int64_t i = 0; i < dot.M; ++i) row_label.push_back(static_cast<int32_t>(i % 7));
    for (int64_t j = 0; j < dot.N; ++j) col_label.push_back(static_cast<int32_t>(j % 9));
    return *this;
  }

  SigmoidRun& with_limits() {  // a third of a side's limits leave out half of the negatives
    const float half = static_cast<float>(0.001 * scale), none = std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < dot.M; ++i) row_limit.push_back(i % 3 == 0 ? half : none);
    for (int64_t j = 0; j < dot.N; ++j) col_limit.push_back(j % 3 == 1 ? half : none);
    return *this;
  }

  void run(bool gradients, int threads) {
    out = dot;
    sums = {};
    const fastclip_block block{out.data.data(), out.stride, out.M, out.N, 0, 0, offset, exclude_self, nullptr};
    const auto at = [](const auto& x) { return x.empty() ? nullptr : x.data(); };
    const fastclip_sigmoid sigmoid{row_norm.data(), col_norm.data(), scale,         static_cast<float>(bias),
                                   at(row_label),   at(col_label),   at(row_limit), at(col_limit)};
    const int status = fastclip_cpu_sigmoid_fwd(&block, &sigmoid, gradients, &sums, threads);
    CHECK(status == FASTCLIP_OK, "status %d", status);
    out.check_gaps();
  }

  bool is_positive(int64_t i, int64_t j) const {
    return row_label.empty() ? i + offset == j : row_label[i] == col_label[j];
  }

  bool counts(int64_t i, int64_t j, double logit) const {
    if (exclude_self && i + offset == j) return false;
    return row_limit.empty() || is_positive(i, j) || !(logit > row_limit[i] || logit > col_limit[j]);
  }

  void check(double scale) {
    run(true, 2);
    double loss = 0.0, d_scale = 0.0, d_scale_sum = 0.0, d_bias = 0.0, d_bias_sum = 0.0;
    const double tolerance = 2e-6 + 2e-7 * (scale + std::fabs(bias));
    for (int64_t i = 0; i < dot.M; ++i)
      for (int64_t j = 0; j < dot.N; ++j) {
        const double logit = dot.at(i, j) * (scale * row_norm[i]) * col_norm[j], z = logit + bias;
        if (!counts(i, j, logit)) {
          CHECK(out.at(i, j) == 0.0f, "weight (%lld, %lld): %.9g", static_cast<long long>(i), static_cast<long long>(j),
                out.at(i, j));
          continue;
        }
        const double x = is_positive(i, j) ? -z : z, t = std::exp(-std::fabs(x));
        const double g = (is_positive(i, j) ? -1.0 : 1.0) * (x >= 0 ? 1.0 : t) / (1.0 + t);
        const double weight = g * row_norm[i] * col_norm[j];
        loss += std::max(x, 0.0) + std::log1p(t);
        d_scale += weight * dot.at(i, j), d_scale_sum += std::fabs(weight * dot.at(i, j));
        d_bias += g, d_bias_sum += std::fabs(g);
        CHECK(std::fabs(out.at(i, j) - weight) <= tolerance * std::fabs(weight) + 1e-29,
              "weight (%lld, %lld): %.9g, expected %.9g", static_cast<long long>(i), static_cast<long long>(j),
              out.at(i, j), weight);
      }
    const double relative = std::min(tolerance, 1e-5);
    CHECK(std::fabs(sums.loss - loss) <= relative * loss, "loss %.12g, expected %.12g", sums.loss, loss);
    CHECK(std::fabs(sums.d_scale - d_scale) <= tolerance * d_scale_sum, "d_scale %.9g %.9g", sums.d_scale, d_scale);
    CHECK(std::fabs(sums.d_bias - d_bias) <= tolerance * d_bias_sum, "d_bias %.9g %.9g", sums.d_bias, d_bias);

    const double with_gradients = sums.loss;
    run(false, 3);
    CHECK(sums.loss == with_gradients, "loss %.17g without gradients, %.17g with", sums.loss, with_gradients);
    CHECK(out.data == dot.data, "the block was changed without gradients");
  }
};
