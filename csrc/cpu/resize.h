// Resizing of images of 8 bits per channel, in the integer arithmetic of Pillow.
#pragma once

#include <cstdint>
#include <vector>

namespace fastclip {

// A coefficient is an integer k = 4096 high + low with 22 bits after the point, as in Pillow. Its halves fit into 16
// bits, whose products vpmaddwd sums exactly.
constexpr int kPrecisionBits = 22;
constexpr int kLowBits = 12;

// Coefficients of one axis. Output i is the sum of `taps` pixels from start[i] on. Taps beyond the filter have
// coefficient 0, so that `taps` is a multiple of kTapGroup for every output.
struct ResizeAxis {
  int64_t taps = 0;
  std::vector<int32_t> start;      // (outputs,)
  std::vector<int16_t> low, high;  // (outputs, taps)
};
constexpr int64_t kTapGroup = 4;

#ifdef FASTCLIP_X86
// Resizes the rows of RGBX pixels: `rows` rows of the input, each to axis.start.size() pixels.
void resize_rows_avx2(const uint8_t* in, int64_t in_stride, int64_t rows, const ResizeAxis& axis, uint8_t* out,
                      int64_t out_stride);
// Resizes the columns: out has axis.start.size() rows of `bytes` bytes, a multiple of 4.
void resize_columns_avx2(const uint8_t* in, int64_t in_stride, int64_t bytes, const ResizeAxis& axis, uint8_t* out,
                         int64_t out_stride);
#endif

}  // namespace fastclip
