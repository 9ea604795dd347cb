// Partial sums of exponentials along the rows and columns of every tile. The logits are never stored.
//
//   Math      z2_ij = log2(e) s r_i c_j <image_i, text_j> and E = 2^(z2 - c2), one exponential per logit
//             c2 = log2(e) c is the constant FASTCLIP_OFFSET2, see tile.cuh
//             row and column sums of E over the negatives, with labels also of E and of z2 over the positives
//   Program   see tile.cuh
//   Traffic   writes 4 * planes * (M tiles_n + N tiles_m) bytes
//   Precision fp32
//   Ragged    see tile.cuh
//   Order     every tile stores its own partial sums, see tile.cuh
#include "launch.cuh"
#include "loss_kernels.h"

namespace fastclip {
namespace {

template <bool kHalf_, int kBlockN_, bool kLabels_>
struct Statistics {
  static constexpr bool kHalf = kHalf_, kLabels = kLabels_, kStores = false, kSkipsRepairs = false, kRetries = false;
  static constexpr Exact kExact = Exact::never;
  static constexpr int kFinds = FASTCLIP_OFFSET2;
  static constexpr int kBlockN = kBlockN_, kStages = 5;
  static constexpr int kPlanes = kLabels ? 3 : 1, kSums = kPlanes, kSumsN = kBlockN;
  enum { kFactor, kLabel, kVectors };
  static constexpr int kRowVectors = kLabels ? kVectors : kLabel, kColVectors = kRowVectors;

  static __device__ __forceinline__ float find(const Params&, float bound) { return offset2_of(bound); }

  static __device__ __forceinline__ void load_row(const Params& p, int i, Scratch<Statistics>& s, int k) {
    s.row[kFactor][k] = i < p.M ? scaled2(p.row.factor[i], p.constants) : 0.f;
    if constexpr (kLabels) s.row[kLabel][k] = i < p.M ? as_float(p.row.label[i]) : 0.f;
  }

  static __device__ __forceinline__ void load_col(const Params& p, int j, Scratch<Statistics>& s, int k) {
    s.col[kFactor][k] = j < p.N ? p.col.factor[j] : 0.f;
    if constexpr (kLabels) s.col[kLabel][k] = j < p.N ? as_float(p.col.label[j]) : 0.f;
  }

