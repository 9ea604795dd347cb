// A persistent kernel over tiles (kBlockM, kBlockN) of the logits. This file computes the dot products of a tile; an
// `Op` (contrastive_*.cu, sigmoid_fwd.cu, loss_exact.cu, loss_weights.cu) is the epilogue that uses them. M images, N
// texts, D features; i and j index rows (images) and columns (texts).
//
// c is the number that is subtracted from every logit before the exponential (docs/mathematics.md). c2 = log2(e) c is
// the constant FASTCLIP_OFFSET2, `offset2` in code. `offset` is that of the diagonal: row i meets it in column
// i + offset.
//
//   Program   one CTA per multiprocessor with a producer warp, which issues TMA loads, and two consumer warpgroups
//             the consumers alternate between tiles ("pingpong"): while one multiplies, the other runs its epilogue
//             the two CTAs of a cluster own vertically adjacent tiles, and each loads half of the text block for both
//   Traffic   reads images once per tile column and texts once per pair of tile rows, in bands of rows that stay in L2
//   Precision products in the dtype of the features, accumulation in fp32
//   Ragged    rows >= M, columns >= N and the D tail load as 0, tiles at the edge and on the diagonal are masked
//   Order     every partial sum has its own slot, nothing is atomic: bitwise repeatable
#pragma once
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../fastclip.h"
#include "loss.cuh"
#ifdef FASTCLIP_EMULATE
#include "../tests/emulate_sm90.h"
#else
#include "sm90_ptx.cuh"
#endif

namespace fastclip {

using namespace sm90;

constexpr int kBlockM = FASTCLIP_CUDA_TILE_M, kBlockK = 64, kHalves = kBlockM / 64;  // a wgmma has 64 rows
constexpr int kCluster = 2;                                                          // CTAs that share a text block
constexpr int kBand = 8;  // pairs of tile rows that are visited column by column, so that 2048 image rows stay in L2
constexpr int kThreads = 384, kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 65536, "registers of a multiprocessor");
constexpr double kLog2e64 = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr float kLog2e = static_cast<float>(kLog2e64), kSmallest = 0x1p-126f;
// A logit may be this far above c: exp(70) = 2.5e30, and fp32 holds a sum of a million of them
constexpr float kReach = 70.f;

struct Side {
  const float *factor, *neg, *pos, *own;  // as in fastclip.h
  const int32_t* label;
  float* part;
};

struct Params {
  const float *constants, *bias;
  Side row, col;
  float* scale_part;
  double* part;
  int64_t offset, part_row_stride;
  int M, N, k_blocks, tiles_m, tiles_n, pairs;  // pairs of vertically adjacent tiles
  int parts_n;                                  // partial sums per row of tiles, see index(); 0 stands for tiles_n
  int exclude_self;
  Loss loss;  // for the kernels of the plain case
};

struct Tile {
  int m, n, i0, j0;  // indices and first element
};

// Accumulator [half][4 c + 2 h + e] of a thread is element (64 half + 8 h + row, 8 c + e + col) of the tile.
struct Place {
  int thread, warp, lane, row, col;
};

// When the tile kernel calls the Op's finish_exact() in place of finish():
//   never      not at all
//   on_repair  if the device requested a repair
//   alone      always; such a kernel returns at once unless the device requested a repair
enum class Exact { never, on_repair, alone };

constexpr int kNone = 1 << 20;  // value of `diagonal` for a tile without excluded diagonal pairs
constexpr int kFindsNothing = -1;

// Elements of a tile that are left out, at the edge or on the diagonal. Only three numbers are known at run time; the
// compiler folds everything else into the unrolled loops.
struct Mask {
  int diagonal, rows, cols;
  __device__ __forceinline__ bool own(int half, int h, int c, int e) const {
    return 8 * c + e - 64 * half - 8 * h == diagonal;
  }
  __device__ __forceinline__ bool outside(int half, int h, int c, int e) const {
    return 64 * half + 8 * h >= rows || 8 * c + e >= cols;
  }
};

