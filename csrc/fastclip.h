/* The C interface of fastclip's native code.
 *
 * It consists of plain pointers, sizes, strides and error codes. No torch, no Python and no exception crosses it. The
 * binding turns error codes into messages. Strides count elements. Functions that return int return a fastclip_status,
 * unless their comment says otherwise.
 *
 * There are M images and N texts with D features; i and j are the indices of an image (a row of the logits) and of a
 * text (a column). docs/mathematics.md has the formulas behind these symbols:
 *
 *   r_i, c_j  inverse norms of the images and of the texts, 1 if the features are not normalised
 *   z_ij      logit, scale r_i c_j <image_i, text_j>. z in units of log 2 is log2(e) times this number
 *   neg, pos  of a row or column: log-sum-exp over its negatives, and sum of z over its positives
 *   G_ij      derivative of the loss with respect to z_ij. The weight of a logit is r_i G_ij c_j
 *   gain      power of two that weights are multiplied by, so that they do not flush to zero. It is divided out later
 *   d_scale   derivative of the loss with respect to the scale, sum_ij r_i G_ij c_j <image_i, text_j>
 *   c         number that is subtracted from every logit before the exponential. c2 = log2(e) c
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
  FASTCLIP_NO_DRIVER = 4, /* there is no NVIDIA driver, or it is too old for this build */
  FASTCLIP_FAILED = 5,    /* the standard library threw an exception other than bad_alloc */
  FASTCLIP_UNSUPPORTED_SIZE = 6,
  FASTCLIP_CUDA_ERROR = 1000, /* FASTCLIP_CUDA_ERROR + e stands for the cudaError_t e */
} fastclip_status;

/* A block of the logits of all M_all images and N_all texts, as fp32 dot products <image_i, text_j>. */
typedef struct fastclip_block {
  float* dot;         /* (M, N), rows `row_stride` apart */
  int64_t row_stride; /* >= N */
  int64_t M, N;       /* size of the block */
  int64_t i0, j0;     /* first row and column of the block. The arrays of the sides below cover all rows and columns */
  int64_t offset;     /* row i of all rows meets the diagonal in column i + offset, its only positive without labels */
  int exclude_self;   /* with labels: pairs on the diagonal are neither positives nor negatives */
  const float* other; /* forward problem without labels: dot products of other features of the same images and texts,
                       * placed like `dot`; NULL if there are none */
} fastclip_block;

/* One side of the forward problem: images (arrays of M_all numbers) or texts (N_all).
 *
 * z_ij = dot_ij (image.factor_i + image.factor_low_i) text.factor_j, in units of log 2.
 * Every call reads the statistics, from neg_max on, and updates them. Before the first block the caller sets neg_top
 * and pos_top to -inf and the others to 0. A log2-sum-exp2 is kept in two numbers, log2 sum 2^z = max + log2(sum).
 *
 * With other dot products, neg_other is the sum of 2^(z - neg_max) other_ij image.other_factor_i text.other_factor_j
 * over the negatives. */
typedef struct fastclip_fwd_side {
  const float* factor;     /* texts: c_j. Images: r_i scale log2(e) */
  const float* factor_low; /* images: rounding error of factor. Texts: NULL */
  const int32_t* label;    /* NULL on both sides when there are no labels */
  const float* limit;      /* largest z that counts as a negative of this side; NULL on both sides without limits */
  double* neg_max;         /* log2-sum-exp2 over the negatives */
  double* neg_sum;
  double* pos;     /* sum of z over the positives */
  double* pos_max; /* log2-sum-exp2 over the positives; NULL without labels */
  double* pos_sum;
  float* neg_top; /* largest z over the negatives; NULL if it is not needed */
  float* pos_top; /* largest z over the positives; NULL if it is not needed, and without labels, where it equals pos */
  const float* other_factor; /* this and neg_other: NULL unless the block has other dot products */
  double* neg_other;
} fastclip_fwd_side;

/* One side of the backward problem. A log2-sum-exp2 of -inf means that the set is empty. The derivatives d_... of the
 * loss L are with respect to statistics in natural units. */
typedef struct fastclip_bwd_side {
  const float* factor;     /* as in the forward problem */
  const float* factor_low; /* as in the forward problem */
  const float* inv_norm;   /* r_i or c_j */
  const int32_t* label;    /* NULL on both sides when there are no labels */
  const float* limit;      /* as in the forward problem */
  const float* neg;        /* log2-sum-exp2 over the negatives */
  const float* d_neg;      /* dL / d neg */
  const float* d_pos;      /* dL / d (sum of z over the positives) */
  const float* pos_lse;    /* log2-sum-exp2 over the positives; NULL without labels */
  const float* d_pos_lse;  /* dL / d pos_lse; NULL without labels */
} fastclip_bwd_side;

