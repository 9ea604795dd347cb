// The repair: computes log-sum-exps from true maxima if the shared c (see tile.cuh) lost terms, and redoes the
// reduction.
//
//   Math      part = top + log2 sum 2^(z2 - top) over the negatives of every row and column of a tile
//             two exponentials per logit, z2 with its rounding error, because these logits may be in the thousands
//   Program   see tile.cuh, returns at once unless the device requested a repair
//             the warpgroup that finishes the last tile of a block of 128 indices reduces that block
//             the warpgroup that reduces the last block sums the records
//   Traffic   writes 8 bytes per index and tile across, for rows and for columns, and reads them twice
//   Precision sums of a tile in fp32 relative to its maxima, everything between tiles in fp64
//   Ragged    elements outside are -inf
//   Order     tiles and panels from first to last, whichever warpgroup is the last: bitwise repeatable
#include "launch.cuh"
#include "loss_kernels.h"
#include "loss_reduce.cuh"

namespace fastclip {
namespace {

__device__ __forceinline__ float safe(float top) { return top == -HUGE_VALF ? 0.f : top; }

// `exchange` of tile.cuh, with the maximum in place of the sum.
__device__ __forceinline__ float exchange_max(float low, float high, int bit, int lane) {
  const bool upper = lane & bit;
  return fmaxf(upper ? high : low, __shfl_xor_sync(0xffffffff, upper ? low : high, bit));
}

// log2-sum-exp2 over the tiles' parts of one index and the result `before` of earlier panels.
__device__ __forceinline__ double merge(const double* part, int64_t stride, int tiles, double before) {
  double top = before;
#pragma unroll 4
  for (int t = 0; t < tiles; ++t) {
    const double value = __ldcg(part + t * stride);
    top = value > top ? value : top;  // ignores NaN; the sum below does not
  }
  if (top != top || top == -kInf) top = 0;
  double sum = exp2(before - top);
#pragma unroll 4
  for (int t = 0; t < tiles; ++t) sum += exp2(__ldcg(part + t * stride) - top);
  return log2(sum) + top;
}

template <bool kHalf_>
struct Repair {
  static constexpr bool kHalf = kHalf_, kLabels = false, kStores = false, kSkipsRepairs = false;
  static constexpr Exact kExact = Exact::alone;
  static constexpr int kFinds = kFindsNothing;
  static constexpr int kBlockN = kExactColumns, kStages = 5, kSums = 2, kSumsN = kBlockN;
  enum { kScaled, kRest, kRowVectors };
  enum { kFactor, kTop, kColVectors };
  static constexpr int kShare = kIndices / kBlockN;  // tiles of columns in a block of indices
  static_assert(kBlockM == kIndices && kIndices % kBlockN == 0, "a tile belongs to one block by rows, one by columns");

  static __device__ __forceinline__ void load_row(const Params& p, int i, Scratch<Repair>& s, int k) {
    const float factor = i < p.M ? p.row.factor[i] : 0.f;
    s.row[kScaled][k] = scaled2(factor, p.constants), s.row[kRest][k] = rest2(factor, p.constants);
  }

  static __device__ __forceinline__ void load_col(const Params& p, int j, Scratch<Repair>& s, int k) {
    s.col[kFactor][k] = j < p.N ? p.col.factor[j] : 0.f;
  }

