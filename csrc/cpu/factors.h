#pragma once

#include <cmath>
#include <cstdint>

namespace fastclip {

// What an image's dot products are multiplied with, and what rounding took from it: the scale rounded would shift
// logits of 1,000 by 3e-5, all in the same direction.
inline void scaled_factors(const float* inv_norm, double scale, int64_t size, float* factor, float* factor_low) {
  for (int64_t i = 0; i < size; ++i) {
    const double exact = inv_norm[i] * scale;
    factor[i] = static_cast<float>(exact);
    factor_low[i] = std::isfinite(factor[i]) ? static_cast<float>(exact - factor[i]) : 0.0f;
  }
}

}  // namespace fastclip