typedef struct fastclip_sigmoid {
  const float *image_inv_norm, *text_inv_norm; /* all r_i and all c_j; both are NULL if these are 1 */
  double scale;
  float bias;
  const int32_t *image_label, *text_label; /* NULL on both sides when there are no labels */
  /* A negative is left out if its z - bias exceeds the limit of its image or of its text. NULL on both sides if there
   * are no limits. */
  const float *image_limit, *text_limit;
} fastclip_sigmoid;

typedef struct fastclip_sigmoid_sums {
  double loss;    /* sum_ij softplus(x_ij), where x_ij is -z_ij at the positives and z_ij at the negatives */
  double d_scale; /* sum_ij r_i G_ij c_j dot_ij */
  double d_bias;  /* sum_ij G_ij */
} fastclip_sigmoid_sums;

/* Add one block to the statistics of both sides. The block is not changed. */
int fastclip_cpu_contrastive_fwd(const fastclip_block* block, const fastclip_fwd_side* image,
                                 const fastclip_fwd_side* text, int num_threads);

/* Overwrite one block of dot products with r_i G_ij c_j, and set *d_scale to sum_ij r_i G_ij c_j dot_ij. */
int fastclip_cpu_contrastive_bwd(const fastclip_block* block, const fastclip_bwd_side* image,
                                 const fastclip_bwd_side* text, double* d_scale, int num_threads);

/* Add one block of the sigmoid loss to *sums, with z_ij = dot_ij scale r_i c_j + bias in natural units. Without labels
 * the positive of row i is column i + offset. With `gradients` the block is overwritten with r_i G_ij c_j, which is 0
 * for pairs that are left out. Otherwise the block is not changed and only sums->loss is valid. */
int fastclip_cpu_sigmoid_fwd(const fastclip_block* block, const fastclip_sigmoid* sigmoid, int gradients,
                             fastclip_sigmoid_sums* sums, int num_threads);

/* The loss of the rows alone, image -> text. */
typedef struct fastclip_direction {
  const float *image_inv_norm, *text_inv_norm; /* all r_i and all c_j; both are NULL if these are 1 */
  double scale;
  const int32_t *image_label, *text_label; /* NULL on both sides when there are no labels */
  const int64_t* count;                    /* number of positives of every image; NULL without labels */
  float* row_factor;                       /* (M,) of the block; NULL if no gradient is needed */
} fastclip_direction;

typedef struct fastclip_direction_sums {
  double loss;    /* sum of the losses of the rows; with labels, that of a row without a positive is 0 */
  double d_scale; /* sum_ij r_i G_ij c_j dot_ij, where G_ij is the derivative of that sum */
} fastclip_direction_sums;

/* Add the loss of a block of whole rows (j0 is 0, and N counts all texts) to *sums. With `row_factor` the block is
 * overwritten with r_i G_ij c_j / row_factor_i. Otherwise it is not changed and only sums->loss is valid. */
int fastclip_cpu_direction(const fastclip_block* block, const fastclip_direction* direction,
                           fastclip_direction_sums* sums, int num_threads);

/* Compute the inverse norms 1 / max(norm, 1e-12) of the rows of x (M, D), summed in fp64 and rounded once.
 *
 * Products of rows with norms above 2^40 could overflow in fp32. If `outer` is not NULL, such a row gets inv_norm 1,
 * and its inverse norm is stored in outer: the caller multiplies the row by outer before using it. All other rows get
 * outer 1. *large is set to the number of rows that have such a norm, or to 0 if `outer` is NULL. */
int fastclip_cpu_norms(const float* x, int64_t row_stride, int64_t M, int64_t D, float* inv_norm, float* outer,
                       int64_t* large, int num_threads);

/* Overwrite raw (M, D), the products of the weights and the other side's features, with gradients of the features x
 * (M, D): factor outer_i (raw_i - inv_norm_i^2 <raw_i, x_i> x_i). The second term is left out if the norm was below
 * 1e-12. inv_norm: NULL if the features are not normalised, which leaves out the second term too. outer: NULL if all
 * are 1. */
int fastclip_cpu_finish(float* raw, int64_t raw_stride, const float* x, int64_t x_stride, int64_t M, int64_t D,
                        const float* inv_norm, const float* outer, float factor, int num_threads);

/* ---- The plain case: the mean loss of N images and N texts without labels, where image i and text i are a pair ----
 *
 * saved: FASTCLIP_LOSS_HEADER + N FASTCLIP_LOSS_ROW doubles, which the forward fills for the backward. After the header
 * come inv_norm and outer of the images, then of the texts, N floats each. With `normalize` the caller lets
 * fastclip_cpu_norms write these before the first block. */
