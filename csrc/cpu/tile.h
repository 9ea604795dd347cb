// A tile of logits, rows of features, and the functions that each instruction set provides for them.
#pragma once

#include <cstdint>

namespace fastclip {

constexpr int64_t kTileM = 64;   // rows of a tile, few because columns are summed over them in fp32
constexpr int64_t kTileN = 512;  // columns of a tile, whose maxima, sums and factors stay in the first-level cache

constexpr double kSmallestNorm = 1e-12;  // a norm is at least this, as in torch.nn.functional.normalize

// A tile of at most kTileM x kTileN logits. Pointers point to its first row and column.
struct Tile {
  float* dot;
  int64_t row_stride;
  int64_t M, N;
  int64_t own;         // column of the tile in which row 0 meets the diagonal, possibly outside the tile
  bool exclude_self;   // with labels: pairs on the diagonal are neither positives nor negatives
  const float* other;  // dot products of other features, rows `row_stride` apart, or null
};

struct LogSum {  // log2-sum-exp2 of a set of z is max + log2(sum); sum = 0 if the set is empty
  float* max;
  float* sum;
  float* other;  // sum of 2^(z - max) times the cosine of the other features; null if there are none
};

struct FwdSide {
  const float* factor;
  const float* factor_low;
  const int32_t* label;
  const float* limit;
  LogSum neg;
  LogSum pos;                 // with labels
  double* pos_z;              // sum of z over the positives
  float* neg_top;             // largest z over the negatives, -inf if there are none; null if it is not needed
  float* pos_top;             // the same over the positives, with labels
  const float* other_factor;  // turns dot products of the other features into cosines
};

struct BwdSide {  // see fastclip_bwd_side
  const float* factor;
  const float* factor_low;
  const float* inv_norm;
  const int32_t* label;
  const float* limit;
  const float* neg;
  const float* d_neg;
  const float* d_pos;
  const float* pos_lse;
  const float* d_pos_lse;
};

struct SigmoidSide {
  const float* factor;      // inverse norm, for images times scale
  const float* factor_low;  // images: rounding error of factor
  const float* inv_norm;    // r_i or c_j, 1 if the features are not normalised
  const int32_t* label;     // null without labels
  const float* limit;       // null without limits, which do not include the bias
};

struct SigmoidSums {
  double loss = 0.0, d_scale = 0.0, d_bias = 0.0;
};

struct DirectionSide {      // images are the rows whose losses are computed
  const float* factor;      // inverse norm, for images times scale log2(e)
  const float* factor_low;  // images: rounding error of factor
  const float* inv_norm;    // images: r_i, 1 if the features are not normalised
  const int32_t* label;     // null without labels
  const int64_t* count;     // images with labels: number of positives
};

struct DirectionSums {
  double loss = 0.0, d_scale = 0.0;
};

struct Rows {  // (M, D) features
  const float* x;
  int64_t x_stride;
  int64_t M, D;
};

struct Finish {  // from rows of products to gradients
  float* raw;
  int64_t raw_stride;
  const float* inv_norm;  // null if the features are not normalised
  const float* outer;     // outer factors, see fastclip_cpu_norms; null if all are 1
  float factor;
};

struct TileKernels {
  const char* name;
  void (*fwd)(const Tile&, const FwdSide& image, const FwdSide& text);
  double (*bwd)(const Tile&, const BwdSide& image, const BwdSide& text);  // returns the tile's part of d_scale
  SigmoidSums (*sigmoid)(const Tile&, const SigmoidSide& image, const SigmoidSide& text, float bias, bool gradients);
  // A tile of whole rows, of any width. row_factor: one number per row; null if no gradient is needed.
  DirectionSums (*direction)(const Tile&, const DirectionSide& image, const DirectionSide& text, float* row_factor);
  void (*norms)(const Rows&, double* out);
  void (*finish)(const Rows&, const Finish&);
};

extern const TileKernels kTilePortable;
#ifdef FASTCLIP_X86
extern const TileKernels kTileAvx2;
extern const TileKernels kTileAvx512;
#endif

}  // namespace fastclip
