// The parameters that the kernels of a loss of pairs share: the plain case (loss*.cu) and the sigmoid loss
// (sigmoid*.cu). There are N images I and N texts T of D features and no labels. Pair k is the positive of row k and of
// column k. "Own" in a name (own, own_scale) refers to these diagonal pairs.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "loss_plan.h"

namespace fastclip {

struct LossSide {
  const void* x;  // (N, D) features of the caller, rows `x_stride` elements apart
  void* rows;     // (N, width) rows as the products read them: x, or a copy
  int64_t x_stride, rows_stride;
  float *inv, *factor, *lse2;  // see loss_plan.h
  double* weight;
  double* sums;      // forward
  void* part;        // forward
  const float* raw;  // finish: (N, width) sum_j gain G_kj r_k c_j other_j; for images only the rows of the chunk
  void* out;         // (N, D) gradient, NULL if not needed
  int64_t count;     // sigmoid backward: elements of out and of x, the gradient for an upstream gradient of 1
};

struct Loss {
  LossSide side[2];
  const float* scale;
  float* constants;
  double *own, *own_scale;
  // forward
  double *cosine, *record;
  float* top;  // largest norms, from which the tiles compute a constant; else NULL
  float* loss;
  unsigned* tickets;  // atomic counters of what is done: [0] reduction, [1] a repair's blocks, [2...] tiles per block
  // backward
  const float* upstream;
  float *tile_part, *d_scale;
  double* block_part;
  int64_t tile_parts;
  // sigmoid
  const float* bias;
  double divisor;
  double* part;  // (3, parts): loss, gain d_scale, d_bias of every tile; then loss, d_scale, d_bias of the diagonal
  double* wide_loss;            // fp64 output in place of `loss`
  int64_t parts, tiles;         // `tiles`: number of tiles in all chunks
  int loss_alone;               // no gradients: the tiles store partial sums of the loss only
  float* d_scalars;             // gradients with respect to scale and bias
  const float* kept_scalar[2];  // backward: these gradients for upstream 1
  float* d_scalar[2];           // backward: these gradients times upstream, each NULL if not needed
  // both
  double side_weight[2];  // weight of each direction in the loss, divided by N
  int N, D, width;        // width: D rounded up to a multiple of 8; columns beyond D are 0
  int normalize, copies[2];
  int scaled;    // copies are multiplied by a power of two that brings their norm into (1/2, 1]
  int vectors;   // x is aligned for reads of 16 bytes
  int i0, rows;  // the panel of logits, or the chunk of weights
  int tiles_m, tiles_n;
  int first, last;  // 1 for the first and the last panel or chunk
  int j0;           // first column of a block of a chunk
};

}  // namespace fastclip
