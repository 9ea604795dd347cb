// Inverse norms of the features, cosines of the pairs, copies of the features if needed, and the constants.
//
//   Math      inv_k = 1 / max(|x_k|, 1e-12), or 1 if not normalised, for x = image and x = text: r_k and c_k
//             cosine_k = r_k c_k <image_k, text_k>
//             copies of normalised fp16 rows are x_k 2^e with a norm in (1/2, 1], and factor_k = inv_k / 2^e
//             otherwise copies are x_k, and factor_k = inv_k
//             sigmoid: x = -(s cosine_k + b), own_k = -sigmoid(x), and sums of softplus(x), own cosine and own
//   Program   one warp per pair
//             block 0 writes the constants. If rows are not normalised, FASTCLIP_OFFSET2 (or FASTCLIP_GAIN) is left to
//             the tiles, which compute it from the largest norm of every block
//             all blocks set the tickets of the pass to 0
//   Traffic   reads both matrices once, 16 bytes at a time if aligned; copies are read again and written
//   Precision fp64; copies are exact, except that elements smaller than 2^-24 times their row's norm may flush in fp16
//   Ragged    columns of copies beyond D become 0
//   Order     lanes in a tree, rows of a block from first to last: bitwise repeatable
#include "loss_kernels.h"
#include "loss_reduce.cuh"

