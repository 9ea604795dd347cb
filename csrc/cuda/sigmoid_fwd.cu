// Losses of a block of pairs, and the weights gain r_i G_ij c_j of their gradients. The logits are never stored.
//
//   Math      e = 2^(log2(e) (z + b)), loss = log(1 + e) and G = e / (1 + e)
//             diagonal pairs contribute 0 here: the norms kernel and the finish add them from fp64 logits
//             32 logits share one logarithm: the sum of their losses is log(1 + q), where 1 + q is the product of
//             their 1 + e
//             two logits share one reciprocal
//             in a warp whose product overflows, and in every tile with a mask, each logit is computed by itself,
//             with t = e^-|z + b|:
//             loss = max(z + b, 0) + log1p(t) and G = (z + b >= 0 ? 1 : t) / (1 + t)
//   Program   see tile.cuh
//   Traffic   writes 2 M N bytes, nothing without gradients
//   Precision fp32, weights rounded once to the dtype of the features
//             q is updated without ever adding 1, because 1 + q would lose the digits of a solved pair's loss
//   Ragged    masked
//   Order     every tile stores its own partial sums
#include "launch.cuh"
#include "loss_kernels.h"
#include "store.cuh"

namespace fastclip {
namespace {

// log(1 + t) for t in [0, 1] as t P(t), relative error 2e-7. For a solved pair 1 + t would round to 1.
__device__ __forceinline__ float log1p_of_small(float t) {
  float p = fmaf(0.00523268431f, t, -0.0295051988f);
  p = fmaf(p, t, 0.0782258883f);
  p = fmaf(p, t, -0.136632398f);
  p = fmaf(p, t, 0.191060036f);
  p = fmaf(p, t, -0.24842982f);
  p = fmaf(p, t, 0.333190978f);
  p = fmaf(p, t, -0.499994934f);
  return t * fmaf(p, t, 0.99999994f);
}

// log(1 + q) for q in [0, 2^100), relative error 3e-7, by 1 + q = 2^k (1 + t).
__device__ __forceinline__ float log1p_of_product(float q) {
  const int exponent = as_int(1.f + q) & 0x7f800000;
  const float scale = as_float(0x7f000000 - exponent), k = static_cast<float>((exponent >> 23) - 127);
  return fmaf(k, static_cast<float>(kLn2), log1p_of_small(fmaf(q, scale, scale - 1.f)));
}

template <bool kHalf_, int kBlockN_, bool kGradients>
struct Sigmoid {
  static constexpr bool kHalf = kHalf_, kLabels = false, kStores = kGradients, kSkipsRepairs = false, kRetries = true;
  static constexpr Exact kExact = Exact::never;
  static constexpr int kFinds = kHalf && kGradients ? FASTCLIP_GAIN : kFindsNothing;
  static constexpr int kBlockN = kBlockN_, kStages = 4, kSums = 3, kSumsN = 1;
  enum { kFactor, kWeight, kRowVectors };      // factors of log2(e) z and of the gradient
  static constexpr float kLargest = 0x1p100f;  // largest product: its reciprocal is not yet subnormal
  static constexpr int kColVectors = 1;

  static __device__ __forceinline__ float find(const Params& p, float bound) { return gain_of(bound, __ldg(p.bias)); }

  static __device__ __forceinline__ void load_row(const Params& p, int i, Scratch<Sigmoid>& s, int k) {
    const float factor = i < p.M ? p.row.factor[i] : 0.f;
    s.row[kFactor][k] = scaled2(factor, p.constants);
    s.row[kWeight][k] = factor * (kFinds == FASTCLIP_GAIN ? s.found : __ldg(p.constants + FASTCLIP_GAIN));
  }

  static __device__ __forceinline__ void load_col(const Params& p, int j, Scratch<Sigmoid>& s, int k) {
    s.col[kFactor][k] = j < p.N ? p.col.factor[j] : 0.f;
  }

