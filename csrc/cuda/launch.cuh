// Launching the tile kernel for a block of the C interface.
#pragma once
#include <atomic>

#include "tile.cuh"

namespace fastclip {

struct alignas(128) Maps {
  CUtensorMap image, text, weights;
};

// Checks the block, fills in the common parameters and creates the tensor maps. weights may be NULL.
int prepare(const fastclip_cuda_block* block, Params* p, Maps* maps, void* weights, int64_t weights_row_stride);

// Launches a kernel on one cluster per pair of tiles, at most as many as the multiprocessors hold. ready: one bit per
// device, set by the first launch on that device, which configures the kernel's shared memory.
int start(const void* kernel, int smem_bytes, std::atomic<uint64_t>& ready, const fastclip_cuda_block& block,
          Maps& maps, Params& p);

template <class Op>
int launch_op(const fastclip_cuda_block& block, Maps& maps, Params& p) {
  constexpr int kBytes = sizeof(Smem<Op>) + 1024;  // 1024 more, to align it
  static_assert(kBytes <= 227 * 1024, "shared memory of a multiprocessor");
  static std::atomic<uint64_t> ready{0};
  return start(reinterpret_cast<const void*>(&tile_kernel<Op>), kBytes, ready, block, maps, p);
}

// Launches the kernel for the block's dtype and tile: kWide columns, or 64 for problems with few tiles.
template <template <bool, int, bool> class Op, int kWide, bool kOption>
int launch(const fastclip_cuda_block* block, Params& p, void* weights = nullptr, int64_t weights_row_stride = 0) {
  constexpr int kSmall = FASTCLIP_CUDA_TILE_N_SMALL;
  Maps maps;
  if (Op<false, kSmall, kOption>::kStores && !weights) return FASTCLIP_INVALID_ARGUMENT;
  if (const int error = prepare(block, &p, &maps, weights, weights_row_stride)) return error;
  const bool half = block->dtype == FASTCLIP_FP16;
  if (block->tile_n == FASTCLIP_CUDA_TILE_N_SMALL)
    return half ? launch_op<Op<true, kSmall, kOption>>(*block, maps, p)
                : launch_op<Op<false, kSmall, kOption>>(*block, maps, p);
  if (block->tile_n != kWide) return FASTCLIP_INVALID_ARGUMENT;
  return half ? launch_op<Op<true, kWide, kOption>>(*block, maps, p)
              : launch_op<Op<false, kWide, kOption>>(*block, maps, p);
}

}  // namespace fastclip
