// From the problem of the C interface to the kernels' parameters, for both losses of pairs (loss.cu, sigmoid.cu).
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

// Makes the features' device current while the object exists, because kernels launch on the current device.
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

// Selects rows i0 to i0 + rows of the logits. The caller chooses the width of the tiles.
fastclip_cuda_block block_of(const fastclip_cuda_loss& c, Loss* p, int64_t i0, int64_t rows, int tile_n);

// Selects the columns of a block of the chunk's rows, from `column` on.
int cut_columns(const LossBackward& b, int64_t column, Loss* p, fastclip_cuda_block* block);

// Number of tiles of the whole problem that come before the block's first tile.
inline int64_t tiles_before(const Loss& p, const fastclip_cuda_block& block) {
  return p.i0 / FASTCLIP_CUDA_TILE_M * static_cast<int64_t>(p.tiles_n) + p.j0 / block.tile_n;
}

}  // namespace fastclip
