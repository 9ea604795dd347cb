// Stores a tile of weights, for the kernels that compute weights.
#pragma once
#include "tile.cuh"

namespace fastclip {

// Stores the tile's weights. Every warp stores its own 16 rows of a piece, so that warps need no barrier for it.
// weigh(row, half, h, c, weights) computes two adjacent weights of a row. `row` holds the row's values of the vectors.
template <class Op, class Weigh>
__device__ __forceinline__ void store_weights(const Epilogue<Op>& t, const Weigh& weigh) {
  using S = Stores<Op>;
  constexpr int kBlocks = S::kPieces / kHalves;
  // Address at which this lane writes its row of an 8 x 8 matrix: row lane % 16 of the warp's 16 rows. The swizzle of
  // the TMA places 16-byte chunk c of a row at c xor (row % 8).
  int dst = smem_address(t.stores.piece[0]) + 128 * (16 * t.at.warp + (t.at.lane & 15)) +
            (((t.at.lane >> 4) ^ (t.at.lane & 7)) << 4);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const RowValues<Op> rows[2] = {t.rows(half, 0), t.rows(half, 1)};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int buffer = (kBlocks * half + block) % S::kBuffers;
      forget(dst);  // compute addresses again for every piece: registers that keep them would spill
#pragma unroll
      for (int c = 0; c < 8; c += 2) {
        uint32_t packed[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float weights[2];
          weigh(rows[k & 1], half, k & 1, 8 * block + c + (k >> 1), weights);
          packed[k] = pack<Op::kHalf>(weights[0], weights[1]);
        }
        store_matrix_x4((dst ^ (c << 4)) + buffer * S::kPieceBytes, packed);
      }
      // At most kBuffers - 2 earlier stores may still be reading when the warp writes into the next buffer
      tma_store_fence();
      if (t.at.lane == 0) tma_store_wait_read<S::kBuffers - 2>();
      __syncwarp();
      if (t.at.lane == 0) {
        const int x = t.tile.j0 + 64 * block, y = t.tile.i0 + 64 * half + 16 * t.at.warp;
        if (x < t.p.N && y < t.p.M) tma_store(t.weights_map, t.stores.piece[buffer] + 2048 * t.at.warp, x, y);
        tma_store_commit();
      }
    }
  }
}

// Ends a tile of weights: stores its partial sum of d_scale. After the barrier no thread reads the tile's vectors.
template <class Op>
__device__ __forceinline__ void end_tile(const Epilogue<Op>& t, float d_scale) {
  publish_sum(t, 0, d_scale);
  t.sync();
  if (t.at.thread == 0 && t.tile.m < t.p.tiles_m) t.p.scale_part[t.index()] = published_sum(t, 0);
}

}  // namespace fastclip
