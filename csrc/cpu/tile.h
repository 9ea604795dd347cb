// What a tile of logits and some rows of features are, and the functions that each instruction set provides for them.
#pragma once

#include <cstdint>

namespace fastclip {

constexpr int64_t kTileM = 64;   // rows of a tile: bounds the length of its fp32 column sums
constexpr int64_t kTileN = 512;  // columns: their maxima, sums and factors stay in the first-level cache

constexpr double kSmallestNorm = 1e-12;  // a norm is at least this, as in torch.nn.functional.normalize

// A tile of at most kTileM x kTileN logits. Pointers are at its first row and column.
struct Tile {
  float* dot;
  int64_t row_stride;
  int64_t M, N;
  int64_t own;        // the column, in the tile, of row 0's own pair; it may lie outside
  bool exclude_self;  // with labels: own pairs are neither positives nor negatives
};

struct LogSum {  // log2-sum-exp2 of a set of z = max + log2(sum); sum = 0 where the set is empty
  float* max;
  float* sum;
};

struct FwdSide {
  const float* factor;
  const float* factor_low;
  const int32_t* label;
  LogSum neg;
  LogSum pos;      // with labels
  double* pos_z;   // sum of z over the positives
  float* neg_top;  // largest z over the negatives, -inf where there are none; or null
  float* pos_top;  // with labels
};

struct BwdSide {  // as fastclip_bwd_side
  const float* factor;
  const float* factor_low;
  const float* inv_norm;
  const int32_t* label;
  const float* neg;
  const float* d_neg;
  const float* d_pos;
  const float* pos_lse;
  const float* d_pos_lse;
};

struct SigmoidSide {
  const float* factor;      // inverse norm; images: also scale
  const float* factor_low;  // images: what rounding took from factor
  const float* inv_norm;    // what multiplies the feature, 1 when not normalised
};

struct SigmoidSums {
  double loss = 0.0, d_scale = 0.0, d_bias = 0.0;
};

struct Rows {  // (M, D) features
  const float* x;
  int64_t x_stride;
  int64_t M, D;
};

struct Finish {  // of products' rows
  float* raw;
  int64_t raw_stride;
  const float* inv_norm;  // or null: the features are not normalised
  const float* outer;     // or null
  float factor;
};

struct TileKernels {
  const char* name;
  void (*fwd)(const Tile&, const FwdSide& image, const FwdSide& text);
  double (*bwd)(const Tile&, const BwdSide& image, const BwdSide& text);  // returns the tile's part of d_scale
  SigmoidSums (*sigmoid)(const Tile&, const SigmoidSide& image, const SigmoidSide& text, float bias, bool gradients);
  void (*norms)(const Rows&, double* out);
  void (*finish)(const Rows&, const Finish&);
};

extern const TileKernels kTilePortable;
#ifdef FASTCLIP_X86
extern const TileKernels kTileAvx2;
extern const TileKernels kTileAvx512;
#endif

}  // namespace fastclip
