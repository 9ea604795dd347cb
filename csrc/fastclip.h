/* The one C interface of fastclip's native code.
 *
 * Plain pointers, sizes, strides and error codes: no torch, no Python, no exceptions across it. The binding turns
 * codes into messages. Sizes: M images, N texts; i, j their indices. Strides and offsets count elements.
 */
#ifndef FASTCLIP_H
#define FASTCLIP_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fastclip_status {
  FASTCLIP_OK = 0,
  FASTCLIP_INVALID_ARGUMENT = 1,
  FASTCLIP_OUT_OF_MEMORY = 2,
  FASTCLIP_UNSUPPORTED_ISA = 3,
  FASTCLIP_NO_DRIVER = 4,     /* no NVIDIA driver, or one that is too old for this build */
  FASTCLIP_FAILED = 5,        /* the standard library raised something else than a lack of memory */
  FASTCLIP_CUDA_ERROR = 1000, /* and above: FASTCLIP_CUDA_ERROR + cudaError_t */
} fastclip_status;

/* A block of the M_all x N_all logits, at row i0 and column j0, as dot products <I_i, T_j> in fp32. */
typedef struct fastclip_block {
  float* dot;         /* (M, N), rows `row_stride` apart */
  int64_t row_stride; /* >= N */
  int64_t M, N;       /* size of the block */
  int64_t i0, j0;     /* its first row and column in the whole problem: every array below is indexed from them */
  int64_t offset;     /* row i's own column is i + offset: without labels its one positive */
  int exclude_self;   /* with labels: a row's own column is neither a positive nor a negative */
} fastclip_block;

/* One side of the forward problem, images (M_all) or texts (N_all).
 * z_ij = dot_ij (image.factor_i + image.factor_low_i) text.factor_j.
 * The running sums are read and updated, and start at 0; log2-sum-exp2 = max + log2(sum). */
typedef struct fastclip_fwd_side {
  const float* factor;     /* inverse norm; images: also scale and log2(e), so that z comes out in units of log 2 */
  const float* factor_low; /* images: what rounding took from factor. Texts: NULL */
  const int32_t* label;    /* NULL on both sides when there are no labels */
  double* neg_max;         /* over the negatives */
  double* neg_sum;
  double* pos;     /* sum of z over the positives, in units of log 2 */
  double* pos_max; /* over the positives; NULL without labels */
  double* pos_sum;
  float* neg_top; /* largest z over the negatives, in units of log 2, starting at -inf; NULL when not wanted */
  float* pos_top; /* over the positives; NULL when not wanted, and without labels, where it is pos */
} fastclip_fwd_side;

/* One side of the backward problem. A log2-sum-exp2 of -inf says that the set is empty. */
typedef struct fastclip_bwd_side {
  const float* factor;     /* as in the forward */
  const float* factor_low; /* as in the forward */
  const float* inv_norm;   /* what multiplies the feature, 1 when not normalised */
  const int32_t* label;    /* NULL on both sides when there are no labels */
  const float* neg;        /* log2-sum-exp2 over the negatives */
  const float* d_neg;      /* dL/d neg in natural units */
  const float* d_pos;      /* dL/d pos */
  const float* pos_lse;    /* log2-sum-exp2 over the positives; NULL without labels */
  const float* d_pos_lse;  /* NULL without labels */
} fastclip_bwd_side;

typedef struct fastclip_sigmoid_sums {
  double loss;    /* sum_ij softplus(z_ij), of -z_ij at the positives */
  double d_scale; /* sum_ij r_i G_ij c_j dot_ij */
  double d_bias;  /* sum_ij G_ij */
} fastclip_sigmoid_sums;

/* Fold one block into the running statistics of both sides. Reads the block, does not change it. */
int fastclip_cpu_contrastive_fwd(const fastclip_block* block, const fastclip_fwd_side* image,
                                 const fastclip_fwd_side* text, int num_threads);

/* Overwrite one block of dot products with r_i G_ij c_j, and set *d_scale to sum_ij r_i G_ij c_j dot_ij. */
int fastclip_cpu_contrastive_bwd(const fastclip_block* block, const fastclip_bwd_side* image,
                                 const fastclip_bwd_side* text, double* d_scale, int num_threads);

/* Add one block of the sigmoid loss to *sums, z_ij = dot_ij scale r_i c_j + bias. The positive of row i is column
 * i + offset. With `gradients` the block is overwritten with r_i G_ij c_j, G = d loss / d z; without, it is left as it
 * is and only sums->loss counts. image_inv_norm, text_inv_norm: r and c; NULL on both sides for ones. */