// Shared memory of a consumer warpgroup for one tile: vectors of its rows and columns, and sums of its four warps.
template <class Op>
struct Scratch {
  alignas(16) float row[Op::kRowVectors][kBlockM];
  alignas(16) float col[Op::kColVectors][Op::kBlockN];
  alignas(16) float sums[Op::kSums][4][Op::kSumsN];
  float found;  // value of the constant Op::kFinds
};

// Weights on their way to global memory. A piece has 64 rows of 64 two-byte values.
template <class Op>
struct Stores {
  static constexpr int kPieceBytes = 64 * 128, kPieces = kHalves * Op::kBlockN / 64;
  static constexpr int kBuffers = kPieces % 3 == 0 ? 3 : 2;  // every buffer takes equally many pieces
  static_assert(kPieces % kBuffers == 0, "a buffer must not be written again before kBuffers - 1 others");
  unsigned char piece[Op::kStores ? kBuffers : 1][Op::kStores ? kPieceBytes : 16];
};

template <class Op>
struct Smem {
  static constexpr int kImageBytes = kBlockM * kBlockK * 2, kTextBytes = Op::kBlockN * kBlockK * 2;
  static constexpr int kStageBytes = kImageBytes + kTextBytes;
  unsigned char stage[Op::kStages][kStageBytes];  // rows of 128 bytes, 128-byte swizzle: aligned to 1024 bytes
  Stores<Op> stores[2];
  Scratch<Op> scratch[2];
  uint64_t full[Op::kStages], empty[Op::kStages];
};

// The vectors' values of one row, in registers.
template <class Op>
struct RowValues {
  float value[Op::kRowVectors];
  __device__ __forceinline__ float operator[](int vector) const { return value[vector]; }
};

template <class Op>
struct Epilogue {
  const Params& p;
  Tile tile;
  Place at;
  int diagonal;  // column in which the tile's first row meets the diagonal, counted from the tile's; or kNone
  Scratch<Op>& scratch;
  Stores<Op>& stores;
  const CUtensorMap* weights_map;
  int barrier;  // named barrier of the warpgroup

  __device__ __forceinline__ Mask mask() const {
    return {diagonal + at.row - at.col, p.M - tile.i0 - at.row, p.N - tile.j0 - at.col};
  }
  __device__ __forceinline__ float row(int vector, int half, int h) const {
    return scratch.row[vector][64 * half + 8 * h + at.row];
  }
  __device__ __forceinline__ RowValues<Op> rows(int half, int h) const {
    RowValues<Op> values;
#pragma unroll
    for (int v = 0; v < Op::kRowVectors; ++v) values.value[v] = row(v, half, h);
    return values;
  }
  __device__ __forceinline__ float2 cols(int vector, int c) const {
    return *reinterpret_cast<const float2*>(&scratch.col[vector][8 * c + at.col]);
  }
  __device__ __forceinline__ int index() const { return tile.m * p.parts_n + tile.n; }
  __device__ __forceinline__ void sync() const { named_sync(barrier, 128); }
};

__device__ __forceinline__ bool repairs(const Params& p) { return __ldg(p.constants + FASTCLIP_REPAIR) != 0; }

// factor s log2(e), formed in fp64 and rounded once, because an error in it would shift all logits of a row together.
__device__ __forceinline__ float scaled2(float factor, const float* constants) {
  return static_cast<float>(static_cast<double>(factor) * __ldg(constants + FASTCLIP_SCALE) * kLog2e64);
}

// The rounding error of scaled2().
__device__ __forceinline__ float rest2(float factor, const float* constants) {
  const double exact = static_cast<double>(factor) * __ldg(constants + FASTCLIP_SCALE) * kLog2e64;
  const float rounded = static_cast<float>(exact);
  return fabsf(rounded) < HUGE_VALF ? static_cast<float>(exact - rounded) : 0.f;
}

