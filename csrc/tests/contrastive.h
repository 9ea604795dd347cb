// A contrastive problem that runs through the C interface, and its expected results from plain formulas in double.
#pragma once

#include <algorithm>

#include "../fastclip.h"
#include "check.h"

struct ContrastiveCase {
  int64_t M, N;
  bool labels = false, exclude_self = false, maxima = true, limits = false;
  int64_t offset = 0;
  double scale = 20.0;  // logits are between -scale and scale, in units of log 2
  int64_t block_m = 1 << 20, block_n = 1 << 20;
  int threads = 2;
  bool others = false;          // other dot products stand beside the block, without labels
  bool rows_far_apart = false;  // the first row is 512 below the others: 2^512 wraps around in an unclamped exponent
};

inline std::vector<float> floats(int64_t size, float value = 0.0f) {
  return std::vector<float>(static_cast<size_t>(size), value);
}

// Arrays of one side, and the results of both passes.
struct ContrastiveSide {
  std::vector<float> factor, low, inv_norm, limit, other_factor, d_neg, d_pos, d_pos_lse, neg, pos_lse, neg_top,
      pos_top;
  std::vector<int32_t> label;
  std::vector<double> neg_max, neg_sum, neg_other, pos, pos_max, pos_sum;

  ContrastiveSide(int64_t size, const ContrastiveCase& c, bool image, Random& random) {
    const size_t n = static_cast<size_t>(size);
    for (size_t k = 0; k < n; ++k) {
      const double exact = (image ? c.scale : 1.0) * random.uniform(0.5, 1.0);
      factor.push_back(static_cast<float>(exact));
      low.push_back(image ? static_cast<float>(exact - factor.back()) : 0.0f);
      inv_norm.push_back(static_cast<float>(random.uniform(0.1, 2.0)));
      if (c.others) other_factor.push_back(static_cast<float>(random.uniform(0.5, 1.0)));
      limit.push_back(static_cast<float>(c.scale * random.uniform(-0.6, 0.6)));
      d_neg.push_back(static_cast<float>(random.uniform(0.1, 1.0)));
      d_pos.push_back(static_cast<float>(random.uniform(-1.0, 1.0)));
      d_pos_lse.push_back(static_cast<float>(random.uniform(-1.0, 1.0)));
      if (c.labels) label.push_back(static_cast<int32_t>(random.engine() % (n / 3 + 2)));
    }
    for (auto* x : {&factor, &low, &inv_norm, &limit, &other_factor, &d_neg, &d_pos, &d_pos_lse}) x->shrink_to_fit();
    label.shrink_to_fit();
    for (auto* x : {&neg_max, &neg_sum, &neg_other, &pos, &pos_max, &pos_sum}) x->assign(n, 0.0);
    neg_top = pos_top = floats(size, -HUGE_VALF);
    neg = pos_lse = floats(size);
  }

  fastclip_fwd_side fwd(const ContrastiveCase& c, bool image) {
    return {factor.data(),
            image ? low.data() : nullptr,
            c.labels ? label.data() : nullptr,
            c.limits ? limit.data() : nullptr,
            neg_max.data(),
            neg_sum.data(),
            pos.data(),
            c.labels ? pos_max.data() : nullptr,
            c.labels ? pos_sum.data() : nullptr,
            c.maxima ? neg_top.data() : nullptr,
            c.maxima && c.labels ? pos_top.data() : nullptr,
            c.others ? other_factor.data() : nullptr,
            c.others ? neg_other.data() : nullptr};
  }
  fastclip_bwd_side bwd(const ContrastiveCase& c, bool image) {
    for (size_t k = 0; k < neg.size(); ++k) {
      neg[k] = static_cast<float>(neg_max[k] + std::log2(neg_sum[k]));
      pos_lse[k] = static_cast<float>(pos_max[k] + std::log2(pos_sum[k]));
    }
    return {factor.data(),
            image ? low.data() : nullptr,
            inv_norm.data(),
            c.labels ? label.data() : nullptr,
            c.limits ? limit.data() : nullptr,
            neg.data(),
            d_neg.data(),
            d_pos.data(),
            c.labels ? pos_lse.data() : nullptr,
            c.labels ? d_pos_lse.data() : nullptr};
  }
};

