// The two passes of resizing with AVX2. The sums are exact integers, so that their order does not matter.
#include <immintrin.h>

#include <cstring>

#include "resize.h"

namespace fastclip {
namespace {

// Sums of the products with the high and the low halves of the coefficients
struct Sums {
  __m256i high = _mm256_setzero_si256(), low = _mm256_setzero_si256();
  void add(__m256i pixels, __m256i k_high, __m256i k_low) {
    high = _mm256_add_epi32(high, _mm256_madd_epi16(pixels, k_high));
    low = _mm256_add_epi32(low, _mm256_madd_epi16(pixels, k_low));
  }
  __m256i total() const { return _mm256_add_epi32(_mm256_slli_epi32(high, kLowBits), low); }
};

int32_t pair_at(const int16_t* k) {
  int32_t pair;
  std::memcpy(&pair, k, sizeof pair);
  return pair;
}

// Coefficients k0 to k3 as (k0, k1) four times and (k2, k3) four times, one pair for each channel
__m256i spread(const int16_t* k) {
  return _mm256_set_m128i(_mm_set1_epi32(pair_at(k + 2)), _mm_set1_epi32(pair_at(k)));
}

template <int kRows>
void rows_at_once(const uint8_t* in, int64_t in_stride, const ResizeAxis& axis, uint8_t* out, int64_t out_stride) {
  // Of four pixels, the lower lane takes the first two and the upper lane the others, each as 16-bit pairs by channel.
  const __m256i pairs = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,  //
                                         8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
  const __m128i half = _mm_set1_epi32(1 << (kPrecisionBits - 1));
  const int64_t width = static_cast<int64_t>(axis.start.size());
  for (int64_t x = 0; x < width; ++x) {
    Sums sums[kRows];
    const uint8_t* from = in + 4 * axis.start[x];
    for (int64_t k = 0; k < axis.taps; k += kTapGroup) {
      const __m256i k_high = spread(&axis.high[x * axis.taps + k]), k_low = spread(&axis.low[x * axis.taps + k]);
      for (int row = 0; row < kRows; ++row) {
        const auto* four = reinterpret_cast<const __m128i*>(from + row * in_stride + 4 * k);
        const __m256i pixels = _mm256_broadcastsi128_si256(_mm_loadu_si128(four));
        sums[row].add(_mm256_shuffle_epi8(pixels, pairs), k_high, k_low);
      }
    }
    for (int row = 0; row < kRows; ++row) {
      const __m256i total = sums[row].total();
      const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
      const __m128i rounded = _mm_srai_epi32(_mm_add_epi32(both, half), kPrecisionBits);
      const __m128i words = _mm_packs_epi32(rounded, rounded);
      const int32_t pixel = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
      std::memcpy(out + row * out_stride + 4 * x, &pixel, sizeof pixel);
    }
  }
}

// One strip of 32 bytes, or fewer at the end of a row, of one row of the output
void strip(const uint8_t* in, int64_t in_stride, const int16_t* high, const int16_t* low, int64_t taps, uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(1 << (kPrecisionBits - 1));
  Sums sums[4];
  for (int64_t k = 0; k < taps; k += 2) {
    const __m256i k_high = _mm256_set1_epi32(pair_at(high + k)), k_low = _mm256_set1_epi32(pair_at(low + k));
    const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + k * in_stride));
    const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + (k + 1) * in_stride));
    const __m256i first = _mm256_unpacklo_epi8(upper, lower), second = _mm256_unpackhi_epi8(upper, lower);
    sums[0].add(_mm256_unpacklo_epi8(first, zero), k_high, k_low);
    sums[1].add(_mm256_unpackhi_epi8(first, zero), k_high, k_low);
    sums[2].add(_mm256_unpacklo_epi8(second, zero), k_high, k_low);
    sums[3].add(_mm256_unpackhi_epi8(second, zero), k_high, k_low);
  }
  __m256i rounded[4];
  for (int i = 0; i < 4; ++i) rounded[i] = _mm256_srai_epi32(_mm256_add_epi32(sums[i].total(), half), kPrecisionBits);
  const __m256i bytes =
      _mm256_packus_epi16(_mm256_packs_epi32(rounded[0], rounded[1]), _mm256_packs_epi32(rounded[2], rounded[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bytes);
}

}  // namespace

void resize_rows_avx2(const uint8_t* in, int64_t in_stride, int64_t rows, const ResizeAxis& axis, uint8_t* out,
                      int64_t out_stride) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    rows_at_once<4>(in + row * in_stride, in_stride, axis, out + row * out_stride, out_stride);
  }
  for (; row < rows; ++row) rows_at_once<1>(in + row * in_stride, in_stride, axis, out + row * out_stride, out_stride);
}

void resize_columns_avx2(const uint8_t* in, int64_t in_stride, int64_t bytes, const ResizeAxis& axis, uint8_t* out,
                         int64_t out_stride) {
  constexpr int64_t kStrip = 32;
  const int64_t whole = bytes / kStrip * kStrip;
  for (int64_t y = 0; y < static_cast<int64_t>(axis.start.size()); ++y) {
    const uint8_t* from = in + axis.start[y] * in_stride;
    const int16_t *high = &axis.high[y * axis.taps], *low = &axis.low[y * axis.taps];
    for (int64_t x = 0; x < whole; x += kStrip) {
      strip(from + x, in_stride, high, low, axis.taps, out + y * out_stride + x);
    }
    if (whole < bytes) {  // a strip of 32 bytes that ends outside would be read beyond the last row
      uint8_t rest[kStrip];
      std::vector<uint8_t> copy(axis.taps * kStrip);
      for (int64_t k = 0; k < axis.taps; ++k) {
        std::memcpy(&copy[k * kStrip], from + k * in_stride + whole, bytes - whole);
      }
      strip(copy.data(), kStrip, high, low, axis.taps, rest);
      std::memcpy(out + y * out_stride + whole, rest, bytes - whole);
    }
  }
}

}  // namespace fastclip
