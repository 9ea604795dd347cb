// The sigmoid loss of pairs: the functions fastclip_cuda_sigmoid_* of fastclip.h, which launch the kernels in order.
// fastclip_cuda_sigmoid_fwd, which launches the tiles only, is in sigmoid_fwd.cu.
#include "loss_kernels.h"
#include "loss_problem.h"

namespace fastclip {
namespace {

// Checks a problem and fills in the parameters that all its kernels read, and the rows of a chunk.
int view(const fastclip_cuda_loss* c, const float* bias, const void* work, int64_t chunk, Loss* p, LossBackward* b,
         fastclip_cuda_block* block) {
  if (const int error = read_problem(c, p)) return error;
  if (!bias || !work) return FASTCLIP_INVALID_ARGUMENT;
  *b = loss_backward(c->N, c->D, c->workspace, c->processors);
  if (chunk < 0 || chunk >= b->chunks) return FASTCLIP_INVALID_ARGUMENT;
  const SigmoidWork w = sigmoid_work(c->N);
  for (int k = 0; k < 2; ++k)
    p->side[k].inv = at<float>(work, w.inv[k]), p->side[k].factor = at<float>(work, w.factor[k]);
  p->constants = at<float>(work, w.constants), p->tickets = at<unsigned>(work, w.ticket);
  p->own = at<double>(work, w.own), p->bias = bias;
  p->top = p->normalize || c->dtype != FASTCLIP_FP16 ? nullptr : at<float>(work, w.top);  // for the gain
  p->part = at<double>(work, w.part), p->parts = w.parts, p->tiles = w.tiles;
  p->block_part = at<double>(work, w.piece);
  *block = block_of(*c, p, chunk * b->rows, b->rows, b->tile_n);
  return FASTCLIP_OK;
}

}  // namespace
}  // namespace fastclip

using namespace fastclip;

extern "C" int fastclip_cuda_sigmoid_weights(const fastclip_cuda_loss* c, const float* bias, void* work, int64_t chunk,
                                             int64_t column, int gradients) {
  Loss p;
  LossBackward b;
  fastclip_cuda_block block;
  if (const int error = view(c, bias, work, chunk, &p, &b, &block)) return error;
  if (const int error = cut_columns(b, column, &p, &block)) return error;
  const OnDevice guard(c->device);
  if (chunk == 0 && column == 0)
    if (const int error = start_sigmoid_norms(p, c->dtype == FASTCLIP_FP16, c->stream)) return error;
  p.part += tiles_before(p, block);
  return start_pairs(block, p, gradients ? at<void>(work, sigmoid_work(c->N).bytes) : nullptr, b.stride);
}

extern "C" int fastclip_cuda_sigmoid_finish(const fastclip_cuda_loss* c, const float* bias, void* work, int64_t chunk,
                                            double divisor, void* loss, int wide, void* d_image, void* d_text,
                                            float* d_scalars) {
  Loss p;
  LossBackward b;
  fastclip_cuda_block block;
  if (const int error = view(c, bias, work, chunk, &p, &b, &block)) return error;
  if (!loss) return FASTCLIP_INVALID_ARGUMENT;
  const int64_t raw = sigmoid_work(c->N).bytes + 2 * b.rows * b.stride;
  p.side[0].raw = at<float>(work, raw), p.side[1].raw = at<float>(work, raw + 4 * b.rows * p.width);
  p.side[0].out = d_image, p.side[1].out = p.last ? d_text : nullptr;
  p.loss = wide ? nullptr : static_cast<float*>(loss), p.wide_loss = wide ? static_cast<double*>(loss) : nullptr;
  p.d_scalars = d_scalars, p.loss_alone = !d_image && !d_text && !d_scalars;
  p.divisor = divisor;
  const OnDevice guard(c->device);
  return start_sigmoid_finish(p, c->dtype == FASTCLIP_FP16, c->stream);
}

extern "C" int fastclip_cuda_sigmoid_bwd(const fastclip_cuda_factors* c) {
  if (!c || !c->upstream || (c->dtype != FASTCLIP_BF16 && c->dtype != FASTCLIP_FP16)) return FASTCLIP_INVALID_ARGUMENT;
  Loss p = {};
  const void* kept[2] = {c->kept_image, c->kept_text};
  void* out[2] = {c->d_image, c->d_text};
  const int64_t counts[2] = {c->image_count, c->text_count};
  p.vectors = 1;
  for (int k = 0; k < 2; ++k) {
    if (!out[k]) continue;
    if (!kept[k] || counts[k] < 0) return FASTCLIP_INVALID_ARGUMENT;
    p.side[k].x = kept[k], p.side[k].out = out[k], p.side[k].count = counts[k];
    const uintptr_t bits = reinterpret_cast<uintptr_t>(kept[k]) | reinterpret_cast<uintptr_t>(out[k]);
    p.vectors = p.vectors && bits % 16 == 0;
  }
  if ((c->d_scale && !c->kept_scale) || (c->d_bias && !c->kept_bias)) return FASTCLIP_INVALID_ARGUMENT;
  p.upstream = c->upstream;
  p.kept_scalar[0] = c->kept_scale, p.kept_scalar[1] = c->kept_bias;
  p.d_scalar[0] = c->d_scale, p.d_scalar[1] = c->d_bias;
  const OnDevice guard(c->device);
  return start_sigmoid_bwd(p, c->dtype == FASTCLIP_FP16, c->stream);
}
