// What the entry points of both losses of pairs (loss.cu, sigmoid.cu) make of the C interface's problem.
#pragma once
#include <cuda_runtime.h>

#include "../fastclip.h"
#include "loss.cuh"

namespace fastclip {

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

// Checks a problem and fills in its features, sizes and scale.
int read_problem(const fastclip_cuda_loss* c, Loss* p);

// Rows i0 to i0 + rows of the logits; the tiles' width is the caller's.
fastclip_cuda_block block_of(const fastclip_cuda_loss& c, Loss* p, int64_t i0, int64_t rows, int tile_n);

// Of a chunk's rows the columns of a block, from `column` on.
int cut_columns(const LossBackward& b, int64_t column, Loss* p, fastclip_cuda_block* block);

// Tiles of the whole problem before a block's first row of them, and in that row.
inline int64_t tiles_before(const Loss& p, const fastclip_cuda_block& block) {
  return p.i0 / FASTCLIP_CUDA_TILE_M * static_cast<int64_t>(p.tiles_n) + p.j0 / block.tile_n;
}

}  // namespace fastclip