enum { FASTCLIP_LOSS_HEADER = 4, FASTCLIP_LOSS_ROW = 12 };

typedef struct fastclip_loss {
  int64_t N;
  int normalize;
  double scale;
  double image_weight; /* weight of the mean over images; the mean over texts has 1 - image_weight */
  double* saved;
} fastclip_loss;

/* Add one block to `saved`. Blocks must come in order of i0, then of j0. The call with the last block sets *value to
 * the loss. */
int fastclip_cpu_loss_fwd(const fastclip_loss* loss, const fastclip_block* block, double* value, int num_threads);

/* Overwrite one block of dot products with gain r_i G_ij c_j, and set *d_scale to sum_ij r_i G_ij c_j dot_ij. */
int fastclip_cpu_loss_bwd(const fastclip_loss* loss, const fastclip_block* block, double* d_scale, int num_threads);

/* Return scale / gain, which the products of weights and features must be multiplied by (`factor` of
 * fastclip_cpu_finish). *large is set to 1 if any outer factor is not 1, else to 0. The gain keeps the weights of a
 * solved batch (1e-30 and less) from becoming subnormal. */
double fastclip_cpu_loss_factor(const fastclip_loss* loss, int* large);

/* Select the instruction set of the CPU kernels: "avx512", "avx2" or "portable". "auto" selects the best that this
 * processor supports. The choice applies to the whole process. fastclip_cpu_isa returns the selected name. */
int fastclip_cpu_select_isa(const char* name);
const char* fastclip_cpu_isa(void);

/* Select the threads of the CPU kernels: "borrowed" (the default) uses those of the OpenMP runtime that the process has
 * loaded, "pool" uses threads that fastclip starts. The pool is also used if no OpenMP runtime is found, and after
 * fork. The choice applies to the whole process. Results do not depend on it. fastclip_cpu_threads returns the name of
 * the kind that is in use. */
int fastclip_cpu_select_threads(const char* name);
const char* fastclip_cpu_threads(void);

/* Resize an image of 4 bytes per pixel to `out_width` x `out_height` pixels, which are written without gaps, with the
 * bicubic (`cubic`) or the bilinear filter. The rows of the input are `in_stride` bytes apart. If `columns_first`
 * follows Pillow's choice of the first pass, the result has the same bits as Pillow's Image.resize.
 * FASTCLIP_UNSUPPORTED_ISA means that the instruction set is "portable", FASTCLIP_UNSUPPORTED_SIZE that a side of the
 * input is shorter than the filter. */
int fastclip_cpu_resize(const uint8_t* in, int64_t in_stride, int64_t in_width, int64_t in_height, uint8_t* out,
                        int64_t out_width, int64_t out_height, int cubic, int columns_first);

/* ---- Hopper (sm_90a): pointers to features, vectors and results are device pointers, those to structs are not ----
 *
 * The calls do not synchronise, print or allocate, so they can be captured in a CUDA graph. They launch on `stream`,
 * and on the current device unless the struct names another. */

typedef enum fastclip_dtype { FASTCLIP_BF16 = 0, FASTCLIP_FP16 = 1 } fastclip_dtype;

/* Indices of the constants of a problem, floats that the device computes. They are the same as in
 * triton_kernels/tile.py, whose index 1 (a bound of the logits) these kernels do not use.
 *
 * FASTCLIP_REPAIR is not 0 if terms of a sum flushed to zero because c is too far above them. A repair then replaces
 * the statistics, and the fast kernel of the weights returns at once. */
enum {
  FASTCLIP_SCALE = 0,
  FASTCLIP_OFFSET2 = 2, /* c2 */
  FASTCLIP_REPAIR = 3,
  FASTCLIP_GAIN = 4, /* gain of the stored weights */
};

/* A block of logits z_ij = scale r_i c_j <image_i, text_j>, where r_i and c_j are the numbers in `factor` of the sides
 * below. M, N, i and j are those of the block. */
typedef struct fastclip_cuda_block {
  const void *image, *text;                  /* (M, D), (N, D), of `dtype`, aligned to 16 bytes */
  int64_t image_row_stride, text_row_stride; /* multiples of 8 */
  int64_t M, N, D;
  int64_t offset;         /* row i meets the diagonal in column i + offset */
  int exclude_self;       /* with labels: pairs on the diagonal are neither positives nor negatives */
  int dtype;              /* fastclip_dtype */
  int tile_n;             /* one of FASTCLIP_CUDA_TILE_N... below; the small one is for problems with few tiles */
  int processors;         /* multiprocessors of the device */
  const float* constants; /* see above */
  void* stream;
} fastclip_cuda_block;

