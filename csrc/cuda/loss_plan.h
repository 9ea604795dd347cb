// Memory layout of the losses of pairs (loss.cu, sigmoid.cu): sizes and offsets in bytes. This code uses neither CUDA
// nor pointers, so that it can be tested anywhere. There are N images, N texts and no labels. In arrays with two
// elements, index 0 is the images' side.
#pragma once
#include <cstdint>

namespace fastclip {

constexpr int kRecordRows = 32;    // indices that one record of the reduction sums
constexpr int kRecordValues = 4;   // loss, diagonal part of d_scale, largest derivative, 1 if a repair is needed
constexpr int kRowsOfBlock = 8;    // rows per block of the norms and of the finish, one per warp
constexpr int kPieces = 64;        // pieces of the sigmoid's partial sums, each summed by one block
constexpr int kIndices = 128;      // indices that a repair reduces together: the rows of its tiles
constexpr int kExactColumns = 64;  // columns of a repair's tile
constexpr int kConstants = 8;      // room for FASTCLIP_SCALE to FASTCLIP_GAIN
constexpr int kSavedHeader = 64;   // floats before the first vector of the saved memory
constexpr int kSavedRows = 32;     // the saved vectors are padded to a multiple of this

// Memory that the forward saves for the backward.
struct LossSaved {
  int64_t constants;  // float[kConstants]
  int64_t own_scale;  // double: the diagonal pairs' part of d_scale, upstream 1
  int64_t own;        // double[N]: dL/dz of the diagonal pairs
  int64_t inv[2];     // float[N]
  int64_t factor[2];  // float[N]: inv divided by the power of two of copied rows
  int64_t weight[2];  // double[N]: factor a or b of a negative's exponential
  int64_t lse2[2];    // float[N]: log2-sum-exp2, used after a repair
  int64_t bytes;
};
LossSaved loss_saved(int64_t N);

// The forward's workspace. Logits are computed in panels of rows, whose partial sums fit into `workspace` bytes.
struct LossForward {
  int tile_n;     // columns of a tile of the statistics
  int64_t panel;  // rows of a panel: N, or a multiple of 128
  int64_t blocks, records;
  int64_t tickets;  // unsigned[2 + blocks]
  int64_t cosine;   // double[N]: r_k c_k <image_k, text_k>
  int64_t top;      // float[2 blocks of rows]: largest norms
  int64_t record;   // double[kRecordValues records]
  int64_t sums[2];  // double[N]: results of the panels so far
  int64_t part[2];  // float[tiles across][panel or N], double in a repair
  int64_t bytes;
};
LossForward loss_forward(int64_t N, int64_t workspace);

// The backward's workspace: weights (rows, stride) of a block, followed by the arrays below.
struct LossBackward {
  int tile_n;
  int64_t rows;  // rows of a chunk: N, or a multiple of 128
  int64_t chunks;
  int64_t columns;                // columns of a block of weights: N, or whole tiles
  int64_t stride;                 // elements from one row of weights to the next
  int64_t extra;                  // size of the arrays below, in rows of weights
  int64_t ticket;                 // unsigned; like the others, counted from the end of the weights
  int64_t tile_part, tile_parts;  // float[]: the tiles' parts of d_scale
  int64_t block_part;             // double[]: sums of those, one per block of the last finish
};
LossBackward loss_backward(int64_t N, int64_t D, int64_t workspace, int processors);

// Memory of the sigmoid's forward before the weights, which are cut like those of LossBackward.
struct SigmoidWork {
  int64_t constants;     // float[kConstants]
  int64_t ticket;        // unsigned
  int64_t own;           // double[N]: dL/dz of the diagonal pairs, divisor 1
  int64_t inv[2];        // float[N]
  int64_t factor[2];     // float[N]
  int64_t top;           // float[2 blocks of rows]: largest norms
  int64_t part;          // double[3][parts]: sums of the tiles, then of the diagonal pairs by blocks of rows
  int64_t parts, tiles;  // number of all sums, and number of tiles
  int64_t piece;         // double[3][kPieces]: sums of the pieces of `part`
  int64_t bytes;
};
SigmoidWork sigmoid_work(int64_t N);

}  // namespace fastclip