int fastclip_cpu_sigmoid_fwd(const fastclip_block* block, const float* image_inv_norm, const float* text_inv_norm,
                             double scale, float bias, int gradients, fastclip_sigmoid_sums* sums, int num_threads);

/* Inverse norms 1 / max(norm, 1e-12) of the rows of x (M, D), summed in fp64, rounded once.
 *
 * With `outer`, for products of rows in fp32: a row whose norm exceeds 2^40, whose products could overflow, gets
 * inv_norm 1 and outer its inverse norm: multiply it by outer before it is used. Other rows get outer 1. *large is the
 * number of such rows; 0 without `outer`. */
int fastclip_cpu_norms(const float* x, int64_t row_stride, int64_t M, int64_t D, float* inv_norm, float* outer,
                       int64_t* large, int num_threads);

/* Overwrite products raw (M, D) with gradients of the features x (M, D):
 * factor outer_i (raw_i - inv_norm_i^2 <raw_i, x_i> x_i), without the projection where the norm was clamped.
 * inv_norm: NULL where the features are not normalised; outer: NULL for ones. */
int fastclip_cpu_finish(float* raw, int64_t raw_stride, const float* x, int64_t x_stride, int64_t M, int64_t D,
                        const float* inv_norm, const float* outer, float factor, int num_threads);

/* ---- The mean loss without labels of N images and N texts, pair i its own positive ----
 *
 * saved: FASTCLIP_LOSS_HEADER + N FASTCLIP_LOSS_ROW doubles, what the forward leaves for the backward. Behind the
 * header lie inv_norm and outer of the images, then of the texts, N floats each: what fastclip_cpu_norms has written
 * before the first block. Without `normalize` they need not be. */
enum { FASTCLIP_LOSS_HEADER = 4, FASTCLIP_LOSS_ROW = 12 };

typedef struct fastclip_loss {
  int64_t N;
  int normalize;
  double scale;
  double image_weight; /* of the mean over images; the mean over texts has the rest */
  double* saved;
} fastclip_loss;

/* Fold one block in; blocks come in order of i0, then of j0. *value, the loss, is set with the last one. */
int fastclip_cpu_loss_fwd(const fastclip_loss* loss, const fastclip_block* block, double* value, int num_threads);

/* Overwrite one block of dot products with gain r_i G_ij c_j, and set *d_scale to sum_ij r_i G_ij c_j dot_ij. */
int fastclip_cpu_loss_bwd(const fastclip_loss* loss, const fastclip_block* block, double* d_scale, int num_threads);

/* What multiplies the products of the weights and the features, scale / gain, and whether some outer is not 1. The gain
 * is the power of two that keeps the weights of a solved batch, 1e-30 and less, from becoming subnormal numbers. */
double fastclip_cpu_loss_factor(const fastclip_loss* loss, int* large);

/* "avx512", "avx2" or "portable"; "auto" picks the best that this processor runs. Applies to the whole process. */
int fastclip_cpu_select_isa(const char* name);
const char* fastclip_cpu_isa(void);

/* "borrowed": threads of the OpenMP runtime that the process has loaded (the default); "pool": threads of our own, also
 * where no such runtime is found and after fork. Applies to the whole process; results are the same. */
int fastclip_cpu_select_threads(const char* name);
const char* fastclip_cpu_threads(void);

/* ---- Hopper (sm_90a): every pointer below is a device pointer ----
 *
 * Nothing synchronises, prints or allocates: all calls can be captured in a CUDA graph. They start on `stream` of the
 * current device. */

typedef enum fastclip_dtype { FASTCLIP_BF16 = 0, FASTCLIP_FP16 = 1 } fastclip_dtype;

/* What the device decides about a problem, floats: the same numbers as in triton_kernels/tile.py. */
enum {
  FASTCLIP_SCALE = 0,
  FASTCLIP_OFFSET2 = 2, /* subtracted from every exponent, in units of log 2 */
  FASTCLIP_REPAIR = 3,  /* not 0: the one offset does not serve; the weights' kernel returns at once */
  FASTCLIP_GAIN = 4,    /* a power of two in the stored weights */
};

