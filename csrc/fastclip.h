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

/* One side of the sigmoid loss: z_ij = dot_ij (image.factor_i + image.factor_low_i) text.factor_j + bias. */
typedef struct fastclip_sigmoid_side {
  const float* factor;     /* inverse norm; images: also scale */
  const float* factor_low; /* images: what rounding took from factor. Texts: NULL */
  const float* inv_norm;   /* what multiplies the feature, 1 when not normalised */
} fastclip_sigmoid_side;

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

/* Add one block of the sigmoid loss to *sums. The positive of row i is column i + offset. With `gradients` the block is
 * overwritten with r_i G_ij c_j, G = d loss / d z; without, it is left as it is and only sums->loss counts. */
int fastclip_cpu_sigmoid_fwd(const fastclip_block* block, const fastclip_sigmoid_side* image,
                             const fastclip_sigmoid_side* text, float bias, int gradients, fastclip_sigmoid_sums* sums,
                             int num_threads);

/* "avx512", "avx2" or "portable"; "auto" picks the best that this processor runs. Applies to the whole process. */
int fastclip_cpu_select_isa(const char* name);
const char* fastclip_cpu_isa(void);

/* "borrowed": threads of the OpenMP runtime that the process has loaded (the default); "pool": threads of our own, also
 * where no such runtime is found and after fork. Applies to the whole process; results are the same. */
int fastclip_cpu_select_threads(const char* name);
const char* fastclip_cpu_threads(void);

#ifdef __cplusplus
}
#endif

#endif /* FASTCLIP_H */