/* One side of the forward problem: images (size M) or texts (size N). "Tiles across" are the other side's tiles.
 * Planes of `part`: the sum of 2^(log2(e) z - c2) over the negatives; with labels also the same sum over the positives,
 * and the sum of log2(e) z over the positives. Every element is written. */
typedef struct fastclip_cuda_fwd_side {
  const float* factor;  /* (size,) */
  const int32_t* label; /* (size,); NULL on both sides when there are no labels */
  float* part;          /* (1 or 3, tiles across, size) */
} fastclip_cuda_fwd_side;

/* One side of the backward problem. Every vector is (size,). With E = exp(z - c), gain G is E times the sum of `neg` of
 * the row and of the column at a negative, and E times the sum of `pos`, plus the sum of `own`, at a positive. */
typedef struct fastclip_cuda_bwd_side {
  const float* factor;
  const float* neg;     /* gain dL / d lse exp(c - lse), where lse is the log-sum-exp over the negatives */
  const int32_t* label; /* NULL on both sides without labels, like the next two */
  const float* pos;     /* the same for the log-sum-exp over the positives */
  const float* own;     /* gain dL / d (sum of z over the positives) */
} fastclip_cuda_bwd_side;

/* Rows (M) and columns (N) of a tile. A row of the block has ceil(N / tile_n) partial sums, a column has
 * ceil(M / FASTCLIP_CUDA_TILE_M). */
enum {
  FASTCLIP_CUDA_TILE_M = 128,
  FASTCLIP_CUDA_TILE_N = 192,
  FASTCLIP_CUDA_TILE_N_LABELS = 128, /* for the forward problem with labels */
  FASTCLIP_CUDA_TILE_N_SMALL = 64,
};

/* Compute the partial sums of a block, with one exponential per logit. */
int fastclip_cuda_contrastive_fwd(const fastclip_cuda_block* block, const fastclip_cuda_fwd_side* image,
                                  const fastclip_cuda_fwd_side* text);

/* Compute weights (M, N) = gain r_i G_ij c_j in the dtype of the features, and 0 on the diagonal if there are no
 * labels, and scale_part (tiles,) = gain d_scale of every tile, from the weights before they are rounded. weights must
 * be aligned to 16 bytes; weights_row_stride must be a multiple of 8 and at least N. Columns from N to the next
 * multiple of 8 become 0. */
int fastclip_cuda_contrastive_bwd(const fastclip_cuda_block* block, const fastclip_cuda_bwd_side* image,
                                  const fastclip_cuda_bwd_side* text, void* weights, int64_t weights_row_stride,
                                  float* scale_part);

/* Compute the sigmoid loss of all pairs of a block except those on the diagonal. part (3, part_row_stride) receives the
 * loss, gain d_scale and d_bias of every tile, weights (M, N) receives gain r_i G_ij c_j. Without `gradients` only the
 * loss is written. */
int fastclip_cuda_sigmoid_fwd(const fastclip_cuda_block* block, const float* image_factor, const float* text_factor,
                              const float* bias, int gradients, void* weights, int64_t weights_row_stride, double* part,
                              int64_t part_row_stride);

/* ---- The plain case: N images and N texts without labels, the mean loss of both directions ----
 *
 * A step calls forward once. Then, for every chunk of rows, it calls weights for each block of columns, multiplies the
 * weights by the features with a library, and calls finish. There is one chunk of one block unless the weights exceed
 * the workspace. fastclip_cuda_loss_plan returns the sizes. */
typedef struct fastclip_cuda_loss {
  const void *image, *text; /* (N, D), rows contiguous */
  int64_t image_row_stride, text_row_stride;
  /* The rows as the products read them, aligned to 16 bytes, with strides that are multiples of 8: the features
   * themselves, or memory for copies. Both sides are copies if D is not a multiple of 8, and for normalised fp16. */
  void *image_rows, *text_rows;
  int64_t image_rows_stride, text_rows_stride;
  int64_t N, D;
  int dtype; /* fastclip_dtype */
  int normalize;
  const float* scale;
  double image_weight; /* weight of the images' mean loss; the texts' has 1 - image_weight */
  int64_t workspace;   /* bytes that the forward's partial sums may take, and that the weights may take */
  int processors;      /* multiprocessors of the device */
  int device;          /* number of the device; negative: the current device */
  void* stream;
} fastclip_cuda_loss;