// log2(e) z of a dot product, and in *low its rounding error; -inf for a pair that is left out.
__device__ __forceinline__ float exact_logit2(float dot, float scaled, float rest, bool drop, float* low) {
  const float exact = __fmul_rn(dot, scaled);  // not fused with another operation, which would round differently
  const float z2 = drop ? -HUGE_VALF : exact, rounded = fmaf(dot, scaled, -exact) + dot * rest;
  *low = fabsf(z2) < HUGE_VALF ? rounded : 0.f;
  return z2;
}

// Sum two values over the lanes that differ in one bit, with one shuffle. Lanes with the bit clear return the sum of
// low, lanes with the bit set that of high.
__device__ __forceinline__ float exchange(float low, float high, int bit, int lane) {
  const bool upper = lane & bit;
  return (upper ? high : low) + __shfl_xor_sync(0xffffffff, upper ? low : high, bit);
}

// Store the sum of every warp in scratch.sums[k][warp][0]. After the next barrier published_sum() adds the four.
template <class Op>
__device__ __forceinline__ void publish_sum(const Epilogue<Op>& t, int k, float sum) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, bit);
  if (t.at.lane == 0) t.scratch.sums[k][t.at.warp][0] = sum;
}

template <class Op>
__device__ __forceinline__ float published_sum(const Epilogue<Op>& t, int k) {
  const auto& sums = t.scratch.sums[k];
  return (sums[0][0] + sums[1][0]) + (sums[2][0] + sums[3][0]);
}

// ---- kernel ----

__device__ __forceinline__ Tile tile_at(const Params& p, int block_n, int pair, int rank) {
  const int pair_rows = (p.tiles_m + kCluster - 1) / kCluster, band = kBand * p.tiles_n;
  const int first = pair / band * kBand, height = min(kBand, pair_rows - first), inside = pair % band;
  const int m = (first + inside % height) * kCluster + rank, n = inside / height;
  return {m, n, m * kBlockM, n * block_n};
}

// Return c2. c is 0 if no logit is above kReach, because subtracting another number costs digits of exp's argument.
__device__ __forceinline__ float offset2_of(float bound) { return (bound <= kReach ? 0.f : bound - kReach) * kLog2e; }

// Power of two with gain |G| < 2^13 for fp16 weights G <= e^(bound + bias) of the sigmoid loss. Without it the weights
// of a solved batch would flush to zero in fp16. If the bound is below e^-40, these weights are negligible, because
// those of the diagonal pairs are near 1. The gain is therefore at most the one for e^-40, with which fp32 holds the
// product of a diagonal weight, the gain and any feature.
__device__ __forceinline__ float gain_of(float bound, float bias) {
  float top = bound + bias;
  top = top < 0.f ? (top > -40.f ? top : -40.f) : 0.f;  // NaN: 0
  return as_float((127 + 12 - static_cast<int>(floorf(top * kLog2e))) << 23);
}

// Find the constant Op::kFinds. If the blocks of the norms kernel have stored their largest norms, it is computed from
// these norms. Otherwise it is read from the constants. Every CTA computes it again, which saves a launch, and the
// first CTA stores it for the kernels that follow.
template <class Op>
__device__ __forceinline__ void find_constant(const Params& p, Smem<Op>& s) {
  float found = 0.f;
  if (p.loss.top == nullptr) {
    found = __ldg(p.constants + Op::kFinds);
  } else {
    const int blocks = (p.loss.N + kRowsOfBlock - 1) / kRowsOfBlock, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int kWarps = kThreads / 32;
    float (&tops)[kBlockM] = s.scratch[0].row[0];
    static_assert(2 * kWarps <= kBlockM, "two numbers per warp");
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float top = 0.f;
      for (int b = threadIdx.x; b < blocks; b += kThreads) top = fmaxf(top, __ldg(p.loss.top + side * blocks + b));
#pragma unroll
      for (int bit = 16; bit > 0; bit >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, bit));
      if (lane == 0) tops[side * kWarps + warp] = top;
    }
    __syncthreads();
    float top[2] = {0.f, 0.f};
    for (int w = 0; w < kWarps; ++w) top[0] = fmaxf(top[0], tops[w]), top[1] = fmaxf(top[1], tops[kWarps + w]);
    found = Op::find(p, fabsf(__ldg(p.constants + FASTCLIP_SCALE)) * (top[0] * top[1]));
    if (blockIdx.x == 0 && threadIdx.x == 0) const_cast<float*>(p.constants)[Op::kFinds] = found;
  }
  if (threadIdx.x < 2) s.scratch[threadIdx.x].found = found;
}

