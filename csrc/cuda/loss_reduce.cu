// Log-sum-exps from the partial sums of a panel of rows, and with the last panel the loss and the backward's vectors.
//
//   Math      lse2 = c2 + log2(sum of the tiles' parts), then loss_reduce.cuh
//             c2 = log2(e) c, see loss_reduce.cuh
//   Program   32 indices of both sides, because row k and column k belong to one pair
//             four warps per side share its tiles, the last block of the grid sums all records
//   Traffic   reads every partial sum once
//   Precision fp64, and sums of exp(z - c) below e^-62 request a repair, because terms of them may have flushed
//   Ragged    indices beyond N are not read
//   Order     tiles by warps, panels from first to last: bitwise repeatable
#include "loss_kernels.h"
#include "loss_reduce.cuh"

namespace fastclip {
namespace {

constexpr int kShares = 4, kWarps = 2 * kShares;
constexpr double kSafeSum = 1.1854648642803227e-27;  // e^-62

struct ReduceSmem {
  double sum[2][kShares][kRecordRows];
  double scratch[kWarps][kRecordValues];
  unsigned flag;
};

__global__ void __launch_bounds__(32 * kWarps) reduce_kernel(const __grid_constant__ Loss p) {
  ReduceSmem& smem = *reinterpret_cast<ReduceSmem*>(dynamic_smem());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, s = warp / kShares, share = warp % kShares;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kRecordRows + lane;
  const int64_t size = s == 0 ? p.rows : p.N, at = s == 0 ? k - p.i0 : k;
  double sum = 0;
  if (at >= 0 && at < size) {
    const float* part = static_cast<const float*>(p.side[s].part) + at;
    const int tiles = s == 0 ? p.tiles_n : p.tiles_m;
#pragma unroll 8
    for (int t = share; t < tiles; t += kShares) sum += part[t * size];
  }
  smem.sum[s][share][lane] = sum;
  __syncthreads();
  if (warp == 0) {
    double lse2[2];
    bool served = true;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto& sums = smem.sum[side];
      double total = (sums[0][lane] + sums[1][lane]) + (sums[2][lane] + sums[3][lane]);
      if (k < p.N && !p.first) total += p.side[side].sums[k];
      if (k < p.N && !p.last) p.side[side].sums[k] = total;
      served = served && (p.N == 1 || total >= kSafeSum);  // a single pair has no negatives; NaN fails the test
      lse2[side] = log2(total) + p.constants[FASTCLIP_OFFSET2];
    }
    if (p.last) finish_index(p, k, lane, lse2, served, false);
  }
  if (!p.last) return;
  const auto sync = [] { __syncthreads(); };
  if (is_last(p.tickets, gridDim.x, threadIdx.x, &smem.flag, sync))
    conclude<kWarps>(p, threadIdx.x, smem.scratch, false, sync);
}

}  // namespace

int start_reduce(const Loss& p, void* stream) {
  const int64_t blocks = (static_cast<int64_t>(p.N) + kRecordRows - 1) / kRecordRows;
  return start_loss(reduce_kernel, blocks, 32 * kWarps, sizeof(ReduceSmem), p, stream);
}

}  // namespace fastclip
