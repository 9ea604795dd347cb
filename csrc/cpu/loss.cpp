// The mean loss without labels: the work of order N before, between and after the passes over the blocks of logits.
//
// Math      t_i = neg_i - pos_i in natural units
//           loss = w mean_i softplus(t_i) + (1 - w) mean_j softplus(t_j)
//           dL/d neg_i = w sigmoid(t_i) / N = -dL/d pos_i
// Precision fp64 up to the fp32 vectors of the weights
//           the rounding error of a log-sum-exp is moved into its derivative
// Order     parts of kPart rows, summed from first to last: bitwise repeatable on any number of threads
#include <algorithm>
#include <cmath>
#include <vector>

#include "../fastclip.h"
#include "factors.h"
#include "guarded.h"
#include "thread_pool.h"

namespace fastclip {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr int64_t kPart = 256;

// Layout of the arrays of N numbers in `saved`.
struct Side {
  float *inv_norm, *outer, *neg, *d_neg, *d_pos;
  double *neg_max, *neg_sum, *pos;  // running sums, overwritten with the log-sum-exp and its derivative at the end
};
struct Saved {
  double *gain, *large, *scale;  // large: not 0 if any outer factor is not 1
  float *factor, *factor_low;    // vectors of the images
  Side image, text;
  static constexpr int64_t kFloats = 12, kDoubles = 6;  // numbers per pair
  static_assert(kFloats / 2 + kDoubles == FASTCLIP_LOSS_ROW && kFloats % 2 == 0);

  explicit Saved(const fastclip_loss& loss) : gain(loss.saved), large(loss.saved + 1), scale(loss.saved + 2) {
    float* f = reinterpret_cast<float*>(loss.saved + FASTCLIP_LOSS_HEADER);
    double* d = loss.saved + FASTCLIP_LOSS_HEADER + kFloats / 2 * loss.N;
    const auto floats = [&] { return f += loss.N, f - loss.N; };
    const auto doubles = [&] { return d += loss.N, d - loss.N; };
    for (Side* side : {&image, &text}) side->inv_norm = floats(), side->outer = floats();
    factor = floats(), factor_low = floats();
    for (Side* side : {&image, &text}) {
      side->neg = floats(), side->d_neg = floats(), side->d_pos = floats();
      side->neg_max = doubles(), side->neg_sum = doubles(), side->pos = doubles();
    }
  }
};

void begin(const fastclip_loss& loss, const Saved& s) {
  std::fill_n(loss.saved, FASTCLIP_LOSS_HEADER, 0.0);
  *s.scale = loss.scale;
  for (const Side* side : {&s.image, &s.text}) {
    if (!loss.normalize) std::fill_n(side->inv_norm, 2 * loss.N, 1.0f);  // the outer factors follow inv_norm
    for (int64_t k = 0; loss.normalize && k < loss.N; ++k) *s.large += side->outer[k] != 1.0f;
    for (double* sums : {side->neg_max, side->neg_sum, side->pos}) std::fill_n(sums, loss.N, 0.0);
  }
  scaled_factors(s.image.inv_norm, loss.scale * kLog2e, loss.N, s.factor, s.factor_low);
}

struct Part {
  double loss = 0.0, largest = 0.0;
};

Part losses(const Side& side, double weight, int64_t begin, int64_t end) {
  Part part;
  for (int64_t k = begin; k < end; ++k) {
    const double neg = side.neg_max[k] + std::log2(side.neg_sum[k]);  // -inf without negatives
    const double t = (neg - side.pos[k]) * kLn2, e = std::exp(-std::fabs(t));
    const double d = weight * (t < 0.0 ? e : 1.0) / (1.0 + e);
    part.loss += (t < 0.0 ? 0.0 : t) + std::log1p(e);
    part.largest = std::max(part.largest, d);  // ignores NaN
    side.neg_max[k] = neg, side.neg_sum[k] = d;
  }
  return part;
}

void vectors(const Side& side, double gain, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    const double exact = side.neg_max[k], d = gain * side.neg_sum[k];
    side.neg[k] = static_cast<float>(exact);
    // Beyond 2^40 a double has too few digits left to represent the rounding error
    const double lost = std::fabs(side.neg[k]) < 0x1p40f ? exact - side.neg[k] : 0.0;
    side.d_neg[k] = static_cast<float>(d * std::exp2(-lost));
    side.d_pos[k] = static_cast<float>(-d);
    side.neg_max[k] = side.neg_sum[k] = side.pos[k] = 0.0;  // torch reads them as floats, which could be NaN
  }
}