template <int kAcc>
__device__ __forceinline__ void hold(float (&acc)[kHalves][kAcc]) {
#pragma unroll
  for (int half = 0; half < kHalves; ++half)
#pragma unroll
    for (int k = 0; k < kAcc; ++k) pin(acc[half][k]);
}

template <class Op>
__device__ __forceinline__ void produce(const Params& p, Smem<Op>& s, const CUtensorMap& image_map,
                                        const CUtensorMap& text_map, int cluster, int clusters, int count, int rank) {
  constexpr int kShare = Op::kBlockN / kCluster;  // rows of the text block that this CTA loads for both
  int stage = 0;
  uint32_t parity = 1;  // a fresh barrier lets waits for parity 1 pass: no stage is in use yet
  for (int k = 0; k < count; ++k) {
    const Tile tile = tile_at(p, Op::kBlockN, cluster + k * clusters, rank);
#pragma unroll 1
    for (int block = 0; block < p.k_blocks; ++block) {
      mbarrier_wait(&s.empty[stage], parity);
      mbarrier_expect(&s.full[stage], Smem<Op>::kStageBytes);
      tma_load(s.stage[stage], &image_map, &s.full[stage], block * kBlockK, tile.i0);
      tma_load_multicast(s.stage[stage] + Smem<Op>::kImageBytes + rank * (Smem<Op>::kTextBytes / kCluster), &text_map,
                         &s.full[stage], block * kBlockK, tile.j0 + rank * kShare, (1 << kCluster) - 1);
      if (++stage == Op::kStages) stage = 0, parity ^= 1;
    }
  }
}

