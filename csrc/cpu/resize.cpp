// Entry point of resizing. It follows ImagingResample of Pillow: coefficients in double precision, rounded to integers,
// then one pass over the rows and one over the columns, each rounded to 8 bits. The result has the same bits.
#include "resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../fastclip.h"
#include "guarded.h"

#ifdef FASTCLIP_X86
namespace fastclip {
namespace {

double bicubic(double x) {
  constexpr double a = -0.5;
  if (x < 0.0) x = -x;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

double bilinear(double x) {
  if (x < 0.0) x = -x;
  return x < 1.0 ? 1.0 - x : 0.0;
}

// Returns false if a coefficient does not fit, or if the input has fewer pixels than there are taps. This file is
// compiled with -ffp-contract=off: fused multiply-adds would round the coefficients differently.
bool axis_of(int64_t in_size, int64_t out_size, bool cubic, ResizeAxis* axis) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  const double filter_scale = std::max(scale, 1.0);
  const double support = (cubic ? 2.0 : 1.0) * filter_scale, inverse = 1.0 / filter_scale;
  const int64_t most = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
  axis->taps = std::min((most + kTapGroup - 1) / kTapGroup * kTapGroup, in_size / kTapGroup * kTapGroup);
  axis->start.resize(out_size);
  axis->low.assign(out_size * axis->taps, 0);
  axis->high.assign(out_size * axis->taps, 0);
  std::vector<double> weights(most);
  for (int64_t i = 0; i < out_size; ++i) {
    const double center = (static_cast<double>(i) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const int64_t count = std::min(in_size, static_cast<int64_t>(center + support + 0.5)) - first;
    if (count > std::min(most, axis->taps)) return false;
    double sum = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const double x = (static_cast<double>(j + first) - center + 0.5) * inverse;
      weights[j] = cubic ? bicubic(x) : bilinear(x);
      sum += weights[j];
    }
    // The window moves to the left where it would end beyond the input: no pixel outside is read.
    const int64_t start = std::min(first, in_size - axis->taps);
    axis->start[i] = static_cast<int32_t>(start);
    for (int64_t j = 0; j < count; ++j) {
      const double weight = sum != 0.0 ? weights[j] / sum : weights[j];
      const double scaled = weight * (1 << kPrecisionBits);
      if (!(std::fabs(scaled) < (1 << 26))) return false;
      const int32_t k = static_cast<int32_t>(weight < 0 ? scaled - 0.5 : scaled + 0.5);
      const int64_t at = i * axis->taps + first - start + j;
      axis->high[at] = static_cast<int16_t>(k >> kLowBits);
      axis->low[at] = static_cast<int16_t>(k & ((1 << kLowBits) - 1));
    }
  }
  return axis->taps > 0;
}

}  // namespace
}  // namespace fastclip
#endif

int fastclip_cpu_resize(const uint8_t* in, int64_t in_stride, int64_t in_width, int64_t in_height, uint8_t* out,
                        int64_t out_width, int64_t out_height, int cubic, int columns_first) {
  if (in == nullptr || out == nullptr || std::min({in_width, in_height, out_width, out_height}) < 1 ||
      std::max({in_width, in_height, out_width, out_height}) > (1 << 24) || in_stride < 4 * in_width) {
    return FASTCLIP_INVALID_ARGUMENT;
  }
#ifdef FASTCLIP_X86
  // The other two names stand for processors with AVX2.
  if (std::strcmp(fastclip_cpu_isa(), "portable") == 0) return FASTCLIP_UNSUPPORTED_ISA;
  bool fits = false;
  const int status = fastclip::guarded([&] {
    // Pillow leaves out the pass over an axis that keeps its size. Here it has one coefficient of 1 per pixel, which
    // gives the same bits.
    fastclip::ResizeAxis across, down;
    fits = fastclip::axis_of(in_width, out_width, cubic != 0, &across) &&
           fastclip::axis_of(in_height, out_height, cubic != 0, &down);
    if (!fits) return;
    const int64_t in_bytes = 4 * in_width, out_bytes = 4 * out_width;
    const int64_t between = columns_first ? out_height * in_bytes : in_height * out_bytes;
    const std::unique_ptr<uint8_t[]> half(new uint8_t[between]);
    if (columns_first) {
      fastclip::resize_columns_avx2(in, in_stride, in_bytes, down, half.get(), in_bytes);
      fastclip::resize_rows_avx2(half.get(), in_bytes, out_height, across, out, out_bytes);
    } else {
      fastclip::resize_rows_avx2(in, in_stride, in_height, across, half.get(), out_bytes);
      fastclip::resize_columns_avx2(half.get(), out_bytes, out_bytes, down, out, out_bytes);
    }
  });
  return status == FASTCLIP_OK && !fits ? FASTCLIP_UNSUPPORTED_SIZE : status;
#else
  (void)cubic, (void)columns_first;
  return FASTCLIP_UNSUPPORTED_ISA;
#endif
}