/* A block of logits z_ij = scale r_i c_j <I_i, T_j>; r, c: `factor` of the sides below. */
typedef struct fastclip_cuda_block {
  const void *image, *text;                  /* (M, D), (N, D), of `dtype`, aligned to 16 bytes */
  int64_t image_row_stride, text_row_stride; /* multiples of 8 */
  int64_t M, N, D;
  int64_t offset;   /* row i's own column is i + offset */
  int exclude_self; /* with labels: a row's own column is neither a positive nor a negative */
  int dtype;        /* fastclip_dtype */
  int tile_n;       /* FASTCLIP_CUDA_TILE_N..., or FASTCLIP_CUDA_TILE_N_SMALL for problems that have few tiles */
  int processors;   /* multiprocessors of the device */
  const float* constants;
  void* stream;
} fastclip_cuda_block;

/* One side of the forward problem, images or texts (their size is M or N, the other one's tiles across).
 * Planes of `part`: sums of 2^(log2(e) z - offset2) over the negatives; with labels, over the positives; and of
 * log2(e) z over the positives. Every slot is written. */
typedef struct fastclip_cuda_fwd_side {
  const float* factor;  /* (size,) */
  const int32_t* label; /* (size,); NULL on both sides when there are no labels */
  float* part;          /* (1 or 3, tiles across, size) */
} fastclip_cuda_fwd_side;

/* One side of the backward problem, each (size,). */
typedef struct fastclip_cuda_bwd_side {
  const float* factor;
  const float* neg;     /* what multiplies a negative's 2^(log2(e) z - offset2), gain included */
  const int32_t* label; /* NULL on both sides when there are no labels, as the next two */
  const float* pos;     /* the same of a positive */
  const float* own;     /* and what is added to it */
} fastclip_cuda_bwd_side;

/* Rows and columns of a tile: rows have ceil(N / tile_n) partial sums, columns ceil(M / FASTCLIP_CUDA_TILE_M). */
enum {
  FASTCLIP_CUDA_TILE_M = 128,
  FASTCLIP_CUDA_TILE_N = 192,
  FASTCLIP_CUDA_TILE_N_LABELS = 128, /* of the forward problem with labels */
  FASTCLIP_CUDA_TILE_N_SMALL = 64,
};

/* Partial sums of one exponential a logit. */
int fastclip_cuda_contrastive_fwd(const fastclip_cuda_block* block, const fastclip_cuda_fwd_side* image,
                                  const fastclip_cuda_fwd_side* text);

/* weights (M, N) = gain r_i G_ij c_j in the features' dtype, 0 at the own pairs when there are no labels;
 * scale_part (tiles,) = sum_ij gain r_i G_ij c_j <I_i, T_j> of every tile, from the unrounded weights.
 * weights: aligned to 16 bytes, weights_row_stride a multiple of 8 from N on; what lies between column N and the next
 * multiple of 8 becomes 0. */
int fastclip_cuda_contrastive_bwd(const fastclip_cuda_block* block, const fastclip_cuda_bwd_side* image,
                                  const fastclip_cuda_bwd_side* text, void* weights, int64_t weights_row_stride,
                                  float* scale_part);

/* The sigmoid loss's pairs but the own ones: part (3, part_row_stride) gets loss, gain d_scale and d_bias of every
 * tile, weights (M, N) the weights; both of the latter only with `gradients`. */
int fastclip_cuda_sigmoid_fwd(const fastclip_cuda_block* block, const float* image_factor, const float* text_factor,
                              const float* bias, int gradients, void* weights, int64_t weights_row_stride, double* part,
                              int64_t part_row_stride);

/* ---- The plain case: N images and as many texts, no labels, the mean of both directions ----
 *
 * Two calls a step and the products of the weights between them: forward; then, of every chunk of rows (one, unless
 * the weights exceed the workspace), the weights of its blocks of columns and the finish. Sizes are those of
 * fastclip_cuda_loss_plan. */
typedef struct fastclip_cuda_loss {
  const void *image, *text;                  /* (N, D), features next to each other */
  int64_t image_row_stride, text_row_stride; /* any */
  void *image_rows, *text_rows;              /* (N, D) as the products read them: aligned to 16 bytes, rows apart by */
  int64_t image_rows_stride, text_rows_stride; /* multiples of 8; the very features, or room for copies, of both sides
                                                  where D is no multiple of 8 and for normalised fp16 */
  int64_t N, D;
  int dtype; /* fastclip_dtype */
  int normalize;
  const float* scale;
  double image_weight; /* of the images' direction; the texts' has the rest */
  int64_t workspace;   /* bytes of partial sums, and of weights */
  int processors;      /* multiprocessors of the device */
  int device;          /* its number; negative: the current one */
  void* stream;
} fastclip_cuda_loss;

