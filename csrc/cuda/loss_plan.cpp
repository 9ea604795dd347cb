#include "loss_plan.h"

#include <algorithm>
#include <numeric>

#include "../fastclip.h"

namespace fastclip {
namespace {

constexpr int64_t kAlign = 128, kTileM = FASTCLIP_CUDA_TILE_M;
constexpr int64_t kProductN = 256;      // columns of a tile of the library's products, which has kTileM rows
constexpr int64_t kLongestSum = 65536;  // terms that one product may add up: tensor cores truncate

int64_t ceil_div(int64_t size, int64_t length) { return (size + length - 1) / length; }
int64_t round_up(int64_t size, int64_t length) { return ceil_div(size, length) * length; }

// Cut `size` into the smallest number of equal parts that are no longer than `most`. Return their length, rounded up to
// a multiple of `unit`.
int64_t even(int64_t size, int64_t most, int64_t unit) { return round_up(ceil_div(size, ceil_div(size, most)), unit); }

// Places arrays one after the other.
struct Layout {
  int64_t bytes = 0;
  int64_t take(int64_t count, int64_t size) {
    const int64_t at = bytes;
    bytes += round_up(count * size, kAlign);
    return at;
  }
};

// Columns of a tile: wide, unless the tiles would be so few that half of the multiprocessors or more were idle. This
// depends on N alone, so that every Hopper GPU returns the same bits.
int tile_n(int64_t N) {
  constexpr int64_t kFew = 33;  // clusters of two that occupy half of an H100's 132 multiprocessors
  const int64_t pairs = ceil_div(N, 2 * kTileM);
  return pairs * ceil_div(N, FASTCLIP_CUDA_TILE_N) <= kFew ? FASTCLIP_CUDA_TILE_N_SMALL : FASTCLIP_CUDA_TILE_N;
}

// Number of waves for the tiles of N rows in chunks of `rows`, with `across` tiles along the columns. A wave is a round
// in which every processor (a multiprocessor, or a cluster of two) computes one tile.
int64_t waves(int64_t N, int64_t rows, int64_t tile_rows, int64_t across, int64_t processors) {
  const auto of_chunk = [&](int64_t size) { return ceil_div(ceil_div(size, tile_rows) * across, processors); };
  return N / rows * of_chunk(rows) + of_chunk(N % rows);
}

// The smallest number of rows per chunk that is as fast as `most` rows: it needs no more chunks, no more waves in the
// kernel of the weights, and no more waves in the library's products with the texts. More rows would use memory without
// saving time.
int64_t fewest_rows(int64_t N, int64_t columns, int64_t D, int64_t most, int processors) {
  constexpr int64_t kPair = 2 * kTileM;  // rows of a cluster
  const int64_t across = ceil_div(columns, tile_n(N)), across_product = ceil_div(D, kProductN);
  const auto clusters = [&](int64_t rows) { return waves(N, rows, kPair, across, processors / 2); };
  const auto tiles = [&](int64_t rows) { return waves(N, rows, kTileM, across_product, processors); };
  const int64_t most_clusters = clusters(most), most_tiles = tiles(most);
  for (int64_t rows = even(N, most, kPair); rows < most; rows += kPair)
    if (clusters(rows) <= most_clusters && tiles(rows) <= most_tiles) return rows;
  return most;
}

}  // namespace

LossSaved loss_saved(int64_t N) {
  Layout layout;
  LossSaved s = {};
  N = round_up(N, kSavedRows);  // makes the size a simple function of N, which plain_saved of _backends/cuda.py repeats
  s.constants = layout.take(kConstants, 4);
  s.own_scale = layout.take(1, 8);
  s.own = layout.take(N, 8);
  for (int side = 0; side < 2; ++side) {
    s.inv[side] = layout.take(N, 4);
    s.factor[side] = layout.take(N, 4);
    s.weight[side] = layout.take(N, 8);
    s.lse2[side] = layout.take(N, 4);
  }
  s.bytes = layout.bytes;
  return s;
}

LossForward loss_forward(int64_t N, int64_t workspace) {
  LossForward f = {};
  f.tile_n = tile_n(N);
  f.blocks = ceil_div(N, kIndices);
  f.records = ceil_div(N, kRecordRows);
  // Bytes per row: its partial sums and its part of the columns'. A repair needs the most, with doubles and narrow
  // tiles.
  const int64_t exact_n = ceil_div(N, kExactColumns), row_bytes = 8 * (exact_n + f.blocks);
  f.panel = std::min(N, std::max(workspace / row_bytes / kTileM, int64_t{1}) * kTileM);
  const int64_t rows = ceil_div(f.panel, kTileM);
  Layout layout;
  f.tickets = layout.take(2 + f.blocks, 4);
  f.cosine = layout.take(N, 8);
  f.top = layout.take(2 * ceil_div(N, kRowsOfBlock), 4);
  f.record = layout.take(kRecordValues * f.records, 8);
  for (int64_t& sums : f.sums) sums = layout.take(N, 8);
  f.part[0] = layout.take(8 * exact_n * f.panel, 1);
  f.part[1] = layout.take(8 * rows * N, 1);
  f.bytes = layout.bytes;
  return f;
}

LossBackward loss_backward(int64_t N, int64_t D, int64_t workspace, int processors) {
  LossBackward b = {};
  b.tile_n = tile_n(N);
  // Rows of a wave: their tiles of the product with the texts occupy every multiprocessor once
  const int64_t wave = std::max(processors / ceil_div(D, kProductN), int64_t{1}) * kTileM;
  // Columns are cut if the workspace would otherwise hold less than nearly a wave of rows: idle multiprocessors cost
  // more than adding once more to the sums of a chunk's images
  const int64_t nearly = round_up(std::min(wave - wave / 8, N), kTileM);
  const int64_t fit = std::min(workspace / 2 / nearly, kLongestSum);
  const int64_t unit = std::lcm(kAlign, int64_t{b.tile_n});
  b.columns = round_up(N, kAlign) <= fit ? N : std::min(N, even(N, std::max(fit / unit, int64_t{1}) * unit, unit));
  b.stride = round_up(b.columns, kAlign);
  int64_t rows = std::min(workspace / 2 / b.stride, kLongestSum);
  rows = rows >= wave ? rows / wave * wave : rows / kTileM * kTileM;
  b.rows = std::min(N, std::max(rows, kTileM));
  if (b.rows < N) b.rows = fewest_rows(N, b.columns, D, b.rows, processors);
  b.chunks = ceil_div(N, b.rows);
  Layout layout;
  b.ticket = layout.take(1, 4);
  b.tile_parts = ceil_div(N, kTileM) * ceil_div(N, b.tile_n);
  b.tile_part = layout.take(b.tile_parts, 4);
  b.block_part = layout.take(ceil_div(b.rows, kRowsOfBlock) + ceil_div(N, kRowsOfBlock), 8);
  b.extra = ceil_div(layout.bytes, 2 * b.stride);
  return b;
}

SigmoidWork sigmoid_work(int64_t N) {
  SigmoidWork w = {};
  w.tiles = ceil_div(N, kTileM) * ceil_div(N, tile_n(N));
  w.parts = w.tiles + ceil_div(N, kRowsOfBlock);
  Layout layout;
  w.constants = layout.take(kConstants, 4);
  w.ticket = layout.take(1, 4);
  w.own = layout.take(N, 8);
  for (int side = 0; side < 2; ++side) {
    w.inv[side] = layout.take(N, 4);
    w.factor[side] = layout.take(N, 4);
  }
  w.top = layout.take(2 * ceil_div(N, kRowsOfBlock), 4);
  w.part = layout.take(3 * w.parts, 8);
  w.piece = layout.take(3 * kPieces, 8);
  w.bytes = layout.bytes;
  return w;
}

}  // namespace fastclip