typedef struct fastclip_cuda_loss_sizes {
  int64_t saved, work; /* bytes that the forward saves for the backward, and bytes of its workspace */
  int64_t rows;        /* rows of logits in a chunk of weights */
  int64_t chunks;
  int64_t stride;  /* elements from one row of weights to the next */
  int64_t extra;   /* size of the backward's workspace after the weights of a chunk, in rows of weights */
  int64_t sigmoid; /* bytes before the weights in the sigmoid loss's workspace */
  int64_t columns; /* columns of logits in a block: N, unless the workspace would hold too few rows of N weights */
} fastclip_cuda_loss_sizes;

/* Compute the sizes of a problem. */
int fastclip_cuda_loss_plan(int64_t N, int64_t D, int64_t workspace, int processors, fastclip_cuda_loss_sizes* sizes);

/* Compute the loss, one float, and fill `saved` for the backward. saved and work must be aligned to 128 bytes. */
int fastclip_cuda_loss_forward(const fastclip_cuda_loss* p, void* saved, void* work, float* loss);

/* Compute the weights (rows, columns) of the block of a chunk that starts at `column`, a multiple of `columns`:
 * gain r_i G_ij c_j for an upstream gradient of 1, and 0 on the diagonal. `weights` has room for rows + extra rows, and
 * all blocks share it. */
int fastclip_cuda_loss_weights(const fastclip_cuda_loss* p, const void* saved, void* weights, int64_t chunk,
                               int64_t column);

/* Compute the gradients, multiplied by *upstream. raw_image (rows, width) is the product weights texts of this chunk,
 * where width is D rounded up to a multiple of 8. raw_text (N, width) is the sum over the chunks of weights^T images,
 * and is read with the last chunk. A gradient that is NULL is not computed. */
int fastclip_cuda_loss_finish(const fastclip_cuda_loss* p, const void* saved, void* weights, int64_t chunk,
                              const float* upstream, const float* raw_image, const float* raw_text, void* d_image,
                              void* d_text, float* d_scale);

/* ---- The sigmoid loss of N images and N texts, where row k of both is a pair ----
 *
 * fastclip_cuda_loss_plan returns the sizes; image_weight is not read. Loss and gradients are computed together. For
 * every chunk of rows a step calls weights, multiplies the weights by the features with a library, and calls finish.
 * All calls share `work`, aligned to 128 bytes. It has `sigmoid` bytes and, with gradients, the weights of a chunk
 * (rows, stride) in the dtype of the features, raw_image (rows, width) and raw_text (N, width) in fp32, as for
 * fastclip_cuda_loss_finish. */

/* Compute the weights of the block of a chunk that starts at `column`, as fastclip_cuda_sigmoid_fwd does. The first
 * call of a step computes the norms before the weights. */
int fastclip_cuda_sigmoid_weights(const fastclip_cuda_loss* p, const float* bias, void* work, int64_t chunk,
                                  int64_t column, int gradients);

/* Compute the gradients, divided by `divisor`. d_image and d_text are (N, D), in fp32 if the features are fp16. A
 * gradient that is NULL is not computed. The call for the last chunk also writes d_scalars (the gradients of scale and
 * bias) and the loss, a float, or a double if `wide`. */
int fastclip_cuda_sigmoid_finish(const fastclip_cuda_loss* p, const float* bias, void* work, int64_t chunk,
                                 double divisor, void* loss, int wide, void* d_image, void* d_text, float* d_scalars);

/* Arguments of fastclip_cuda_sigmoid_bwd, which multiplies by *upstream the gradients that a forward has kept, in fp32
 * if the features are fp16. A gradient that is NULL is not computed. */
typedef struct fastclip_cuda_factors {
  const float* upstream;
  const void *kept_image, *kept_text;
  const float *kept_scale, *kept_bias;
  void *d_image, *d_text; /* in `dtype` */
  float *d_scale, *d_bias;
  int64_t image_count, text_count; /* numbers of elements, which are contiguous */
  int dtype;                       /* fastclip_dtype */
  int device;                      /* number of the device; negative: the current device */
  void* stream;
} fastclip_cuda_factors;
int fastclip_cuda_sigmoid_bwd(const fastclip_cuda_factors* p);

/* Return the CUDA version that the driver supports, as 1000 major + 10 minor, or 0 without a driver; and the version of
 * the toolkit that this code was built with, in the same form. */
int fastclip_cuda_driver(void);
int fastclip_cuda_runtime(void);

/* Return the name of the CUDA error of a status of FASTCLIP_CUDA_ERROR or above. */
const char* fastclip_cuda_error_name(int status);

#ifdef __cplusplus
}
#endif

#endif /* FASTCLIP_H */
