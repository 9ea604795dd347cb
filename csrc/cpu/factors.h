#pragma once

#include <cmath>
#include <cstdint>

namespace fastclip {

// Factors of the images' dot products and their rounding errors. Without the errors, the rounded scale would shift
// logits of 1,000 by 3e-5, all in the same direction.
inline void scaled_factors(const float* inv_norm, double scale, int64_t size, float* factor, float* factor_low) {
  for (int64_t i = 0; i < size; ++i) {
    const double exact = inv_norm[i] * scale;
    factor[i] = static_cast<float>(exact);
    factor_low[i] = std::isfinite(factor[i]) ? static_cast<float>(exact - factor[i]) : 0.0f;
  }
}

}  // namespace fastclip
