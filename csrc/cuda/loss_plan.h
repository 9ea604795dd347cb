// Sizes and offsets, in bytes, of what the losses of pairs keep (loss.cu, sigmoid.cu): no CUDA and no pointers, so that
// they can be tested anywhere. N images and as many texts, no labels. Index 0 of a pair is the images' side.
#pragma once
#include <cstdint>

namespace fastclip {

constexpr int kRecordRows = 32;    // indices that a record of the reduction sums
constexpr int kRecordValues = 4;   // loss, d_scale of the own pairs, largest derivative, whether the offset serves
constexpr int kRowsOfBlock = 8;    // rows that a block of the norms and of the finish takes, a warp each
constexpr int kPieces = 64;        // of the sigmoid's shares, each summed by a block
constexpr int kIndices = 128;      // in a block of them that a repair reduces: the rows of its tiles
constexpr int kExactColumns = 64;  // of a repair's tile
constexpr int kConstants = 8;      // FASTCLIP_SCALE and on
constexpr int kSavedHeader = 64;   // floats before the first vector of what is saved
constexpr int kSavedRows = 32;     // its vectors are padded to a multiple of that

// What the forward hands to the backward.
struct LossSaved {
  int64_t constants;  // float[kConstants]
  int64_t own_scale;  // double: the own pairs' share of d_scale, upstream 1
  int64_t own;        // double[N]: dL/dz of the own pairs
  int64_t inv[2];     // float[N]
  int64_t factor[2];  // float[N]: what remains of inv beside the rows that the products read
  int64_t weight[2];  // double[N]: what multiplies a negative's exponential
  int64_t lse2[2];    // float[N]: log2-sum-exp2, written and read where one offset does not serve
  int64_t bytes;
};
LossSaved loss_saved(int64_t N);

// The forward's workspace. Logits come in panels of rows, whose partial sums fit into `workspace` bytes.
struct LossForward {
  int tile_n;     // columns of a tile of the statistics
  int64_t panel;  // rows at a time, a multiple of 128 unless all
  int64_t blocks, records;
  int64_t tickets;  // unsigned[2 + blocks of indices]
  int64_t cosine;   // double[N]: r_i c_i <I_i, T_i>
  int64_t top;      // float[2 blocks of rows]: largest norms
  int64_t record;   // double[kRecordValues records]
  int64_t sums[2];  // double[N]: of the panels so far
  int64_t part[2];  // float[tiles across][panel or N], of a repair double
  int64_t bytes;
};
LossForward loss_forward(int64_t N, int64_t workspace);

// The backward's workspace: weights (rows, stride) of a block, and behind them:
struct LossBackward {
  int tile_n;
  int64_t rows;  // at a time, a multiple of 128 unless all
  int64_t chunks;
  int64_t columns;                // of a block of a chunk's weights, whole tiles unless all
  int64_t stride;                 // elements from one row of weights to the next
  int64_t extra;                  // rows of weights that what follows takes
  int64_t ticket;                 // unsigned; from the end of the weights on, as all
  int64_t tile_part, tile_parts;  // float[]: the tiles' shares of d_scale
  int64_t block_part;             // double[]: sums of those, one a block of the last finish
};
LossBackward loss_backward(int64_t N, int64_t D, int64_t workspace, int processors);

// What the sigmoid's forward keeps before the weights, which are cut as those of a backward.
struct SigmoidWork {
  int64_t constants;     // float[kConstants]
  int64_t ticket;        // unsigned
  int64_t own;           // double[N]: dL/dz of the own pairs, divisor 1
  int64_t inv[2];        // float[N]
  int64_t factor[2];     // float[N]
  int64_t top;           // float[2 blocks of rows]: largest norms
  int64_t part;          // double[3][parts]: of the tiles, then of the own pairs by blocks of rows
  int64_t parts, tiles;  // how many
  int64_t piece;         // double[3][kPieces]: sums of those
  int64_t bytes;
};
SigmoidWork sigmoid_work(int64_t N);

}  // namespace fastclip