struct ContrastiveRun {
  ContrastiveCase c;
  Random random;
  Matrix dot, weights, other;
  ContrastiveSide image, text;
  double d_scale = 0.0;

  explicit ContrastiveRun(const ContrastiveCase& c)
      : c(c), dot(c.M, c.N), weights(dot), other(dot), image(c.M, c, true, random), text(c.N, c, false, random) {
    for (Matrix* x : {&dot, &other})
      for (int64_t i = 0; i < c.M; ++i)
        for (int64_t j = 0; j < c.N; ++j) x->at(i, j) = static_cast<float>(random.uniform(-1.0, 1.0));
    if (c.rows_far_apart) {
      for (auto* factors : {&image.factor, &text.factor}) std::fill(factors->begin(), factors->end(), 1.0f);
      std::fill(image.low.begin(), image.low.end(), 0.0f);
      for (int64_t i = 0; i < c.M; ++i)
        for (int64_t j = 0; j < c.N; ++j) dot.at(i, j) = i == 0 ? -512.0f : 0.0f;
    }
  }

  // Call body(block) for every block, copied from `from` into a separate matrix and back into `to`.
  template <class Body>
  void for_blocks(const Matrix& from, Matrix* to, const Body& body) {
    for (int64_t i0 = 0; i0 < c.M; i0 += c.block_m)
      for (int64_t j0 = 0; j0 < c.N; j0 += c.block_n) {
        Matrix part(std::min(c.block_m, c.M - i0), std::min(c.block_n, c.N - j0)), beside(part);
        for (int64_t i = 0; i < part.M; ++i)
          for (int64_t j = 0; j < part.N; ++j)
            part.at(i, j) = from.at(i0 + i, j0 + j), beside.at(i, j) = other.at(i0 + i, j0 + j);
        const fastclip_block block{part.data.data(),
                                   part.stride,
                                   part.M,
                                   part.N,
                                   i0,
                                   j0,
                                   c.offset,
                                   c.exclude_self,
                                   c.others ? beside.data.data() : nullptr};
        body(block);
        part.check_gaps();
        for (int64_t i = 0; i < part.M; ++i)
          for (int64_t j = 0; j < part.N; ++j) {
            if (to != nullptr) to->at(i0 + i, j0 + j) = part.at(i, j);
            const bool same = part.at(i, j) == from.at(i0 + i, j0 + j) || std::isnan(from.at(i0 + i, j0 + j));
            if (to == nullptr) CHECK(same, "the forward pass changed its block");
          }
      }
  }

  void run() {
    const fastclip_fwd_side f_image = image.fwd(c, true), f_text = text.fwd(c, false);
    for_blocks(dot, nullptr, [&](const fastclip_block& block) {
      const int status = fastclip_cpu_contrastive_fwd(&block, &f_image, &f_text, c.threads);
      CHECK(status == FASTCLIP_OK, "status %d", status);
    });
    const fastclip_bwd_side b_image = image.bwd(c, true), b_text = text.bwd(c, false);
    for_blocks(dot, &weights, [&](const fastclip_block& block) {
      double part = kInf;
      const int status = fastclip_cpu_contrastive_bwd(&block, &b_image, &b_text, &part, c.threads);
      CHECK(status == FASTCLIP_OK, "status %d", status);
      d_scale += part;
    });
  }

  double z(int64_t i, int64_t j) const {
    return dot.at(i, j) * (static_cast<double>(image.factor[i]) + image.low[i]) * text.factor[j];
  }
  bool left_out(int64_t i, int64_t j) const { return c.labels && c.exclude_self && i + c.offset == j; }
  bool positive(int64_t i, int64_t j) const {
    return c.labels ? image.label[i] == text.label[j] && !left_out(i, j) : i + c.offset == j;
  }

  bool negative(bool row, int64_t i, int64_t j) const {
    return !positive(i, j) && !left_out(i, j) && !(c.limits && z(i, j) > (row ? image.limit[i] : text.limit[j]));
  }

