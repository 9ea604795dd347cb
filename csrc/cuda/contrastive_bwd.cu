// Weights gain r_i G_ij c_j of a block, stored for the products with the features. The logits are never stored.
//
//   Math      z2_ij = log2(e) s r_i c_j <image_i, text_j> and E = 2^(z2 - c2), one exponential per logit
//             c2 = log2(e) c is the constant FASTCLIP_OFFSET2, see tile.cuh
//             G = E (a_i + b_j) at negatives, a_i = d_i 2^(c2 - lse2_i) and b_j = d_j 2^(c2 - lse2_j)
//             G = E (a'_i + b'_j) + own_i + own_j at positives with labels, a' and b' from the positives' log-sum-exps
//             the vectors `neg`, `pos` and `own` hold a and b, a' and b', and own, times the gain
//             G = 0 on the diagonal without labels, because the finish adds those positives in fp32
//   Program   see tile.cuh
//   Traffic   writes 2 M N bytes
//   Precision fp32, weights rounded once to the dtype of the features, d_scale summed before that rounding
//   Ragged    vectors are 0 outside, and so are the weights
//   Order     every tile stores its own partial sum of d_scale
#include "launch.cuh"
#include "store.cuh"

namespace fastclip {
namespace {

template <bool kHalf_, int kBlockN_, bool kLabels_>
struct Weights {
  static constexpr bool kHalf = kHalf_, kLabels = kLabels_, kStores = true, kSkipsRepairs = true, kRetries = false;
  static constexpr Exact kExact = Exact::never;
  static constexpr int kFinds = kFindsNothing;
  static constexpr int kBlockN = kBlockN_, kStages = 4, kSums = 1, kSumsN = 1;
  enum { kFactor, kNeg, kLabel, kPos, kOwn, kScaled };
  static constexpr int kRowVectors = kScaled + 1, kColVectors = kLabels ? kScaled : kLabel;

  // Vectors are 0 outside the block, so weights and partial sums of d_scale are 0 there without a mask. If a
  // derivative on the other side is infinite, they are NaN (0 * inf), as are weights whose exponential flushes to 0.
  template <class Vectors>
  static __device__ __forceinline__ void load(const Side& side, int k, bool some, Vectors& vectors, int slot) {
    vectors[kFactor][slot] = some ? side.factor[k] : 0.f;
    vectors[kNeg][slot] = some ? side.neg[k] : 0.f;
    if constexpr (kLabels) {
      vectors[kLabel][slot] = some ? as_float(side.label[k]) : 0.f;
      vectors[kPos][slot] = some ? side.pos[k] : 0.f;
      vectors[kOwn][slot] = some ? side.own[k] : 0.f;
    }
  }

  static __device__ __forceinline__ void load_row(const Params& p, int i, Scratch<Weights>& s, int k) {
    load(p.row, i, i < p.M, s.row, k);
    s.row[kScaled][k] = i < p.M ? scaled2(p.row.factor[i], p.constants) : 0.f;
  }

  static __device__ __forceinline__ void load_col(const Params& p, int j, Scratch<Weights>& s, int k) {
    load(p.col, j, j < p.N, s.col, k);
  }

  template <bool kMask>
  static __device__ __forceinline__ void finish(const float (&acc)[kHalves][kBlockN / 2], const Epilogue<Weights>& t) {
    const float offset2 = __ldg(t.p.constants + FASTCLIP_OFFSET2);
    // One mask per half: if the halves shared one, the compiler would keep its comparisons, and registers would spill
    Mask masks[kHalves] = {t.mask(), t.mask()};
    masks[1].diagonal += 64, forget(masks[1].diagonal);
    float d_scale = 0.f;
    const auto weigh = [&](const RowValues<Weights>& row, int half, int h, int c, float (&weights)[2]) {
      const float2 col_factors = t.cols(kFactor, c), col_negs = t.cols(kNeg, c);
      float2 labels = {}, col_pos = {}, col_own = {};
      if constexpr (kLabels) {
        labels = t.cols(kLabel, c), col_pos = t.cols(kPos, c), col_own = t.cols(kOwn, c);
        // Load once for both rows: the compiler would otherwise load again in the branch of each row
        forget(col_own.x), forget(col_own.y);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float col_factor = e ? col_factors.y : col_factors.x;
        const float dot = acc[half][4 * c + 2 * h + e] * col_factor;
        float g = exp2_fast(fmaf(dot, row[kScaled], -offset2)), weight = row[kNeg] + (e ? col_negs.y : col_negs.x);
        if constexpr (kLabels) {
          const bool same = as_int(row[kLabel]) == as_int(e ? labels.y : labels.x);
          weight = same ? row[kPos] + (e ? col_pos.y : col_pos.x) : weight;
          g = fmaf(g, weight, same ? row[kOwn] + (e ? col_own.y : col_own.x) : 0.f);
        } else {
          g *= weight;
        }
        if (kMask && masks[half].own(0, h, c, e)) g = 0.f;  // even if it is infinite
        g *= row[kFactor];
        d_scale = fmaf(g, dot, d_scale);
        weights[e] = g * col_factor;
      }
    };
    store_weights(t, weigh);
    end_tile(t, d_scale);
  }
};

}  // namespace
}  // namespace fastclip

extern "C" int fastclip_cuda_contrastive_bwd(const fastclip_cuda_block* block, const fastclip_cuda_bwd_side* image,
                                             const fastclip_cuda_bwd_side* text, void* weights,
                                             int64_t weights_row_stride, float* scale_part) {
  using namespace fastclip;
  if (!image || !text || !image->factor || !text->factor || !image->neg || !text->neg || !scale_part ||
      !image->label != !text->label)
    return FASTCLIP_INVALID_ARGUMENT;
  if (image->label && (!image->pos || !text->pos || !image->own || !text->own)) return FASTCLIP_INVALID_ARGUMENT;
  Params p = {};
  p.row = {image->factor, image->neg, image->pos, image->own, image->label, nullptr};
  p.col = {text->factor, text->neg, text->pos, text->own, text->label, nullptr};
  p.scale_part = scale_part;
  return image->label ? launch<Weights, FASTCLIP_CUDA_TILE_N, true>(block, p, weights, weights_row_stride)
                      : launch<Weights, FASTCLIP_CUDA_TILE_N, false>(block, p, weights, weights_row_stride);
}