typedef struct fastclip_cuda_loss_sizes {
  int64_t saved, work; /* bytes: what the forward hands to the backward, and its workspace */
  int64_t rows;        /* of the logits in a chunk of weights */
  int64_t chunks;
  int64_t stride;  /* elements from one row of weights to the next */
  int64_t extra;   /* rows of weights behind the chunk's that the backward's workspace takes */
  int64_t sigmoid; /* bytes before the weights in the sigmoid loss's workspace */
  int64_t columns; /* of the logits in a block of a chunk: N, unless the workspace holds too few rows of so many */
} fastclip_cuda_loss_sizes;

int fastclip_cuda_loss_plan(int64_t N, int64_t D, int64_t workspace, int processors, fastclip_cuda_loss_sizes* sizes);

/* loss: one float. saved and work: aligned to 128 bytes. */
int fastclip_cuda_loss_forward(const fastclip_cuda_loss* p, void* saved, void* work, float* loss);

/* Weights (rows, columns) of a chunk from `column` on, a multiple of `columns`: gain r_i G_ij c_j for a loss with
 * derivative 1, 0 at the own pairs; `weights` has room for rows + extra, and all blocks share it. */
int fastclip_cuda_loss_weights(const fastclip_cuda_loss* p, const void* saved, void* weights, int64_t chunk,
                               int64_t column);

/* From raw_image (rows, D to the next multiple of 8) = weights texts of this chunk and, read with the last chunk,
 * raw_text (N, ...) = sum over the chunks of weights^T images: the gradients, times *upstream. NULL: not wanted. */
int fastclip_cuda_loss_finish(const fastclip_cuda_loss* p, const void* saved, void* weights, int64_t chunk,
                              const float* upstream, const float* raw_image, const float* raw_text, void* d_image,
                              void* d_text, float* d_scale);

/* ---- The sigmoid loss of N images and as many texts, row k of both a pair ----
 *
 * Sizes are those of fastclip_cuda_loss_plan; a problem's image_weight is not read. Loss and gradients are computed
 * together: weights, their products with the features, and finish, of every chunk of rows. All share `work`, aligned to
 * 128 bytes: `sigmoid` bytes, and with gradients the chunk's weights (rows, stride) in the features' dtype, raw_image
 * (rows, D to the next multiple of 8) and raw_text (N, ...) in fp32: as fastclip_cuda_loss_finish reads them. */

/* Weights of a chunk from `column` on, as fastclip_cuda_sigmoid_fwd; the first call starts with the norms. */
int fastclip_cuda_sigmoid_weights(const fastclip_cuda_loss* p, const float* bias, void* work, int64_t chunk,
                                  int64_t column, int gradients);

/* Gradients / divisor, NULL: not wanted; d_image and d_text (N, D) of fp16 features in fp32. With the last chunk also
 * those by scale and bias, side by side, and the loss, a float, or a double when it is `wide`. */
int fastclip_cuda_sigmoid_finish(const fastclip_cuda_loss* p, const float* bias, void* work, int64_t chunk,
                                 double divisor, void* loss, int wide, void* d_image, void* d_text, float* d_scalars);

/* Gradients that a forward kept, in fp32 for fp16 features, times *upstream. NULL: not wanted. */
typedef struct fastclip_cuda_factors {
  const float* upstream;
  const void *kept_image, *kept_text;
  const float *kept_scale, *kept_bias;
  void *d_image, *d_text; /* of `dtype` */
  float *d_scale, *d_bias;
  int64_t image_count, text_count; /* elements, next to each other */
  int dtype;                       /* fastclip_dtype */
  int device;                      /* its number; negative: the current one */
  void* stream;
} fastclip_cuda_factors;
int fastclip_cuda_sigmoid_bwd(const fastclip_cuda_factors* p);

/* The version of CUDA that the driver serves, 1000 major + 10 minor; 0 where there is none. And what this was built
 * with. */
int fastclip_cuda_driver(void);
int fastclip_cuda_runtime(void);

/* The name of a status from FASTCLIP_CUDA_ERROR on. */
const char* fastclip_cuda_error_name(int status);

#ifdef __cplusplus
}
#endif

#endif /* FASTCLIP_H */