  // Reduce block `b` of 128 indices, one per thread. All its partial results of this panel have been stored.
  static __device__ __forceinline__ void reduce(const Loss& p, int b, int thread, int barrier, double* scratch) {
    const int64_t k = static_cast<int64_t>(b) * kIndices + thread;
    double lse2[2] = {-kInf, -kInf};
    if (k < p.N) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const LossSide& side = p.side[s];
        const int64_t size = s == 0 ? p.rows : p.N, at = s == 0 ? k - p.i0 : k;
        const int tiles = at < 0 || at >= size ? 0 : s == 0 ? p.tiles_n : p.tiles_m;
        const double before = p.first ? -kInf : side.sums[k];
        lse2[s] = merge(static_cast<const double*>(side.part) + at, size, tiles, before);
        if (!p.last) side.sums[k] = lse2[s];
      }
    }
    if (thread == 0) p.tickets[2 + b] = 0;  // for the next panel
    if (!p.last) return;
    finish_index(p, k, thread % 32, lse2, true, true);
    const auto sync = [barrier] { named_sync(barrier, 128); };
    auto* flag = reinterpret_cast<unsigned*>(scratch);
    if (is_last(p.tickets + 1, (p.N + kIndices - 1) / kIndices, thread, flag, sync))
      conclude<4>(p, thread, reinterpret_cast<double (*)[kRecordValues]>(scratch), true, sync);
  }

  static __device__ __forceinline__ void finish_exact(const float (&acc)[kHalves][kBlockN / 2],
                                                      const Epilogue<Repair>& t) {
    const Params& p = t.p;
    const Loss& loss = p.loss;
    const Tile& tile = t.tile;
    const Place& at = t.at;
    Mask mask = t.mask();
    float scaled[kHalves][2], rest[kHalves][2], row_top[kHalves][2], row_sum[kHalves][2] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scaled[half][h] = t.row(kScaled, half, h), rest[half][h] = t.row(kRest, half, h);
        row_top[half][h] = -HUGE_VALF;
      }
    const auto logit = [&](int half, int h, int c, int e, float factor, float* low) {
      return exact_logit2(acc[half][4 * c + 2 * h + e] * factor, scaled[half][h], rest[half][h],
                          mask.own(half, h, c, e) || mask.outside(half, h, c, e), low);
    };
    // The order in which a thread visits its columns is that of contrastive_fwd.cu, with the same exchanges
    constexpr int kQuarter = kBlockN / 32;
    const auto column = [&](int k, int low, int middle, int upper) {
      return k + kQuarter * low + 2 * kQuarter * middle + 4 * kQuarter * upper;
    };
    const int first =
        4 * kQuarter * (at.lane >> 4 & 1) + 2 * kQuarter * (at.lane >> 3 & 1) + kQuarter * (at.lane >> 2 & 1);
    const auto place = [&](int k) { return 8 * ((first + k) / 2) + at.col + (k & 1); };
#pragma unroll
    for (int k = 0; k < kQuarter; ++k) {
      float quarters[2];
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        float halves[2];
#pragma unroll
        for (int middle = 0; middle < 2; ++middle) {
          float top[2] = {-HUGE_VALF, -HUGE_VALF};
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const int c = column(k, low, middle, upper) / 2, e = k % 2;
            const float2 factors = t.cols(kFactor, c);
#pragma unroll
            for (int half = 0; half < kHalves; ++half)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                float unused;
                const float z2 = logit(half, h, c, e, e ? factors.y : factors.x, &unused);
                row_top[half][h] = fmaxf(row_top[half][h], z2), top[upper] = fmaxf(top[upper], z2);
              }
          }
          halves[middle] = exchange_max(top[0], top[1], 16, at.lane);
        }
        quarters[low] = exchange_max(halves[0], halves[1], 8, at.lane);
      }
      t.scratch.sums[0][at.warp][place(k)] = exchange_max(quarters[0], quarters[1], 4, at.lane);
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& top = row_top[half][h];
        top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
        top = safe(fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2)));
      }
    t.sync();
    if (at.thread < kBlockN) {
      const auto& warp = t.scratch.sums[0];
      const int j = at.thread;
      t.scratch.col[kTop][j] = safe(fmaxf(fmaxf(warp[0][j], warp[1][j]), fmaxf(warp[2][j], warp[3][j])));
    }
    t.sync();
    // Compute the logits again, because registers cannot hold them beside the accumulators
#pragma unroll
    for (int half = 0; half < kHalves; ++half) forget(scaled[half][0]), forget(scaled[half][1]);
    forget(mask.diagonal), forget(mask.rows), forget(mask.cols);
