// Losses of a block of pairs and the weights gain r_i G_ij c_j of their gradients; the logits are never stored.
//
//   Math      x = z + b, t = exp(-abs(x)): loss max(x, 0) + log1p(t), G = sigmoid(x) = (x >= 0 ? 1 : t) / (1 + t);
//             own pairs 0: they are added from their fp64 logits, and in the finish
//   Traffic   writes 2 M N bytes, nothing without gradients
//   Precision fp32, weights rounded once to the features' dtype
#include "launch.cuh"
#include "loss_kernels.h"

namespace fastclip {
namespace {

// log(1 + t) for t in [0, 1] as t P(t), relative error 2e-7: log would lose all digits of a solved pair.
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

template <bool kHalf_, int kBlockN_, bool kGradients>
struct Sigmoid {
  static constexpr bool kHalf = kHalf_, kLabels = false, kStores = kGradients, kSkipsRepairs = false;
  static constexpr Exact kExact = Exact::never;
  static constexpr int kFinds = kHalf && kGradients ? FASTCLIP_GAIN : kFindsNothing;
  static constexpr int kBlockN = kBlockN_, kStages = 4, kSums = 3, kSumsN = 1;
  enum { kFactor, kWeight, kRowVectors };  // of the logit and of the gradient
  static constexpr int kColVectors = 1;

  static __device__ __forceinline__ float find(const Params& p, float bound) { return gain_of(bound, __ldg(p.bias)); }

  static __device__ __forceinline__ void load_row(const Params& p, int i, Scratch<Sigmoid>& s, int k) {
    const float factor = i < p.M ? p.row.factor[i] : 0.f;
    s.row[kFactor][k] = static_cast<float>(static_cast<double>(factor) * __ldg(p.constants + FASTCLIP_SCALE));
    s.row[kWeight][k] = factor * (kFinds == FASTCLIP_GAIN ? s.found : __ldg(p.constants + FASTCLIP_GAIN));
  }

  static __device__ __forceinline__ void load_col(const Params& p, int j, Scratch<Sigmoid>& s, int k) {
    s.col[kFactor][k] = j < p.N ? p.col.factor[j] : 0.f;
  }

  template <bool kMask>
  static __device__ __forceinline__ void finish(const float (&acc)[kHalves][kBlockN / 2], const Epilogue<Sigmoid>& t) {
    const float bias = __ldg(t.p.bias);
    const Mask mask = t.mask();
    float loss = 0.f, d_scale = 0.f, d_bias = 0.f;
    const auto weigh = [&](int half, int h, int c, float (&weights)[2]) {
      const float2 col_factors = t.cols(kFactor, c);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float col_factor = e ? col_factors.y : col_factors.x;
        const float dot = acc[half][4 * c + 2 * h + e] * col_factor;
        const float x = fmaf(dot, t.row(kFactor, half, h), bias), small = exp2_fast(-fabsf(x) * kLog2e);
        const bool drop = kMask && (mask.outside(half, h, c, e) || mask.own(half, h, c, e));
        const float value = (x > 0 ? x : 0.f) + log1p_of_small(small);
        loss += drop ? 0.f : value;
        if constexpr (kGradients) {
          float g = drop ? 0.f : (x >= 0 ? 1.f : small) * inverse_fast(1.f + small);
          d_bias += g;
          g *= t.row(kWeight, half, h);
          d_scale = fmaf(g, dot, d_scale);
          weights[e] = g * col_factor;
        }
      }
    };
    const auto publish = [&] {
      publish_sum(t, 0, loss);
      if constexpr (kGradients) publish_sum(t, 1, d_scale), publish_sum(t, 2, d_bias);
    };
    if constexpr (kGradients) {
      store_weights(t, weigh, publish);
    } else {
#pragma unroll
      for (int c = 0; c < kBlockN / 8; ++c)  // outside: the other way round it spills
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float weights[2];
            weigh(half, h, c, weights);
          }
      publish();
      t.sync();
    }
    if (t.at.thread == 0 && t.tile.m < t.p.tiles_m) {
      double* part = t.p.part + t.index();
      for (int k = 0; k < (kGradients ? 3 : 1); ++k) part[k * t.p.part_row_stride] = published_sum(t, k);
    }
  }
};

}  // namespace

int start_pairs(const fastclip_cuda_block& block, const Loss& loss, void* weights, int64_t stride) {
  Params p = {};
  const int64_t before = loss.i0 / FASTCLIP_CUDA_TILE_M * static_cast<int64_t>(loss.tiles_n);
  p.row.factor = loss.side[0].factor + loss.i0, p.col.factor = loss.side[1].factor, p.bias = loss.bias;
  p.part = loss.part + before, p.part_row_stride = loss.parts, p.loss = loss;
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