  // Compare the statistics of a row or column with the formulas in double.
  void check_statistics(bool rows) const {
    const int64_t size = rows ? c.M : c.N, across = rows ? c.N : c.M;
    const ContrastiveSide& side = rows ? image : text;
    for (int64_t k = 0; k < size; ++k) {
      double neg = 0.0, neg_other = 0.0, pos_exp = 0.0, pos = 0.0, neg_top = -kInf, pos_top = -kInf;
      for (int64_t l = 0; l < across; ++l) {
        const int64_t i = rows ? k : l, j = rows ? l : k;
        const double x = z(i, j);
        if (positive(i, j)) {
          pos += x, pos_exp += std::exp2(x), pos_top = std::max(pos_top, x);
        } else if (negative(rows, i, j)) {
          neg += std::exp2(x), neg_top = std::max(neg_top, x);
          if (c.others)
            neg_other +=
                std::exp2(x) * other.at(i, j) * image.other_factor[i] * static_cast<double>(text.other_factor[j]);
        }
      }
      const double tolerance = 1e-6 + 3e-7 * std::max(c.scale, c.rows_far_apart ? 512.0 : 0.0);
      const auto check = [&](const char* what, double found, double expected) {
        CHECK(found == expected || std::fabs(found - expected) < tolerance, "%s %s %lld: %.9g, expected %.9g",
              rows ? "row" : "column", what, static_cast<long long>(k), found, expected);
      };
      check("neg", side.neg_max[k] + std::log2(side.neg_sum[k]), std::log2(neg));
      if (c.others && neg > 0.0) check("mean of the others", side.neg_other[k] / side.neg_sum[k], neg_other / neg);
      CHECK(std::fabs(side.pos[k] - pos) < 1e-9 * (1.0 + across * c.scale), "pos %.9g, expected %.9g", side.pos[k],
            pos);
      if (c.labels) check("pos_lse", side.pos_max[k] + std::log2(side.pos_sum[k]), std::log2(pos_exp));
      if (c.maxima) check("largest negative", side.neg_top[k], neg_top);
      if (c.maxima && c.labels) check("largest positive", side.pos_top[k], pos_top);
    }
  }

  void check_weights() const {
    double expected_scale = 0.0, scale_sum = 0.0;
    const double tolerance = 3e-6 + 6e-7 * std::max(c.scale, c.rows_far_apart ? 512.0 : 0.0);
    for (int64_t i = 0; i < c.M; ++i)
      for (int64_t j = 0; j < c.N; ++j) {
        double g = 0.0, sum = 0.0;
        const auto add = [&](double term) { g += term, sum += std::fabs(term); };
        const auto softmax = [&](float lse) { return lse == -HUGE_VALF ? 0.0 : std::exp2(z(i, j) - lse); };
        if (positive(i, j)) {
          add(image.d_pos[i]), add(text.d_pos[j]);
          if (c.labels)
            add(image.d_pos_lse[i] * softmax(image.pos_lse[i])), add(text.d_pos_lse[j] * softmax(text.pos_lse[j]));
        } else {
          if (negative(true, i, j)) add(image.d_neg[i] * softmax(image.neg[i]));
          if (negative(false, i, j)) add(text.d_neg[j] * softmax(text.neg[j]));
        }
        const double norms = static_cast<double>(image.inv_norm[i]) * text.inv_norm[j];
        CHECK(std::fabs(weights.at(i, j) - g * norms) <= norms * (tolerance * sum + 1e-14),
              "weight (%lld, %lld): %.9g, expected %.9g", static_cast<long long>(i), static_cast<long long>(j),
              weights.at(i, j), g * norms);
        expected_scale += g * norms * dot.at(i, j), scale_sum += sum * norms * std::fabs(dot.at(i, j));
      }
    CHECK(std::fabs(d_scale - expected_scale) <= tolerance * scale_sum, "d_scale %.9g, expected %.9g", d_scale,
          expected_scale);
  }

  void check() {
    run();
    check_statistics(true), check_statistics(false), check_weights();
  }

  bool equals(const ContrastiveRun& other) const {
    const auto same = [](const ContrastiveSide& a, const ContrastiveSide& b) {
      return a.neg_max == b.neg_max && a.neg_sum == b.neg_sum && a.pos == b.pos && a.pos_max == b.pos_max &&
             a.pos_sum == b.pos_sum && a.neg_other == b.neg_other && a.neg_top == b.neg_top && a.pos_top == b.pos_top;
    };
    return same(image, other.image) && same(text, other.text) && weights.data == other.weights.data &&
           d_scale == other.d_scale;
  }
};
