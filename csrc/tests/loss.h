// The mean loss of pairs through the C interface, products included, and its expected results from formulas in double.
#pragma once

#include <algorithm>

#include "../fastclip.h"
#include "check.h"

struct LossCase {
  int64_t N, D;
  bool normalize = true;
  double scale = 14.0, image_weight = 0.5;
  int64_t block_m = 1 << 20, block_n = 1 << 20;
  int threads = 2;
  bool solved = false;     // every positive logit is far above the rest of its row: a loss of 1e-20 and less
  float large_row = 1.0f;  // factor of the second row of both sides
};

struct LossRun {
  using Doubles = std::vector<double>;  // (N, D) or (N, N)
  LossCase c;
  Matrix image, text, d_image, d_text;
  std::vector<double> saved;
  double value = kInf, d_scale = 0.0;

  explicit LossRun(const LossCase& c)
      : c(c),
        image(c.N, c.D),
        text(c.N, c.D),
        d_image(c.N, c.D),
        d_text(c.N, c.D),
        saved(static_cast<size_t>(FASTCLIP_LOSS_HEADER + FASTCLIP_LOSS_ROW * c.N), kInf) {
    Random random;
    for (int64_t i = 0; i < c.N; ++i) {
      const double norm = random.uniform(0.5, 2.0);
      for (int64_t k = 0; k < c.D; ++k) {
        image.at(i, k) = static_cast<float>(norm * random.uniform(-1.0, 1.0));
        text.at(i, k) = c.solved ? image.at(i, k) : static_cast<float>(norm * random.uniform(-1.0, 1.0));
      }
    }
    if (c.N < 4) return;
    for (int64_t k = 0; k < c.D; ++k) {
      image.at(1, k) *= c.large_row, text.at(1, k) *= c.large_row;
      if (!c.solved) image.at(3, k) = 0.0f;  // its norm is clamped
    }
  }

  float* norms(bool of_image) {  // followed by the outer factors
    return reinterpret_cast<float*>(saved.data() + FASTCLIP_LOSS_HEADER) + (of_image ? 0 : 2 * c.N);
  }
  float outer(bool of_image, int64_t i) { return c.normalize ? norms(of_image)[c.N + i] : 1.0f; }

  void run() {
    for (bool of_image : {true, false}) {
      const Matrix& x = of_image ? image : text;
      int64_t large = -1;
      if (!c.normalize) continue;
      const int status = fastclip_cpu_norms(x.data.data(), x.stride, c.N, c.D, norms(of_image), norms(of_image) + c.N,
                                            &large, c.threads);
      CHECK(status == FASTCLIP_OK && large == (c.large_row > 0x1p40f), "status %d, %lld large rows", status,
            static_cast<long long>(large));
    }
    // The rows that a caller multiplies: in fp32, large ones as unit rows
    Matrix rows[2] = {image, text};
    Matrix dot(c.N, c.N), weights(c.N, c.N);
    for (int64_t i = 0; i < c.N; ++i)
      for (int64_t k = 0; k < c.D; ++k) {
        rows[0].at(i, k) = static_cast<float>(static_cast<double>(image.at(i, k)) * outer(true, i));
        rows[1].at(i, k) = static_cast<float>(static_cast<double>(text.at(i, k)) * outer(false, i));
      }
    for (int64_t i = 0; i < c.N; ++i)
      for (int64_t j = 0; j < c.N; ++j) {
        double sum = 0.0;
        for (int64_t k = 0; k < c.D; ++k) sum += static_cast<double>(rows[0].at(i, k)) * rows[1].at(j, k);
        dot.at(i, j) = static_cast<float>(sum);
      }
    const fastclip_loss loss{c.N, c.normalize, c.scale, c.image_weight, saved.data()};
    for (bool forward : {true, false})
      for (int64_t i0 = 0; i0 < c.N; i0 += c.block_m)
        for (int64_t j0 = 0; j0 < c.N; j0 += c.block_n) {
          Matrix part(std::min(c.block_m, c.N - i0), std::min(c.block_n, c.N - j0));
          for (int64_t i = 0; i < part.M; ++i)
            for (int64_t j = 0; j < part.N; ++j) part.at(i, j) = dot.at(i0 + i, j0 + j);
          const fastclip_block block{part.data.data(), part.stride, part.M, part.N, i0, j0, 0, 0, nullptr};
          double d = kInf;
          const int status = forward ? fastclip_cpu_loss_fwd(&loss, &block, &value, c.threads)
                                     : fastclip_cpu_loss_bwd(&loss, &block, &d, c.threads);
          CHECK(status == FASTCLIP_OK, "status %d", status);
          part.check_gaps();
          if (forward) continue;
          d_scale += d;
          for (int64_t i = 0; i < part.M; ++i)
            for (int64_t j = 0; j < part.N; ++j) weights.at(i0 + i, j0 + j) = part.at(i, j);
        }
    int large = -1;
    const float factor = static_cast<float>(fastclip_cpu_loss_factor(&loss, &large));
    CHECK(large == (c.normalize && c.large_row > 0x1p40f), "large %d", large);
    for (bool of_image : {true, false}) {
      Matrix& out = of_image ? d_image : d_text;
      for (int64_t i = 0; i < c.N; ++i)
        for (int64_t k = 0; k < c.D; ++k) {
          double sum = 0.0;
          for (int64_t j = 0; j < c.N; ++j)
            sum += static_cast<double>(of_image ? weights.at(i, j) : weights.at(j, i)) * rows[of_image].at(j, k);
          out.at(i, k) = static_cast<float>(sum);
        }
      const Matrix& x = rows[!of_image];
      const int status = fastclip_cpu_finish(
          out.data.data(), out.stride, x.data.data(), x.stride, c.N, c.D, c.normalize ? norms(of_image) : nullptr,
          c.normalize && large != 0 ? norms(of_image) + c.N : nullptr, factor, c.threads);
      CHECK(status == FASTCLIP_OK, "status %d", status);
      out.check_gaps();
    }
  }