double end(const fastclip_loss& loss, const Saved& s, int num_threads) {
  const int64_t N = loss.N, parts = (N + kPart - 1) / kPart;
  const double image_weight = loss.image_weight / N, text_weight = (1.0 - loss.image_weight) / N;
  std::vector<Part> part(static_cast<size_t>(2 * parts));
  const auto range = [&](int64_t index, const auto& body) {
    const bool image = index < parts;
    const int64_t first = (image ? index : index - parts) * kPart;
    body(image ? s.image : s.text, image ? image_weight : text_weight, first, std::min(first + kPart, N));
  };
  auto each_loss = [&](int64_t index) {
    range(index, [&](const Side& side, double weight, int64_t first, int64_t last) {
      part[index] = losses(side, weight, first, last);
    });
  };
  parallel_for(2 * parts, num_threads, each_loss);
  double sums[2] = {}, largest = 0.0;
  for (int64_t index = 0; index < 2 * parts; ++index) {
    sums[index / parts] += part[index].loss;
    largest = std::max(largest, part[index].largest);
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  *s.gain = std::ldexp(1.0, std::min(-exponent, 1000));
  auto each_vector = [&](int64_t index) {
    range(index, [&](const Side& side, double, int64_t first, int64_t last) { vectors(side, *s.gain, first, last); });
  };
  parallel_for(2 * parts, num_threads, each_vector);
  return image_weight * sums[0] + text_weight * sums[1];
}

fastclip_fwd_side fwd_side(const Side& s, const float* factor, const float* factor_low) {
  return {factor,  factor_low, nullptr, nullptr, s.neg_max, s.neg_sum, s.pos,
          nullptr, nullptr,    nullptr, nullptr, nullptr,   nullptr};
}

fastclip_bwd_side bwd_side(const Side& s, const float* factor, const float* factor_low) {
  return {factor, factor_low, s.inv_norm, nullptr, nullptr, s.neg, s.d_neg, s.d_pos, nullptr, nullptr};
}

bool valid(const fastclip_loss* loss, const fastclip_block* b) {
  return loss != nullptr && b != nullptr && loss->saved != nullptr && b->dot != nullptr && b->M > 0 && b->N > 0 &&
         b->row_stride >= b->N && b->i0 >= 0 && b->j0 >= 0 && b->i0 + b->M <= loss->N && b->j0 + b->N <= loss->N &&
         b->offset == 0;
}

}  // namespace
}  // namespace fastclip

extern "C" {

int fastclip_cpu_loss_fwd(const fastclip_loss* loss, const fastclip_block* block, double* value, int num_threads) {
  if (!fastclip::valid(loss, block) || value == nullptr) return FASTCLIP_INVALID_ARGUMENT;
  const fastclip::Saved s(*loss);
  if (block->i0 == 0 && block->j0 == 0) fastclip::begin(*loss, s);
  const fastclip_fwd_side image = fastclip::fwd_side(s.image, s.factor, s.factor_low);
  const fastclip_fwd_side text = fastclip::fwd_side(s.text, s.text.inv_norm, nullptr);
  const int status = fastclip_cpu_contrastive_fwd(block, &image, &text, num_threads);
  const bool last = block->i0 + block->M == loss->N && block->j0 + block->N == loss->N;
  if (status != FASTCLIP_OK || !last) return status;
  return fastclip::guarded([&] { *value = fastclip::end(*loss, s, num_threads); });
}

int fastclip_cpu_loss_bwd(const fastclip_loss* loss, const fastclip_block* block, double* d_scale, int num_threads) {
  if (!fastclip::valid(loss, block) || d_scale == nullptr) return FASTCLIP_INVALID_ARGUMENT;
  const fastclip::Saved s(*loss);
  const fastclip_bwd_side image = fastclip::bwd_side(s.image, s.factor, s.factor_low);
  const fastclip_bwd_side text = fastclip::bwd_side(s.text, s.text.inv_norm, nullptr);
  const int status = fastclip_cpu_contrastive_bwd(block, &image, &text, d_scale, num_threads);
  if (status == FASTCLIP_OK) *d_scale /= *s.gain;
  return status;
}

double fastclip_cpu_loss_factor(const fastclip_loss* loss, int* large) {
  const fastclip::Saved s(*loss);
  *large = *s.large != 0.0;
  return *s.scale / *s.gain;
}

}  // extern "C"
