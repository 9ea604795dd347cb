// Weights gain r_i G_ij c_j of a block of the plain case, for an upstream gradient of 1.
//
//   Math      G = E (a_i + b_j) with E = 2^(z2 - c2), a_i = d_i 2^(c2 - lse2_i) and b_j = d_j 2^(c2 - lse2_j)
//             z2 = log2(e) z, and c2 = log2(e) c is the constant FASTCLIP_OFFSET2, see tile.cuh
//             G = d_i 2^(z2 - lse2_i) + d_j 2^(z2 - lse2_j) if the device requested a repair
//             G = 0 on the diagonal, because the finish adds those positives in fp32
//   Program   see tile.cuh, all tiles of a launch use the same one of the two formulas
//   Traffic   writes 2 bytes per pair
//   Precision vectors rounded from fp64 with the gain, weights rounded once to the dtype of the features
//             d_scale is summed before that rounding
//   Ragged    masked, like the diagonal
//   Order     see tile.cuh
#include "launch.cuh"
#include "loss_kernels.h"
#include "store.cuh"

namespace fastclip {
namespace {

template <bool kHalf_, int kBlockN_, bool>
struct Weigh {
  static constexpr bool kHalf = kHalf_, kLabels = false, kStores = true, kSkipsRepairs = false, kRetries = false;
  static constexpr Exact kExact = Exact::on_repair;
  static constexpr int kFinds = kFindsNothing;
  static constexpr int kBlockN = kBlockN_, kStages = 4, kSums = 1, kSumsN = 1;
  enum { kFactor, kWeight, kLse2, kScaled, kRest, kRowVectors, kColVectors = kScaled };

  template <class Vectors>
  static __device__ __forceinline__ void load(const Params& p, const LossSide& side, int64_t k, bool some,
                                              Vectors& vectors, int slot) {
    const double gain = __ldg(p.constants + FASTCLIP_GAIN);
    vectors[kFactor][slot] = some ? side.factor[k] : 0.f;
    vectors[kWeight][slot] = some ? static_cast<float>(side.weight[k] * gain) : 0.f;
    if (repairs(p)) vectors[kLse2][slot] = some ? side.lse2[k] : 0.f;
  }

  static __device__ __forceinline__ void load_row(const Params& p, int i, Scratch<Weigh>& s, int k) {
    const LossSide& side = p.loss.side[0];
    if (i == 0) *p.loss.tickets = 0;  // for the finish
    load(p, side, static_cast<int64_t>(p.loss.i0) + i, i < p.M, s.row, k);
    const float factor = i < p.M ? side.factor[static_cast<int64_t>(p.loss.i0) + i] : 0.f;
    s.row[kScaled][k] = scaled2(factor, p.constants);
    if (repairs(p)) s.row[kRest][k] = rest2(factor, p.constants);
  }

  static __device__ __forceinline__ void load_col(const Params& p, int j, Scratch<Weigh>& s, int k) {
    load(p, p.loss.side[1], j, j < p.N, s.col, k);
  }

  // d 2^x, and 0 for d = 0: an empty set has an arbitrary log-sum-exp, so 2^x may be infinite, and 0 * inf is NaN.
  static __device__ __forceinline__ float share(float d, float x) { return d == 0.f ? 0.f : d * exp2_fast(x); }

  template <bool kMask, bool kExact>
  static __device__ __forceinline__ void weigh(const float (&acc)[kHalves][kBlockN / 2], const Epilogue<Weigh>& t) {
    const float offset2 = __ldg(t.p.constants + FASTCLIP_OFFSET2);
    const Mask mask = t.mask();
    float d_scale = 0.f;
    const auto pair = [&](const RowValues<Weigh>& row, int half, int h, int c, float (&weights)[2]) {
      const float2 col_factors = t.cols(kFactor, c), cols = t.cols(kWeight, c);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float col_factor = e ? col_factors.y : col_factors.x;
        const float dot = acc[half][4 * c + 2 * h + e] * col_factor;
        float g;
        if (kExact) load_later();  // without this, registers spill
        if constexpr (kExact) {
          const float2 lse2 = t.cols(kLse2, c);
          const bool drop = mask.outside(half, h, c, e) || mask.own(half, h, c, e);
          float low;
          const float z2 = exact_logit2(dot, row[kScaled], t.row(kRest, half, h), drop, &low);
          g = share(row[kWeight], z2 - t.row(kLse2, half, h) + low) +
              share(e ? cols.y : cols.x, z2 - (e ? lse2.y : lse2.x) + low);
        } else {
          g = exp2_fast(fmaf(dot, row[kScaled], -offset2));
          g *= row[kWeight] + (e ? cols.y : cols.x);
          if (kMask && (mask.outside(half, h, c, e) || mask.own(half, h, c, e))) g = 0.f;  // even if it is infinite
        }
        g *= row[kFactor];
        d_scale = fmaf(g, dot, d_scale);
        weights[e] = g * col_factor;
      }
    };
    store_weights(t, pair);
    end_tile(t, d_scale);
  }

  template <bool kMask>
  static __device__ __forceinline__ void finish(const float (&acc)[kHalves][kBlockN / 2], const Epilogue<Weigh>& t) {
    weigh<kMask, false>(acc, t);
  }

  static __device__ __forceinline__ void finish_exact(const float (&acc)[kHalves][kBlockN / 2],
                                                      const Epilogue<Weigh>& t) {
    weigh<true, true>(acc, t);
  }
};

}  // namespace

int start_weights(const fastclip_cuda_block& block, const Loss& loss, void* weights, int64_t stride) {
  Params p = {};
  p.loss = loss, p.scale_part = loss.tile_part, p.parts_n = loss.tiles_n;
  LossSide& text = p.loss.side[1];
  text.factor += loss.j0, text.weight += loss.j0, text.lse2 += loss.j0;
  return launch<Weigh, FASTCLIP_CUDA_TILE_N, false>(&block, p, weights, stride);
}

}  // namespace fastclip
