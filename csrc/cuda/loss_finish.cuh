// Finish of both losses of pairs: gradients from the sums of weights times features.
#pragma once
#include <type_traits>

#include "loss_reduce.cuh"

namespace fastclip {

constexpr float kEps = 1e-12f;  // lower bound of a norm

// Write the gradient of row k of side s, times upstream, in fp32 if kWide. The images' `raw` begins at row i0.
template <bool kHalf, bool kWide>
__device__ __forceinline__ void finish_row(const Loss& p, int s, int64_t k, int lane, double upstream) {
  const LossSide &side = p.side[s], &other = p.side[1 - s];
  const double gain = p.constants[FASTCLIP_GAIN];
  const float own = static_cast<float>(p.own[k] * gain) * side.factor[k] * other.factor[k];
  const float* raw = side.raw + (s == 0 ? k - p.i0 : k) * p.width;
  const uint16_t *x = row_of(side.rows, side.rows_stride, k), *y = row_of(other.rows, other.rows_stride, k);
  const auto gradient = [&](int d, float (&u)[8], float (&g)[8]) {
    float sums[8];
    read8<kHalf>(x + d, u), read8<kHalf>(y + d, g), read8(raw + d, sums);
#pragma unroll
    for (int e = 0; e < 8; ++e) g[e] = fmaf(own, g[e], sums[e]);
  };
  float along = 0.f;
  if (p.normalize && side.inv[k] * kEps < 1.f) {  // a clamped norm is a constant: no projection
    // Project with <u, g> / <u, u> of the rows themselves: the rounded inverse norm would leave more of g along u
    float squares = 0.f;
    for (int d = 8 * lane; d < p.width; d += 8 * 32) {
      float u[8], g[8];
      gradient(d, u, g);
#pragma unroll
      for (int e = 0; e < 8; ++e) along = fmaf(u[e], g[e], along), squares = fmaf(u[e], u[e], squares);
    }
    along = warp_sum(along), squares = warp_sum(squares);
    along = squares > 0.f ? along / squares : 0.f;
  }
  const double rest = static_cast<double>(side.inv[k]) / side.factor[k];
  const float factor = static_cast<float>(upstream * *p.scale * rest / gain);
  auto* out = static_cast<std::conditional_t<kWide, float, uint16_t>*>(side.out) + k * p.D;
  for (int d = 8 * lane; d < p.width; d += 8 * 32) {
    float u[8], g[8];
    gradient(d, u, g);
#pragma unroll
    for (int e = 0; e < 8; ++e) g[e] = factor * (g[e] - along * u[e]);
    if (p.D % 8 == 0)
      write8<kHalf>(out + d, g);
    else
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (d + e < p.D) write1<kHalf>(out + d + e, g[e]);
  }
}

// Number of blocks for a chunk's images and, with the last chunk, for all texts, as far as their gradients are needed.
inline int64_t finish_blocks(const Loss& p) {
  return (p.side[0].out ? row_blocks(p.rows) : 0) + (p.last && p.side[1].out ? row_blocks(p.N) : 0);
}

template <bool kHalf, bool kWide>
__device__ __forceinline__ void finish_rows(const Loss& p, double upstream) {
  const int64_t image_blocks = p.side[0].out ? row_blocks(p.rows) : 0;
  const int64_t row = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (blockIdx.x < image_blocks) {
    const int64_t l = blockIdx.x * static_cast<int64_t>(kRowsOfBlock) + row;
    if (l < p.rows) finish_row<kHalf, kWide>(p, 0, p.i0 + l, lane, upstream);
  } else if (p.side[1].out) {
    const int64_t k = (blockIdx.x - image_blocks) * kRowsOfBlock + row;
    if (k < p.N) finish_row<kHalf, kWide>(p, 1, k, lane, upstream);
  }
}

// Sum over a block, valid in thread 0. scratch: one double per warp.
__device__ __forceinline__ double sum_of_block(double sum, double* scratch) {
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kRowsOfBlock; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

}  // namespace fastclip
