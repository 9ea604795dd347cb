// Gradients of the sigmoid loss. The forward has computed them for an upstream gradient of 1. This kernel multiplies
// them by the upstream gradient.
//
//   Math      out = upstream * kept, for the features of both sides and for both scalars
//   Program   2048 elements of one side per block, 8 per thread, and block 0 also has the scalars
//   Traffic   reads kept, in fp32 for fp16 features, and writes out
//   Precision fp32, rounded once, so a loss scaler's factor prevents flushing in fp16
//   Ragged    the last elements one by one, or all of them if a side is not aligned to 16 bytes
//   Order     nothing is summed
#include <type_traits>

#include "loss_kernels.h"
#include "loss_rows.cuh"

namespace fastclip {
namespace {

constexpr int kElements = 8 * kRowThreads;  // per block

__host__ __device__ __forceinline__ int64_t blocks_of(const LossSide& side) {
  return side.out ? (side.count + kElements - 1) / kElements : 0;
}

__device__ __forceinline__ float read1_of(const float* x) { return *x; }
__device__ __forceinline__ float read1_of(const uint16_t* x) { return read1<false>(x); }
__device__ __forceinline__ void read8_of(const float* x, float (&values)[8]) { read8(x, values); }
__device__ __forceinline__ void read8_of(const uint16_t* x, float (&values)[8]) { read8<false>(x, values); }

template <bool kHalf>
__global__ void __launch_bounds__(kRowThreads) sigmoid_bwd_kernel(const __grid_constant__ Loss p) {
  const float upstream = *p.upstream;
  if (blockIdx.x == 0 && threadIdx.x < 2) {
    float* out = p.d_scalar[threadIdx.x];
    if (out) *out = upstream * *p.kept_scalar[threadIdx.x];
  }
  const int64_t image_blocks = blocks_of(p.side[0]);
  const bool text = blockIdx.x >= image_blocks;
  const LossSide& side = p.side[text];
  if (!side.out) return;
  const int64_t begin = (text ? blockIdx.x - image_blocks : blockIdx.x) * kElements + 8 * threadIdx.x;
  const auto* kept = static_cast<const std::conditional_t<kHalf, float, uint16_t>*>(side.x);
  uint16_t* out = static_cast<uint16_t*>(side.out);
  if (p.vectors && begin + 8 <= side.count) {
    float values[8];
    read8_of(kept + begin, values);
#pragma unroll
    for (float& value : values) value *= upstream;
    write8<kHalf>(out + begin, values);
    return;
  }
  for (int64_t k = begin; k < begin + 8 && k < side.count; ++k) write1<kHalf>(out + k, upstream * read1_of(kept + k));
}

}  // namespace

int start_sigmoid_bwd(const Loss& p, bool half, void* stream) {
  int64_t blocks = blocks_of(p.side[0]) + blocks_of(p.side[1]);
  if (blocks == 0 && (p.d_scalar[0] || p.d_scalar[1])) blocks = 1;
  if (blocks == 0) return FASTCLIP_OK;
  return start_loss(half ? sigmoid_bwd_kernel<true> : sigmoid_bwd_kernel<false>, blocks, kRowThreads, 0, p, stream);
}

}  // namespace fastclip