  template <bool kMask>
  static __device__ __forceinline__ void finish(const float (&acc)[kHalves][kBlockN / 2],
                                                const Epilogue<Statistics>& t) {
    const Params& p = t.p;
    const Tile& tile = t.tile;
    const Place& at = t.at;
    const float offset2 = t.scratch.found;
    const Mask mask = t.mask();
    float factor[kHalves][2], row_sum[kPlanes][kHalves][2] = {};
    int32_t label[kHalves][2] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        factor[half][h] = t.row(kFactor, half, h);
        if constexpr (kLabels) label[half][h] = as_int(t.row(kLabel, half, h));
      }
    // A column is summed over this thread's rows, then over the eight lanes of the warp that share the column, then
    // over the four warps. `exchange` (tile.cuh) takes two columns at a time. The loops visit such columns together, so
    // that their registers are free again early: with labels, summing column by column would spill.
    float sums[kPlanes][kBlockN / 32];
#pragma unroll
    for (int k = 0; k < kBlockN / 32; ++k) {
      float quarters[kPlanes][2];
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        float halves[kPlanes][2];
#pragma unroll
        for (int middle = 0; middle < 2; ++middle) {
          float column[kPlanes][2] = {};
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const int c = (k + kBlockN / 32 * low + kBlockN / 16 * middle + kBlockN / 8 * upper) / 2, e = k % 2;
            const float2 col_factors = t.cols(kFactor, c);
            const float col_factor = e ? col_factors.y : col_factors.x;
            int32_t col_label = 0;
            if constexpr (kLabels) {
              const float2 labels = t.cols(kLabel, c);
              col_label = as_int(e ? labels.y : labels.x);
            }
#pragma unroll
            for (int half = 0; half < kHalves; ++half)
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const float dot = acc[half][4 * c + 2 * h + e] * col_factor;
                float value[kPlanes];
                value[0] = exp2_fast(fmaf(dot, factor[half][h], -offset2));
                if constexpr (kLabels) {
                  // A term that flushed to 0 would look like an empty set. NaN stays.
                  value[0] = value[0] < kSmallest ? kSmallest : value[0];
                  const bool drop = kMask && (mask.own(half, h, c, e) || mask.outside(half, h, c, e));
                  const bool same = label[half][h] == col_label;
                  value[1] = same && !drop ? value[0] : 0.f;
                  value[2] = same && !drop ? dot * factor[half][h] : 0.f;
                  value[0] = same || drop ? 0.f : value[0];
                } else if constexpr (kMask) {
                  value[0] = mask.own(half, h, c, e) || mask.outside(half, h, c, e) ? 0.f : value[0];
                }
#pragma unroll
                for (int plane = 0; plane < kPlanes; ++plane) {
                  row_sum[plane][half][h] += value[plane];
                  column[plane][upper] += value[plane];
                }
              }
          }
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane)
            halves[plane][middle] = exchange(column[plane][0], column[plane][1], 16, at.lane);
        }
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
          quarters[plane][low] = exchange(halves[plane][0], halves[plane][1], 8, at.lane);
      }
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane)
        sums[plane][k] = exchange(quarters[plane][0], quarters[plane][1], 4, at.lane);
    }
    const int first =
        kBlockN / 8 * (at.lane >> 4 & 1) + kBlockN / 16 * (at.lane >> 3 & 1) + kBlockN / 32 * (at.lane >> 2 & 1);
    // Rows: the four lanes that share rows have four partial sums each, for each half and h of Place. Two exchanges
    // leave one total in each lane: lane q of the four has that of half = q / 2 and h = q % 2.
    const int64_t i = tile.i0 + 64 * (at.lane >> 1 & 1) + 8 * (at.lane & 1) + at.row;
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
#pragma unroll
      for (int k = 0; k < kBlockN / 32; k += 2)
        *reinterpret_cast<float2*>(&t.scratch.sums[plane][at.warp][4 * (first + k) + at.col]) =
            make_float2(sums[plane][k], sums[plane][k + 1]);
      const float row = exchange(exchange(row_sum[plane][0][0], row_sum[plane][1][0], 2, at.lane),
                                 exchange(row_sum[plane][0][1], row_sum[plane][1][1], 2, at.lane), 1, at.lane);
      if (i < p.M) p.row.part[(static_cast<int64_t>(plane) * p.tiles_n + tile.n) * p.M + i] = row;
    }
    t.sync();
    if (tile.m < p.tiles_m)
      for (int plane = 0; plane < kPlanes; ++plane)
        for (int j = at.thread; j < min(kBlockN, p.N - tile.j0); j += 128) {
          const auto& warp = t.scratch.sums[plane];
          p.col.part[(static_cast<int64_t>(plane) * p.tiles_m + tile.m) * p.N + tile.j0 + j] =
              (warp[0][j] + warp[1][j]) + (warp[2][j] + warp[3][j]);
        }
  }
};

}  // namespace

int start_statistics(const fastclip_cuda_block& block, const Loss& loss) {
  Params p = {};
  p.row.factor = loss.side[0].factor + loss.i0, p.row.part = static_cast<float*>(loss.side[0].part);
  p.col.factor = loss.side[1].factor, p.col.part = static_cast<float*>(loss.side[1].part);
  p.loss = loss;
  return launch<Statistics, FASTCLIP_CUDA_TILE_N, false>(&block, p);
}

}  // namespace fastclip

extern "C" int fastclip_cuda_contrastive_fwd(const fastclip_cuda_block* block, const fastclip_cuda_fwd_side* image,
                                             const fastclip_cuda_fwd_side* text) {
  using namespace fastclip;
  if (!image || !text || !image->factor || !text->factor || !image->part || !text->part ||
      !image->label != !text->label)
    return FASTCLIP_INVALID_ARGUMENT;
  Params p = {};
  p.row = {image->factor, nullptr, nullptr, nullptr, image->label, image->part};
  p.col = {text->factor, nullptr, nullptr, nullptr, text->label, text->part};
  return image->label ? launch<Statistics, FASTCLIP_CUDA_TILE_N_LABELS, true>(block, p)
                      : launch<Statistics, FASTCLIP_CUDA_TILE_N, false>(block, p);
}
