// The plain case of the loss, between its kernels (loss_*.cu) and what launches them (loss.cu): N images I, N texts T
// of D features, no labels; pair k is the positive of row k and of column k.
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
  const float* raw;  // backward: (N, width) sum_j gain G_kj r_k c_j other_j; of images only the chunk's rows
  void* out;         // backward: (N, D), NULL when not wanted
};

struct Loss {
  LossSide side[2];
  const float* scale;
  float* constants;
  double *own, *own_scale;
  // forward
  double *cosine, *record;
  float *top, *loss;
  unsigned* tickets;  // [0] reduction, [1] blocks of a repair, [2...] tiles of every block
  // backward
  const float* upstream;
  float *tile_part, *d_scale;
  double* block_part;
  int64_t tile_parts;
  double side_weight[2];  // of a direction in the loss
  int N, D, width;        // width: D to the next multiple of 8, 0 beyond D
  int normalize, copies[2];
  int scaled;    // copies are brought to a norm in (1/2, 1] by a power of two
  int vectors;   // 16 bytes of x can be read at once
  int i0, rows;  // the panel of logits, or chunk of weights
  int tiles_m, tiles_n;
  int first, last;  // of the panels or chunks
};

}  // namespace fastclip
