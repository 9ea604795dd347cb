// The plain case: the functions fastclip_cuda_loss_* of fastclip.h, which launch the kernels in order.
#include "loss_kernels.h"
#include "loss_problem.h"

namespace fastclip {
namespace {

// Checks a problem and fills in the parameters that all its kernels read.
int view(const fastclip_cuda_loss* c, const void* saved, Loss* p) {
  if (const int error = read_problem(c, p)) return error;
  if (!saved || !(c->image_weight >= 0 && c->image_weight <= 1)) return FASTCLIP_INVALID_ARGUMENT;
  const LossSaved s = loss_saved(c->N);
  for (int k = 0; k < 2; ++k) {
    LossSide& side = p->side[k];
    side.inv = at<float>(saved, s.inv[k]), side.factor = at<float>(saved, s.factor[k]);
    side.weight = at<double>(saved, s.weight[k]), side.lse2 = at<float>(saved, s.lse2[k]);
  }
  p->side_weight[0] = c->image_weight / p->N, p->side_weight[1] = (1 - c->image_weight) / p->N;
  p->constants = at<float>(saved, s.constants), p->own_scale = at<double>(saved, s.own_scale);
  p->own = at<double>(saved, s.own);
  return FASTCLIP_OK;
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

// Fills in the rows of a chunk, and the backward's workspace, which follows the weights.
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
  *sizes = {loss_saved(N).bytes,
            loss_forward(N, workspace).bytes,
            b.rows,
            b.chunks,
            b.stride,
            b.extra,
            sigmoid_work(N).bytes,
            b.columns};
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

extern "C" int fastclip_cuda_loss_weights(const fastclip_cuda_loss* c, const void* saved, void* weights, int64_t chunk,
                                          int64_t column) {
  Loss p;
  LossBackward b;
  fastclip_cuda_block block;
  if (const int error = view(c, saved, &p)) return error;
  if (const int error = chunk_of(*c, weights, chunk, &p, &b, &block)) return error;
  if (const int error = cut_columns(b, column, &p, &block)) return error;
  p.tile_part += tiles_before(p, block);
  const OnDevice guard(c->device);
  if (chunk == 0 && column == 0 && (p.copies[0] || p.copies[1]))
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