namespace fastclip {
namespace {

constexpr double kEps = 1e-12;  // lower bound of a norm, as in torch.nn.functional.normalize
__device__ __forceinline__ float inverse_norm(double squares, int normalize) {
  if (!normalize) return squares == squares ? 1.f : static_cast<float>(squares);  // NaN stays
  const double norm = sqrt(squares);
  return static_cast<float>(1.0 / (norm < kEps ? kEps : norm));
}

// The largest power of two not above a positive number; 1 if the number is 0, infinite or NaN.
__device__ __forceinline__ float high_bit(float x) {
  const int32_t power = as_int(x) & 0x7f800000;
  return power > 0 && power < 0x7f800000 ? as_float(power) : 1.f;
}

// Write the constants and the ticket of the sigmoid loss. Called by one block.
template <bool kHalf>
__device__ __forceinline__ void set_up_sigmoid(const Loss& p) {
  const int t = threadIdx.x;
  const float scale = *p.scale, gain = kHalf && p.normalize ? gain_of(fabsf(scale), *p.bias) : 1.f;
  if (t < kConstants) p.constants[t] = t == FASTCLIP_SCALE ? scale : t == FASTCLIP_GAIN ? gain : 0.f;
  if (t == 0) *p.tickets = 0;
}

// The sigmoid loss of a diagonal pair and its derivatives with respect to scale and bias.
__device__ __forceinline__ void own_pair(const Loss& p, double cosine, double (&own)[3]) {
  own[0] = softplus(-(static_cast<double>(*p.scale) * cosine + *p.bias), &own[2]);
  own[2] = -own[2], own[1] = own[2] * cosine;
}

// Write the constants, and zeros to the parts of `saved` that no kernel writes, so that all its bits are determined by
// the problem. Called by one block.
__device__ __forceinline__ void set_up(const Loss& p) {
  const int t = threadIdx.x;
  const float scale = *p.scale, offset2 = p.normalize ? offset2_of(fabsf(scale)) : 0.f;
  if (t < kSavedHeader) p.constants[t] = t == FASTCLIP_SCALE ? scale : t == FASTCLIP_OFFSET2 ? offset2 : 0.f;
  const int64_t k = static_cast<int64_t>(p.N) + t;
  if (k >= (p.N + int64_t{kSavedRows} - 1) / kSavedRows * kSavedRows) return;
  p.own[k] = 0;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const LossSide& side = p.side[s];
    side.inv[k] = side.factor[k] = side.lse2[k] = 0.f, side.weight[k] = 0;
  }
}

struct NormsSmem {
  double own[kRowsOfBlock][3];
  float top[2][kRowsOfBlock];
};

template <bool kHalf, bool kSigmoid>
__global__ void __launch_bounds__(kRowThreads) norms_kernel(const __grid_constant__ Loss p) {
  NormsSmem& smem = *reinterpret_cast<NormsSmem*>(dynamic_smem());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + warp;
  float top[2] = {0.f, 0.f};
  double own[3] = {0, 0, 0};
  if (k < p.N) {
    double squares[2] = {0, 0}, product = 0;
    const uint16_t *x = row_of(p.side[0].x, p.side[0].x_stride, k), *y = row_of(p.side[1].x, p.side[1].x_stride, k);
    if (p.vectors) {
      for (int d = 8 * lane; d < p.D; d += 8 * 32) {
        float a[8], b[8];
        read8<kHalf>(x + d, a), read8<kHalf>(y + d, b);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const double u = a[e], v = b[e];
          squares[0] += u * u, squares[1] += v * v, product += u * v;
        }
      }
    } else {
      for (int d = lane; d < p.D; d += 32) {
        const double u = read1<kHalf>(x + d), v = read1<kHalf>(y + d);
        squares[0] += u * u, squares[1] += v * v, product += u * v;
      }
    }
    float inv[2];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const LossSide& side = p.side[s];
      squares[s] = warp_sum(squares[s]);
      inv[s] = inverse_norm(squares[s], p.normalize);
      top[s] = static_cast<float>(sqrt(squares[s]) * inv[s]);
      const float power = p.scaled && p.copies[s] ? high_bit(inv[s]) : 1.f;
      if (lane == 0) side.inv[k] = inv[s], side.factor[k] = inv[s] / power;
      if (p.copies[s]) copy_row<kHalf>(p, side, k, power, lane);
    }
    product = warp_sum(product);
    const double cosine = static_cast<double>(inv[0]) * inv[1] * product;
    if constexpr (kSigmoid) {
      own_pair(p, cosine, own);
      if (lane == 0) p.own[k] = own[2];
    } else if (lane == 0) {
      p.cosine[k] = cosine;
    }
  }
  if (kSigmoid || p.top) {  // the same for all threads, so __syncthreads is allowed inside
    if (lane == 0) {
      for (int s = 0; s < 2; ++s) smem.top[s][warp] = top[s];
      for (int v = 0; v < 3; ++v) smem.own[warp][v] = own[v];
    }
    __syncthreads();
    if (p.top && threadIdx.x < 2) {  // the tiles compute the bound of the logits from these
      float largest = 0.f;
      for (float norm : smem.top[threadIdx.x]) largest = fmaxf(largest, norm);
      p.top[threadIdx.x * gridDim.x + blockIdx.x] = largest;
    }
    if (kSigmoid && threadIdx.x < 3) {
      double sum = 0;
      for (const auto& share : smem.own) sum += share[threadIdx.x];
      p.part[threadIdx.x * p.parts + p.tiles + blockIdx.x] = sum;
    }
  }
  if constexpr (kSigmoid) {
    if (blockIdx.x == 0) set_up_sigmoid<kHalf>(p);
    return;
  }
  if (blockIdx.x == 0) set_up(p);
  const int tickets = 2 + (p.N + kIndices - 1) / kIndices;
  for (int t = blockIdx.x * kRowThreads + threadIdx.x; t < tickets; t += gridDim.x * kRowThreads) p.tickets[t] = 0;
}

// Write the copies of the forward again for the backward. Keeping them in between would cost memory.
template <bool kHalf>
__global__ void __launch_bounds__(kRowThreads) copy_kernel(const __grid_constant__ Loss p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / 32;
  if (k >= p.N) return;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const float power = p.scaled && p.copies[s] ? high_bit(p.side[s].inv[k]) : 1.f;
    if (p.copies[s]) copy_row<kHalf>(p, p.side[s], k, power, threadIdx.x % 32);
  }
}

}  // namespace

int start_norms(const Loss& p, bool half, void* stream) {
  return start_loss(half ? norms_kernel<true, false> : norms_kernel<false, false>, row_blocks(p.N), kRowThreads,
                    sizeof(NormsSmem), p, stream);
}

int start_sigmoid_norms(const Loss& p, bool half, void* stream) {
  return start_loss(half ? norms_kernel<true, true> : norms_kernel<false, true>, row_blocks(p.N), kRowThreads,
                    sizeof(NormsSmem), p, stream);
}

int start_copies(const Loss& p, bool half, void* stream) {
  return start_loss(half ? copy_kernel<true> : copy_kernel<false>, row_blocks(p.N), kRowThreads, 0, p, stream);
}

}  // namespace fastclip
