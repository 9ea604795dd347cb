#include "loss_problem.h"

namespace fastclip {
namespace {

bool lies_well(const void* x, int64_t row_stride, int64_t width) {
  return x && reinterpret_cast<uintptr_t>(x) % 16 == 0 && row_stride % 8 == 0 && row_stride >= width;
}

}  // namespace

int read_problem(const fastclip_cuda_loss* c, Loss* p) {
  if (!c || !c->image || !c->text || !c->scale) return FASTCLIP_INVALID_ARGUMENT;
  if (c->N < 1 || c->D < 1 || c->N > kLargest || c->D > kLargest || c->processors < 2 || c->workspace < 0)
    return FASTCLIP_INVALID_ARGUMENT;
  if (c->dtype != FASTCLIP_BF16 && c->dtype != FASTCLIP_FP16) return FASTCLIP_INVALID_ARGUMENT;
  *p = {};
  p->N = static_cast<int>(c->N), p->D = static_cast<int>(c->D), p->width = (p->D + 7) / 8 * 8;
  p->normalize = c->normalize != 0, p->scaled = c->dtype == FASTCLIP_FP16 && p->normalize;
  p->scale = c->scale;
  const void* x[2] = {c->image, c->text};
  void* rows[2] = {c->image_rows, c->text_rows};
  const int64_t strides[2][2] = {{c->image_row_stride, c->image_rows_stride},
                                 {c->text_row_stride, c->text_rows_stride}};
  p->vectors = p->D % 8 == 0;
  for (int k = 0; k < 2; ++k) {
    LossSide& side = p->side[k];
    side.x = x[k], side.rows = rows[k], side.x_stride = strides[k][0], side.rows_stride = strides[k][1];
    p->copies[k] = rows[k] != x[k];
    if (!lies_well(rows[k], strides[k][1], p->width) || (!p->copies[k] && (p->scaled || p->D % 8 != 0)))
      return FASTCLIP_INVALID_ARGUMENT;
    p->vectors = p->vectors && reinterpret_cast<uintptr_t>(x[k]) % 16 == 0 && strides[k][0] % 8 == 0;
  }
  return FASTCLIP_OK;
}

fastclip_cuda_block block_of(const fastclip_cuda_loss& c, Loss* p, int64_t i0, int64_t rows, int tile_n) {
  p->i0 = static_cast<int>(i0), p->rows = static_cast<int>(i0 + rows < c.N ? rows : c.N - i0);
  p->tiles_m = (p->rows + FASTCLIP_CUDA_TILE_M - 1) / FASTCLIP_CUDA_TILE_M;
  p->tiles_n = (p->N + tile_n - 1) / tile_n;
  p->first = i0 == 0, p->last = i0 + p->rows == c.N;
  fastclip_cuda_block block = {};
  block.image = static_cast<const uint16_t*>(p->side[0].rows) + i0 * p->side[0].rows_stride;
  block.text = p->side[1].rows;
  block.image_row_stride = p->side[0].rows_stride, block.text_row_stride = p->side[1].rows_stride;
  block.M = p->rows, block.N = c.N, block.D = p->width, block.offset = i0;
  block.dtype = c.dtype, block.tile_n = tile_n, block.processors = c.processors;
  block.constants = p->constants, block.stream = c.stream;
  return block;
}

int cut_columns(const LossBackward& b, int64_t column, Loss* p, fastclip_cuda_block* block) {
  if (column < 0 || column >= p->N || column % b.columns != 0) return FASTCLIP_INVALID_ARGUMENT;
  p->j0 = static_cast<int>(column);
  block->text = static_cast<const uint16_t*>(p->side[1].rows) + column * p->side[1].rows_stride;
  block->N = column + b.columns < p->N ? b.columns : p->N - column;
  block->offset = p->i0 - column;
  return FASTCLIP_OK;
}

}  // namespace fastclip