template <class Op>
__device__ __forceinline__ void consume(const Params& p, Smem<Op>& s, const CUtensorMap& weights_map, int cluster,
                                        int clusters, int count, int rank, int mine) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const Place at = {thread, thread / 32, lane, 16 * (thread / 32) + lane / 4, 2 * (lane % 4)};
  // Named barriers: 0 is __syncthreads, 1 and 2 give the two warpgroups their turns at the tensor cores, and 3 and 4
  // synchronise one warpgroup each
  const int turn = 1 + mine, other_turn = 2 - mine;
  if (mine == 1) named_arrive(other_turn, 256);  // the first turn belongs to consumer 0

  for (int k = mine; k < count; k += 2) {
    const Tile tile = tile_at(p, Op::kBlockN, cluster + k * clusters, rank);
    Scratch<Op>& scratch = s.scratch[mine];
    // Load the tile's vectors. This warpgroup has finished reading those of its last tile, and the barrier of its turn
    // makes the new ones visible, so no further barrier is needed.
    Op::load_row(p, tile.i0 + thread, scratch, thread);
    for (int j = thread; j < Op::kBlockN; j += 128) Op::load_col(p, tile.j0 + j, scratch, j);

    float acc[kHalves][Op::kBlockN / 2];
    // The blocks of features of all tiles of the CTA are numbered consecutively, because the producer fills the stages
    // in that order. This consumer skips the blocks of the other one's tiles.
    const uint32_t step = static_cast<uint32_t>(k) * p.k_blocks;
    int stage = step % Op::kStages, last = 0;
    uint32_t parity = step / Op::kStages & 1;
    named_sync(turn, 256);
    hold(acc);
#pragma unroll 1
    for (int block = 0; block < p.k_blocks; ++block) {
      mbarrier_wait(&s.full[stage], parity);
      const uint32_t address = smem_address(s.stage[stage]);
      const uint64_t a = operand(address), b = operand(address + Smem<Op>::kImageBytes);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < kBlockK / 16; ++kk)
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
          wgmma<Op::kHalf>(acc[half], a + half * (64 * 128 / 16) + kk * 2, b + kk * 2, kk > 0 || block > 0);
      wgmma_commit();
      wgmma_wait<1>();
      // One group of products is still in flight, so only the stage before this one is free again
      if (block > 0 && lane < kCluster) mbarrier_arrive_in(&s.empty[last], lane);
      last = stage;
      if (++stage == Op::kStages) stage = 0, parity ^= 1;
    }
    if (k + 1 < count) named_arrive(other_turn, 256);
    wgmma_wait<0>();
    hold(acc);
    if (lane < kCluster) mbarrier_arrive_in(&s.empty[last], lane);

    const int64_t own = p.offset + tile.i0 - tile.j0;
    const bool excludes = (!Op::kLabels || p.exclude_self) && own > -kBlockM && own < Op::kBlockN;
    const int diagonal = excludes ? static_cast<int>(own) : kNone;
    const bool edge = tile.i0 + kBlockM > p.M || tile.j0 + Op::kBlockN > p.N;
    const bool masked = edge || excludes || (Op::kExact == Exact::on_repair && repairs(p));
    const Epilogue<Op> epilogue = {p, tile, at, diagonal, scratch, s.stores[mine], &weights_map, 3 + mine};
    if constexpr (Op::kExact == Exact::alone) {
      Op::finish_exact(acc, epilogue);
    } else if constexpr (Op::kRetries) {  // a warp whose fast path fails computes the tile again by the masked path
      if (masked || !Op::template finish<false>(acc, epilogue)) Op::template finish<true>(acc, epilogue);
    } else {
      if (!masked)
        Op::template finish<false>(acc, epilogue);
      else if constexpr (Op::kExact == Exact::on_repair)
        repairs(p) ? Op::finish_exact(acc, epilogue) : Op::template finish<true>(acc, epilogue);
      else
        Op::template finish<true>(acc, epilogue);
    }
  }
  if (Op::kStores && lane == 0) tma_store_wait_all();
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 1)
    tile_kernel(const __grid_constant__ CUtensorMap image_map, const __grid_constant__ CUtensorMap text_map,
                const __grid_constant__ CUtensorMap weights_map, const __grid_constant__ Params p) {
  if (Op::kSkipsRepairs && repairs(p)) return;
  if (Op::kExact == Exact::alone && !repairs(p)) return;
  unsigned char* raw = dynamic_smem();
  // With this alignment `s` has the same address in the shared memory of both CTAs of a cluster, which multicast needs
  Smem<Op>& s = *reinterpret_cast<Smem<Op>*>(raw + (1024 - smem_address(raw) % 1024) % 1024);
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), rank = cluster_rank();
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  const int count = (p.pairs - cluster + clusters - 1) / clusters;  // pairs cluster, cluster + clusters, ...

  if (threadIdx.x == 0) {
    for (int k = 0; k < Op::kStages; ++k) {
      mbarrier_init(&s.full[k], 1);              // one arrival, the producer's expect, and the bytes of all loads
      mbarrier_init(&s.empty[k], 4 * kCluster);  // the four consuming warps of both CTAs
    }
    mbarrier_init_fence();
  }
  if constexpr (Op::kFinds != kFindsNothing) find_constant(p, s);
  cluster_sync();
  if (group == 0) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Op>(p, s, image_map, text_map, cluster, clusters, count, rank);
  } else {
    take_registers<kConsumerRegisters>();
    consume<Op>(p, s, weights_map, cluster, clusters, count, rank, group - 1);
  }
  cluster_sync();  // the other CTA may still arrive on barriers here
}

}  // namespace fastclip
