// Adds the own pairs to the sums of the others, projects, scales and casts; with the last chunk d_scale.
//
//   Math      g_k = raw_k + gain own_k r_k c_k other_k; out = upstream s (g - u <u, g>) r_k / (what raw has of both)
//             d_scale = upstream (sum of the tiles' shares / gain + sum_k own_k cosine_k)
//   Program   a warp a row, of the chunk's images and, with the last chunk, of all texts; twice over D, the second time
//             from the cache. With the last chunk every block also sums its piece of the tiles' shares
//   Traffic   reads raw, x and other, writes out
//   Precision fp32; the own pair's weight, the largest of a row, was never rounded to the features' dtype, and upstream
//             multiplies before the one cast
//   Ragged    rows beyond the last are not read, columns between D and the width are 0
//   Order     a warp a row, shares by blocks: bitwise repeatable
#include "loss_kernels.h"
#include "loss_reduce.cuh"

namespace fastclip {
namespace {

constexpr float kEps = 1e-12f;

// Row k of side s; raw, of images, begins at row i0.
template <bool kHalf>
__device__ __forceinline__ void finish_row(const Loss& p, int s, int64_t k, int lane) {
  const LossSide &side = p.side[s], &other = p.side[1 - s];
  const double gain = p.constants[FASTCLIP_GAIN], upstream = *p.upstream;
  const float own = static_cast<float>(p.own[k] * gain) * side.factor[k] * other.factor[k];
  const float* raw = side.raw + (s == 0 ? k - p.i0 : k) * p.width;
  const uint16_t *x = row_of(side.rows, side.rows_stride, k), *y = row_of(other.rows, other.rows_stride, k);
  const auto gradient = [&](int d, float (&u)[8], float (&g)[8]) {
    read8<kHalf>(x + d, u), read8<kHalf>(y + d, g);
    const float4 low = *reinterpret_cast<const float4*>(raw + d), high = *reinterpret_cast<const float4*>(raw + d + 4);
    const float sums[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) g[e] = fmaf(own, g[e], sums[e]);
  };
  float along = 0.f;
  if (p.normalize && side.inv[k] * kEps < 1.f) {  // where the norm was clamped it is a constant
    // <u, g> u from these very rows: the rounded inverse norm would leave more of g along u
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
  uint16_t* out = static_cast<uint16_t*>(side.out) + k * p.D;
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

// This block's piece of the tiles' shares; the last block adds the pieces up.
__device__ __forceinline__ void sum_scale(const Loss& p) {
  double* scratch = reinterpret_cast<double*>(dynamic_smem());
  const int thread = threadIdx.x;
  const auto sync = [] { __syncthreads(); };
  const auto block_sum = [&](double sum) {  // in thread 0
    sum = warp_sum(sum);
    if (thread % 32 == 0) scratch[thread / 32] = sum;
    sync();
    if (thread == 0)
      for (int w = 1; w < kRowsOfBlock; ++w) sum += scratch[w];
    sync();
    return sum;
  };
  const int64_t length = (p.tile_parts + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * length;
  const int64_t end = begin + length < p.tile_parts ? begin + length : p.tile_parts;
  double sum = 0;
  for (int64_t k = begin + thread; k < end; k += kRowThreads) sum += p.tile_part[k];
  sum = block_sum(sum);
  if (thread == 0) __stcg(p.block_part + blockIdx.x, sum);
  if (!is_last(p.tickets, gridDim.x, thread, reinterpret_cast<unsigned*>(scratch), sync)) return;
  sum = 0;
  for (int64_t b = thread; b < gridDim.x; b += kRowThreads) sum += __ldcg(p.block_part + b);
  sum = block_sum(sum);
  if (thread > 0) return;
  const double total = sum / p.constants[FASTCLIP_GAIN] + *p.own_scale;
  *p.d_scale = static_cast<float>(*p.upstream * total);
}

__host__ __device__ __forceinline__ int64_t row_blocks(int64_t rows) {
  return (rows + kRowsOfBlock - 1) / kRowsOfBlock;
}

template <bool kHalf>
__global__ void __launch_bounds__(kRowThreads) finish_kernel(const __grid_constant__ Loss p) {
  const int64_t image_blocks = p.side[0].out ? row_blocks(p.rows) : 0;
  const int64_t row = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (blockIdx.x < image_blocks) {
    const int64_t l = blockIdx.x * static_cast<int64_t>(kRowsOfBlock) + row;
    if (l < p.rows) finish_row<kHalf>(p, 0, p.i0 + l, lane);
  } else if (p.side[1].out) {
    const int64_t k = (blockIdx.x - image_blocks) * kRowsOfBlock + row;
    if (k < p.N) finish_row<kHalf>(p, 1, k, lane);
  }
  if (p.last && p.d_scale) sum_scale(p);
}

}  // namespace

int start_finish(const Loss& p, bool half, void* stream) {
  int64_t blocks = (p.side[0].out ? row_blocks(p.rows) : 0) + (p.last && p.side[1].out ? row_blocks(p.N) : 0);
  if (blocks == 0 && p.last && p.d_scale) blocks = row_blocks(p.rows);  // for the sum alone
  if (blocks == 0) return FASTCLIP_OK;
  constexpr int kBytes = kRowsOfBlock * sizeof(double);
  return start_loss(half ? finish_kernel<true> : finish_kernel<false>, blocks, kRowThreads, kBytes, p, stream);
}

}  // namespace fastclip