  // Returns false if this warp must compute the tile again, with kMask.
  template <bool kMask>
  static __device__ __forceinline__ bool finish(const float (&acc)[kHalves][kBlockN / 2], const Epilogue<Sigmoid>& t) {
    const float bias2 = static_cast<float>(__ldg(t.p.bias) * kLog2e64);
    const Mask mask = t.mask();
    float loss = 0.f, d_scale = 0.f, d_bias = 0.f, product[kHalves][2] = {};  // of each row, minus 1
    bool fits = true;
    const auto pair = [&](const RowValues<Sigmoid>& values, int half, int h, int c, float (&weights)[2]) {
      // A masked tile reads the row's values from shared memory each time: kept in registers they would spill
      const auto row = [&](int vector) { return kMask ? t.row(vector, half, h) : values[vector]; };
      const float2 factors = t.cols(kFactor, c);
      const float dot[2] = {acc[half][4 * c + 2 * h] * factors.x, acc[half][4 * c + 2 * h + 1] * factors.y};
      const float x2[2] = {fmaf(dot[0], row(kFactor), bias2), fmaf(dot[1], row(kFactor), bias2)};
      float g[2];
      if constexpr (kMask) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const bool drop = mask.outside(half, h, c, k) || mask.own(half, h, c, k);
          const float small = exp2_fast(-fabsf(x2[k]));
          const float value = fmaf(fmaxf(x2[k], 0.f), static_cast<float>(kLn2), log1p_of_small(small));
          loss += drop ? 0.f : value;
          g[k] = drop ? 0.f : (x2[k] >= 0 ? 1.f : small) * inverse_fast(1.f + small);
          d_bias += g[k], g[k] *= row(kWeight);
        }
      } else {
        const float e[2] = {exp2_fast(x2[0]), exp2_fast(x2[1])};
        const float a = fmaf(e[0], e[1], e[0]), b = fmaf(e[0], e[1], e[1]), q = a + e[1];
        product[half][h] = fmaf(product[half][h], q, q) + product[half][h];
        const float inverse = inverse_fast(1.f + q), weighted = inverse * row(kWeight);
        d_bias = fmaf(a + b, inverse, d_bias);
        g[0] = a * weighted, g[1] = b * weighted;
        if (h == 1 && c % 8 == 7) {
          float (&of_row)[2] = product[half];
          const float both = fmaf(of_row[0], of_row[1], of_row[0]) + of_row[1];
          fits = fits && both < kLargest;
          loss += log1p_of_product(both);
          of_row[0] = of_row[1] = 0.f;
        }
      }
      d_scale = fmaf(g[0], dot[0], d_scale), d_scale = fmaf(g[1], dot[1], d_scale);
      weights[0] = g[0] * factors.x, weights[1] = g[1] * factors.y;
    };
    if constexpr (kGradients) {
      store_weights(t, pair);
    } else {
#pragma unroll
      for (int c = 0; c < kBlockN / 8; ++c)  // outer loop: otherwise registers spill
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float weights[2];
            pair(t.rows(half, h), half, h, c, weights);
          }
    }
    if (!kMask && __any_sync(0xffffffff, !fits)) {
      if (kGradients && t.at.lane == 0) tma_store_wait_all();
      __syncwarp();
      return false;
    }
    publish_sum(t, 0, loss);
    if constexpr (kGradients) publish_sum(t, 1, d_scale), publish_sum(t, 2, d_bias);
    t.sync();
    if (t.at.thread == 0 && t.tile.m < t.p.tiles_m) {
      double* part = t.p.part + t.index();
      for (int k = 0; k < (kGradients ? 3 : 1); ++k) part[k * t.p.part_row_stride] = published_sum(t, k);
    }
    return true;
  }
};

}  // namespace

int start_pairs(const fastclip_cuda_block& block, const Loss& loss, void* weights, int64_t stride) {
  Params p = {};
  p.row.factor = loss.side[0].factor + loss.i0, p.col.factor = loss.side[1].factor + loss.j0, p.bias = loss.bias;
  p.part = loss.part, p.parts_n = loss.tiles_n, p.part_row_stride = loss.parts, p.loss = loss;
  return weights ? launch<Sigmoid, FASTCLIP_CUDA_TILE_N, true>(&block, p, weights, stride)
                 : launch<Sigmoid, FASTCLIP_CUDA_TILE_N, false>(&block, p);
}

}  // namespace fastclip

extern "C" int fastclip_cuda_sigmoid_fwd(const fastclip_cuda_block* block, const float* image_factor,
                                         const float* text_factor, const float* bias, int gradients, void* weights,
                                         int64_t weights_row_stride, double* part, int64_t part_row_stride) {
  using namespace fastclip;
  if (!image_factor || !text_factor || !bias || !part) return FASTCLIP_INVALID_ARGUMENT;
  Params p = {};
  p.row.factor = image_factor, p.col.factor = text_factor, p.bias = bias;
  p.part = part, p.part_row_stride = part_row_stride;
  return gradients ? launch<Sigmoid, FASTCLIP_CUDA_TILE_N, true>(block, p, weights, weights_row_stride)
                   : launch<Sigmoid, FASTCLIP_CUDA_TILE_N, false>(block, p);
}