#pragma unroll
    for (int k = 0; k < kQuarter; ++k) {
      float quarters[2];
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        float halves[2];
#pragma unroll
        for (int middle = 0; middle < 2; ++middle) {
          float sum[2] = {};
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const int c = column(k, low, middle, upper) / 2, e = k % 2;
            const float2 factors = t.cols(kFactor, c), tops = t.cols(kTop, c);
            const float top = e ? tops.y : tops.x;
#pragma unroll
            for (int half = 0; half < kHalves; ++half)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                float low2;
                const float z2 = logit(half, h, c, e, e ? factors.y : factors.x, &low2);
                row_sum[half][h] += exp2_fast(z2 - row_top[half][h] + low2);
                sum[upper] += exp2_fast(z2 - top + low2);
              }
          }
          halves[middle] = exchange(sum[0], sum[1], 16, at.lane);
        }
        quarters[low] = exchange(halves[0], halves[1], 8, at.lane);
      }
      t.scratch.sums[1][at.warp][place(k)] = exchange(quarters[0], quarters[1], 4, at.lane);
    }
    // Of the four lanes that share rows, lane q ends with the row of half = q / 2 and h = q % 2
    const int half = at.lane >> 1 & 1, h = at.lane & 1;
    const float top = half ? (h ? row_top[1][1] : row_top[1][0]) : (h ? row_top[0][1] : row_top[0][0]);
    const float sum = exchange(exchange(row_sum[0][0], row_sum[1][0], 2, at.lane),
                               exchange(row_sum[0][1], row_sum[1][1], 2, at.lane), 1, at.lane);
    const int64_t i = tile.i0 + 64 * half + 8 * h + at.row, j = tile.j0 + at.thread;
    if (i < p.M)
      __stcg(static_cast<double*>(loss.side[0].part) + tile.n * static_cast<int64_t>(p.M) + i,
             static_cast<double>(top) + log2f(sum));
    t.sync();
    if (tile.m >= p.tiles_m) return;  // second tile of a cluster, tiles_m is odd: uniform in the warpgroup
    if (at.thread < kBlockN && j < p.N) {
      const auto& warp = t.scratch.sums[1];
      const int k = at.thread;
      __stcg(
          static_cast<double*>(loss.side[1].part) + tile.m * static_cast<int64_t>(p.N) + j,
          t.scratch.col[kTop][k] + static_cast<double>(log2f((warp[0][k] + warp[1][k]) + (warp[2][k] + warp[3][k]))));
    }
    // A block of indices is complete when all tiles of its columns have been stored and, if its rows are in this panel,
    // all tiles of its rows
    const int first_block = loss.i0 / kIndices;
    double* scratch = reinterpret_cast<double*>(&t.scratch.sums[0][0][0]);
    auto* flag = reinterpret_cast<unsigned*>(scratch);
#pragma unroll 1
    for (int s = 0; s < 2; ++s) {
      const int block = s == 0 ? first_block + tile.m : tile.n / kShare, inside = block - first_block;
      const int count =
          p.tiles_m * min(kShare, p.tiles_n - kShare * block) + (inside >= 0 && inside < p.tiles_m ? p.tiles_n : 0);
      const int barrier = t.barrier;
      if (is_last(loss.tickets + 2 + block, count, at.thread, flag, [barrier] { named_sync(barrier, 128); }))
        reduce(loss, block, at.thread, barrier, scratch);
    }
  }
};

}  // namespace

int start_repair(const fastclip_cuda_block& block, const Loss& loss) {
  Params p = {};
  Maps maps;
  p.row.factor = loss.side[0].factor + loss.i0, p.col.factor = loss.side[1].factor, p.loss = loss;
  if (const int error = prepare(&block, &p, &maps, nullptr, 0)) return error;
  p.loss.tiles_m = p.tiles_m, p.loss.tiles_n = p.tiles_n;
  return block.dtype == FASTCLIP_FP16 ? launch_op<Repair<true>>(block, maps, p)
                                      : launch_op<Repair<false>>(block, maps, p);
}

}  // namespace fastclip
