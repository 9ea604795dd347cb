// Gradients of the sigmoid loss from the products of its weights. The launch for the last chunk also
// computes the loss, d_scale and d_bias.
//
//   Math      gradients as in loss_finish.cu with upstream = 1 / divisor
//             loss and d_bias = (sum over tiles + sum over diagonal pairs) / divisor
//             d_scale = (sum over tiles / gain + sum over diagonal pairs) / divisor
//   Program   one warp per row of the chunk's images and, with the last chunk, of all texts
//             with the last chunk the first blocks also sum one piece of the scalars' parts each
//             the number of pieces does not depend on which gradients are needed, so neither do the sums
//   Traffic   reads raw, x and other, writes out, in fp32 for fp16 features
//   Precision gradients in fp32, rounded once, sums in fp64
//   Ragged    rows beyond the last are not read, columns between D and the width are 0
//   Order     one warp per row, sums by pieces in order: bitwise repeatable
#include "loss_finish.cuh"
#include "loss_kernels.h"

namespace fastclip {
namespace {

static_assert(kPieces <= kRowThreads, "the last block reads one piece per thread");

__host__ __device__ __forceinline__ int64_t pieces_of(const Loss& p) {
  return row_blocks(p.N) < kPieces ? row_blocks(p.N) : kPieces;
}

// Sum this block's piece of the parts. The last block to finish adds up the pieces, in order.
__device__ __forceinline__ void sum_shares(const Loss& p) {
  double* scratch = reinterpret_cast<double*>(dynamic_smem());
  const int thread = threadIdx.x;
  const int64_t pieces = pieces_of(p), length = (p.parts + pieces - 1) / pieces, begin = blockIdx.x * length;
  const int64_t end = begin + length < p.parts ? begin + length : p.parts;
  const double gain = p.constants[FASTCLIP_GAIN];
  const int values = p.loss_alone ? 1 : 3;
  for (int v = 0; v < values; ++v) {
    const double* part = p.part + v * p.parts;
    double sum = 0;
    for (int64_t k = begin + thread; k < end; k += kRowThreads) sum += v == 1 && k < p.tiles ? part[k] / gain : part[k];
    sum = sum_of_block(sum, scratch);
    if (thread == 0) __stcg(p.block_part + v * kPieces + blockIdx.x, sum);
  }
  const auto sync = [] { __syncthreads(); };
  if (!is_last(p.tickets, static_cast<unsigned>(pieces), thread, reinterpret_cast<unsigned*>(scratch), sync)) return;
  for (int v = 0; v < values; ++v) {
    const double sum = sum_of_block(thread < pieces ? __ldcg(p.block_part + v * kPieces + thread) : 0, scratch);
    if (thread > 0) continue;
    const double mean = sum / p.divisor;
    if (v == 0 && p.wide_loss) *p.wide_loss = mean;
    if (v == 0 && p.loss) *p.loss = static_cast<float>(mean);
    if (v > 0 && p.d_scalars) p.d_scalars[v - 1] = static_cast<float>(mean);
  }
}

template <bool kHalf>
__global__ void __launch_bounds__(kRowThreads) sigmoid_finish_kernel(const __grid_constant__ Loss p) {
  finish_rows<kHalf, kHalf>(p, 1 / p.divisor);
  if (p.last && blockIdx.x < pieces_of(p)) sum_shares(p);
}

}  // namespace

int start_sigmoid_finish(const Loss& p, bool half, void* stream) {
  int64_t blocks = finish_blocks(p);
  if (p.last && blocks < pieces_of(p)) blocks = pieces_of(p);
  if (blocks == 0) return FASTCLIP_OK;
  constexpr int kBytes = kRowsOfBlock * sizeof(double);
  return start_loss(half ? sigmoid_finish_kernel<true> : sigmoid_finish_kernel<false>, blocks, kRowThreads, kBytes, p,
                    stream);
}

}  // namespace fastclip
