// A loss of pairs, between its kernels and what launches them: the plain case (loss*.cu) and the sigmoid loss
// (sigmoid*.cu). N images I, N texts T of D features, no labels; pair k is the positive of row k and of column k.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "loss_plan.h"

namespace fastclip {

struct LossSide {
  const void* x;  // (N, D) as handed in, `x_stride` elements apart
  void* rows;     // (N, width) as the products read them: x, or a copy
  int64_t x_stride, rows_stride;
  float *inv, *factor, *lse2;  // see loss_plan.h
  double* weight;
  double* sums;      // forward
  void* part;        // forward
  const float* raw;  // of the finish: (N, width) sum_j gain G_kj r_k c_j other_j; of images only the chunk's rows
  void* out;         // (N, D), NULL when not wanted
  int64_t count;     // sigmoid, backward: elements of x, a gradient for upstream 1, and of out
};

struct Loss {
  LossSide side[2];
  const float* scale;
  float* constants;
  double *own, *own_scale;
  // forward
  double *cosine, *record;
  float* top;  // NULL unless the tiles find a constant from the largest norms
  float* loss;
  unsigned* tickets;  // [0] reduction, [1] blocks of a repair, [2...] tiles of every block
  // backward
  const float* upstream;
  float *tile_part, *d_scale;
  double* block_part;
  int64_t tile_parts;
  // sigmoid
  const float* bias;
  double divisor;
  double* part;       // (3, parts): loss, gain d_scale, d_bias of every tile; then loss, d_scale, d_bias of own pairs
  double* wide_loss;  // in place of `loss`
  int64_t parts, tiles;         // `tiles`: of all chunks
  int loss_alone;               // without gradients, whose shares the tiles leave out then
  float* d_scalars;             // by scale and bias
  const float* kept_scalar[2];  // backward: these for upstream 1
  float* d_scalar[2];           // and times upstream, each NULL when not wanted
  // both
  double side_weight[2];  // of a direction in the loss
  int N, D, width;        // width: D to the next multiple of 8, 0 beyond D
  int normalize, copies[2];
  int scaled;    // copies are brought to a norm in (1/2, 1] by a power of two
  int vectors;   // 16 bytes of x can be read at once
  int i0, rows;  // the panel of logits, or chunk of weights
  int tiles_m, tiles_n;
  int first, last;  // of the panels or chunks
  int j0;           // first column of a block of a chunk
};

}  // namespace fastclip
