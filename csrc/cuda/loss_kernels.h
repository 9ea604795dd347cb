// One launch function for each kernel of the losses of pairs. Each returns a status. loss.cu and sigmoid.cu call them
// in order.
#pragma once
#include "../fastclip.h"
#include "loss.cuh"

namespace fastclip {

using LossKernel = void (*)(Loss);

// Launches an ordinary kernel: no cluster, no tensor maps, one parameter.
int start_loss(LossKernel kernel, int64_t blocks, int threads, int smem_bytes, const Loss& p, void* stream);

int start_norms(const Loss& p, bool half, void* stream);
int start_copies(const Loss& p, bool half, void* stream);
int start_statistics(const fastclip_cuda_block& block, const Loss& p);
int start_reduce(const Loss& p, void* stream);
int start_repair(const fastclip_cuda_block& block, const Loss& p);
int start_weights(const fastclip_cuda_block& block, const Loss& p, void* weights, int64_t stride);
int start_finish(const Loss& p, bool half, void* stream);

int start_sigmoid_norms(const Loss& p, bool half, void* stream);
int start_pairs(const fastclip_cuda_block& block, const Loss& p, void* weights, int64_t stride);  // weights may be NULL
int start_sigmoid_finish(const Loss& p, bool half, void* stream);
int start_sigmoid_bwd(const Loss& p, bool half, void* stream);

}  // namespace fastclip
