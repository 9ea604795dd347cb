// The plain case: what fastclip.h calls fastclip_cuda_loss_*, kernel by kernel.
#include <cuda_runtime.h>

#include "../fastclip.h"
#include "loss_kernels.h"

namespace fastclip {
namespace {

constexpr int64_t kLargest = INT32_MAX - 256;

template <class T>
T* at(const void* base, int64_t bytes) {
  return reinterpret_cast<T*>(static_cast<char*>(const_cast<void*>(base)) + bytes);
}

// Kernels start on the current device: it is the features' while this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (device < 0 || cudaGetDevice(&before_) != cudaSuccess || before_ == device) return;
    moved_ = cudaSetDevice(device) == cudaSuccess;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool moved_ = false;
};

bool lies_well(const void* x, int64_t row_stride, int64_t width) {
  return x && reinterpret_cast<uintptr_t>(x) % 16 == 0 && row_stride % 8 == 0 && row_stride >= width;
}

// Checks a problem and fills in what all its kernels read.
int view(const fastclip_cuda_loss* c, const void* saved, Loss* p) {
  if (!c || !saved || !c->image || !c->text || !c->scale) return FASTCLIP_INVALID_ARGUMENT;
  if (c->N < 1 || c->D < 1 || c->N > kLargest || c->D > kLargest || c->processors < 2 || c->workspace < 0)
    return FASTCLIP_INVALID_ARGUMENT;
  if (c->dtype != FASTCLIP_BF16 && c->dtype != FASTCLIP_FP16) return FASTCLIP_INVALID_ARGUMENT;
  if (!(c->image_weight >= 0 && c->image_weight <= 1)) return FASTCLIP_INVALID_ARGUMENT;
  const LossSaved s = loss_saved(c->N);
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
    side.inv = at<float>(saved, s.inv[k]), side.factor = at<float>(saved, s.factor[k]);
    side.weight = at<double>(saved, s.weight[k]), side.lse2 = at<float>(saved, s.lse2[k]);
  }
  p->side_weight[0] = c->image_weight / p->N, p->side_weight[1] = (1 - c->image_weight) / p->N;
  p->constants = at<float>(saved, s.constants), p->own_scale = at<double>(saved, s.own_scale);
  p->own = at<double>(saved, s.own);
  return FASTCLIP_OK;
}

// Rows i0 to i0 + rows of the logits; the tiles' width is the caller's.
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

int forward(const fastclip_cuda_loss& c, const LossForward& f, Loss* p) {
  const bool half = c.dtype == FASTCLIP_FP16;
  if (const int error = start_norms(*p, half, c.stream)) return error;
  for (int64_t i0 = 0; i0 < c.N; i0 += f.panel) {
    const fastclip_cuda_block block = block_of(c, p, i0, f.panel, f.tile_n);
    if (const int error = start_statistics(block, *p)) return error;
    if (const int error = start_reduce(*p, c.stream)) return error;
  }
  for (int64_t i0 = 0; i0 < c.N; i0 += f.panel) {
    const fastclip_cuda_block block = block_of(c, p, i0, f.panel, kExactColumns);
    if (const int error = start_repair(block, *p)) return error;
  }
  return FASTCLIP_OK;
}

// The chunk's rows, and the backward's workspace behind the weights.
int chunk_of(const fastclip_cuda_loss& c, const void* weights, int64_t chunk, Loss* p, LossBackward* b,
             fastclip_cuda_block* block) {
  *b = loss_backward(c.N, c.D, c.workspace, c.processors);
  if (chunk < 0 || chunk >= b->chunks || !weights) return FASTCLIP_INVALID_ARGUMENT;
  *block = block_of(c, p, chunk * b->rows, b->rows, b->tile_n);
  const void* behind = at<uint16_t>(weights, b->rows * b->stride * 2);
  p->tickets = at<unsigned>(behind, b->ticket), p->block_part = at<double>(behind, b->block_part);
  p->tile_part = at<float>(behind, b->tile_part), p->tile_parts = b->tile_parts;
  return FASTCLIP_OK;
}

}  // namespace
}  // namespace fastclip

using namespace fastclip;

extern "C" int fastclip_cuda_loss_plan(int64_t N, int64_t D, int64_t workspace, int processors,
                                       fastclip_cuda_loss_sizes* sizes) {
  if (!sizes || N < 1 || D < 1 || N > kLargest || D > kLargest || workspace < 0 || processors < 2)
    return FASTCLIP_INVALID_ARGUMENT;
  const LossBackward b = loss_backward(N, D, workspace, processors);
  *sizes = {loss_saved(N).bytes, loss_forward(N, workspace).bytes, b.rows, b.chunks, b.stride, b.extra};
  return FASTCLIP_OK;
}

extern "C" int fastclip_cuda_loss_forward(const fastclip_cuda_loss* c, void* saved, void* work, float* loss) {
  Loss p;
  if (const int error = view(c, saved, &p)) return error;
  if (!work || !loss) return FASTCLIP_INVALID_ARGUMENT;
  const LossForward f = loss_forward(c->N, c->workspace);
  p.tickets = at<unsigned>(work, f.tickets), p.cosine = at<double>(work, f.cosine);
  p.top = p.normalize ? nullptr : at<float>(work, f.top);
  p.record = at<double>(work, f.record), p.loss = loss;
  for (int k = 0; k < 2; ++k) p.side[k].sums = at<double>(work, f.sums[k]), p.side[k].part = at<void>(work, f.part[k]);
  const OnDevice guard(c->device);
  return forward(*c, f, &p);
}

extern "C" int fastclip_cuda_loss_weights(const fastclip_cuda_loss* c, const void* saved, void* weights,
                                          int64_t chunk) {
  Loss p;
  LossBackward b;
  fastclip_cuda_block block;
  if (const int error = view(c, saved, &p)) return error;
  if (const int error = chunk_of(*c, weights, chunk, &p, &b, &block)) return error;
  p.tile_part += (p.i0 / FASTCLIP_CUDA_TILE_M) * static_cast<int64_t>(p.tiles_n);
  const OnDevice guard(c->device);
  if (chunk == 0 && (p.copies[0] || p.copies[1]))
    if (const int error = start_copies(p, c->dtype == FASTCLIP_FP16, c->stream)) return error;
  return start_weights(block, p, weights, b.stride);
}

extern "C" int fastclip_cuda_loss_finish(const fastclip_cuda_loss* c, const void* saved, void* weights, int64_t chunk,
                                         const float* upstream, const float* raw_image, const float* raw_text,
                                         void* d_image, void* d_text, float* d_scale) {
  Loss p;
  LossBackward b;
  fastclip_cuda_block block;
  if (const int error = view(c, saved, &p)) return error;
  if (const int error = chunk_of(*c, weights, chunk, &p, &b, &block)) return error;
  if (!upstream || (d_image && !raw_image) || (d_text && !raw_text)) return FASTCLIP_INVALID_ARGUMENT;
  p.upstream = upstream, p.d_scale = d_scale;
  p.side[0].raw = raw_image, p.side[1].raw = raw_text;
  p.side[0].out = d_image, p.side[1].out = p.last ? d_text : nullptr;
  const OnDevice guard(c->device);
  return start_finish(p, c->dtype == FASTCLIP_FP16, c->stream);
}
