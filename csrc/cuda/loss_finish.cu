// Gradients of the features: the products plus the diagonal pairs, projected, scaled and cast. The launch
// for the last chunk also computes d_scale.
//
//   Math      g_k = raw_k + gain own_k factor_k factor'_k other_k, where factor' is the factor of the other side
//             out_k = upstream s (g_k - x_k <x_k, g_k> / <x_k, x_k>) inv_k / (factor_k gain)
//             d_scale = upstream (sum of the tiles' parts / gain + sum_k own_k cosine_k)
//   Program   one warp per row of the chunk's images and, with the last chunk, of all texts
//             two passes over D, the second from the cache
//             with the last chunk every block also sums a piece of the tiles' parts of d_scale
//   Traffic   reads raw, x and other, writes out
//   Precision fp32, with the weight of the diagonal pair never rounded to the dtype of the features
//             upstream is multiplied in before the only cast, so a loss scaler's factor prevents flushing
//   Ragged    rows beyond the last are not read, columns between D and the width are 0
//   Order     one warp per row, d_scale by blocks in order: bitwise repeatable
#include "loss_finish.cuh"
#include "loss_kernels.h"

namespace fastclip {
namespace {

// Sum this block's piece of the tiles' parts of d_scale. The last block to finish adds up the pieces, in order.
__device__ __forceinline__ void sum_scale(const Loss& p) {
  double* scratch = reinterpret_cast<double*>(dynamic_smem());
  const int thread = threadIdx.x;
  const auto sync = [] { __syncthreads(); };
  const auto block_sum = [&](double sum) { return sum_of_block(sum, scratch); };
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

template <bool kHalf>
__global__ void __launch_bounds__(kRowThreads) finish_kernel(const __grid_constant__ Loss p) {
  finish_rows<kHalf, false>(p, *p.upstream);
  if (p.last && p.d_scale) sum_scale(p);
}

}  // namespace

int start_finish(const Loss& p, bool half, void* stream) {
  int64_t blocks = finish_blocks(p);
  if (blocks == 0 && p.last && p.d_scale) blocks = row_blocks(p.rows);  // blocks that only sum d_scale
  if (blocks == 0) return FASTCLIP_OK;
  constexpr int kBytes = kRowsOfBlock * sizeof(double);
  return start_loss(half ? finish_kernel<true> : finish_kernel<false>, blocks, kRowThreads, kBytes, p, stream);
}

}  // namespace fastclip