  static Doubles unit(const Matrix& x, bool normalize, Doubles& inverse) {
    Doubles u(static_cast<size_t>(x.M * x.N));
    inverse.assign(static_cast<size_t>(x.M), 1.0);
    for (int64_t i = 0; i < x.M; ++i) {
      double square = 0.0;
      for (int64_t k = 0; k < x.N; ++k) square += static_cast<double>(x.at(i, k)) * x.at(i, k);
      if (normalize) inverse[i] = 1.0 / std::max(std::sqrt(square), 1e-12);
      for (int64_t k = 0; k < x.N; ++k) u[i * x.N + k] = x.at(i, k) * inverse[i];
    }
    return u;
  }

  void check() {
    run();
    const int64_t N = c.N, D = c.D;
    Doubles r, s;
    const Doubles u = unit(image, c.normalize, r), v = unit(text, c.normalize, s);
    Doubles z(static_cast<size_t>(N * N)), g(z.size());
    for (int64_t i = 0; i < N; ++i)
      for (int64_t j = 0; j < N; ++j)
        for (int64_t k = 0; k < D; ++k) z[i * N + j] += c.scale * u[i * D + k] * v[j * D + k];
    double expected = 0.0, expected_scale = 0.0;
    for (bool rows : {true, false}) {
      const double weight = (rows ? c.image_weight : 1.0 - c.image_weight) / N;
      for (int64_t a = 0; a < N; ++a) {
        const auto at = [&](int64_t b) { return rows ? a * N + b : b * N + a; };
        double others = 0.0;  // relative to the positive
        for (int64_t b = 0; b < N; ++b)
          if (b != a) others += std::exp(z[at(b)] - z[at(a)]);
        expected += weight * std::log1p(others);
        for (int64_t b = 0; b < N; ++b)
          if (b != a) g[at(b)] += weight * std::exp(z[at(b)] - z[at(a)]) / (1.0 + others);
        g[at(a)] -= weight * others / (1.0 + others);
      }
    }
    CHECK(std::fabs(value - expected) <= 3e-6 * expected, "loss %.9g, expected %.9g", value, expected);
    for (bool of_image : {true, false}) {
      const Doubles &own = of_image ? u : v, &other = of_image ? v : u, &inverse = of_image ? r : s;
      double error = 0.0, norm = 0.0;
      for (int64_t i = 0; i < N; ++i) {
        Doubles d(static_cast<size_t>(D), 0.0);
        double along = 0.0;
        for (int64_t k = 0; k < D; ++k) {
          for (int64_t j = 0; j < N; ++j) d[k] += c.scale * (of_image ? g[i * N + j] : g[j * N + i]) * other[j * D + k];
          along += d[k] * own[i * D + k];
        }
        const bool projected = c.normalize && inverse[i] < 1e12;
        for (int64_t k = 0; k < D; ++k) {
          // Relative to the norm of the row, so that large and clamped rows weigh as much as others
          const double true_d = d[k] - (projected ? along * own[i * D + k] : 0.0);
          const double found = (of_image ? d_image : d_text).at(i, k) / inverse[i];
          error += (found - true_d) * (found - true_d), norm += d[k] * d[k];
        }
      }
      CHECK(error <= 1e-10 * norm, "gradient: error %.3g of %.3g", std::sqrt(error), std::sqrt(norm));
    }
    double sum = 0.0;
    for (int64_t k = 0; k < N * N; ++k) expected_scale += g[k] * z[k] / c.scale, sum += std::fabs(g[k]);
    CHECK(std::fabs(d_scale - expected_scale) <= 1e-5 * sum, "d_scale %.9g, expected %.9g", d_scale, expected_scale);
  }

  bool equals(const LossRun& other) const {
    return value == other.value && d_scale == other.d_scale && d_image.data == other.d_image.data &&
           d_text.data == other.d_text.data;
  }
};
