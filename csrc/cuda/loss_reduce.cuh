// Loss, and vectors of the backward, from log-sum-exps. The reduction and the repair share this code.
//
//   Math      t = lse - s cosine, loss = sum of w softplus(t) / N over both directions
//             d = w sigmoid(t) / N, weight = d e^(c - lse), own = -(d_row + d_col)
//             c is subtracted from every logit before the exponential, log2(e) c is the constant FASTCLIP_OFFSET2
//   Precision fp64: softplus of the difference keeps the digits of a small loss
//   Order     a record sums 32 indices in a tree of lanes, records are summed by threads and in a tree: repeatable
#pragma once
#include <cstring>

#include "loss_rows.cuh"

namespace fastclip {

constexpr double kInf = HUGE_VAL;

// softplus(t) and its derivative. The reciprocal is computed by two Newton steps, because a fp64 division is a
// subroutine call, around which the tile kernel would spill its registers.
__device__ __forceinline__ double softplus(double t, double* derivative) {
  const double e = exp(-fabs(t)), u = 1 + e;  // in [1, 2], or NaN
  double inverse = inverse_fast(static_cast<float>(u));
  inverse = fma(inverse, fma(-u, inverse, 1.0), inverse);
  inverse = fma(inverse, fma(-u, inverse, 1.0), inverse);
  *derivative = (t >= 0 ? 1 : e) * inverse;
  return (t > 0 ? t : 0) + (log(u) + (e - (u - 1)) * inverse);  // log1p(e): log(u) plus what rounding u lost of e
}

// Clear the bit that could make the low word of a double a NaN if it is read as fp32. torch sees `saved` as fp32
// numbers and compares them in its checks. The change is at most 2^-29 of the number.
__device__ __forceinline__ double in_words(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof x);
  bits &= ~(uint64_t{1} << 23);
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Finish index k of both sides. Called by whole warps with consecutive k. lse2: log2-sum-exp2 of row and column k.
// served: the shared c has lost no terms of either sum.
__device__ __forceinline__ void finish_index(const Loss& p, int64_t k, int lane, const double (&lse2)[2], bool served,
                                             bool exact) {
  double record[kRecordValues] = {0, 0, 0, 0};
  if (k < p.N) {
    const double cosine = p.cosine[k], pos = static_cast<double>(*p.scale) * cosine;
    double own = 0;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const LossSide& side = p.side[s];
      double d;
      const double loss = p.side_weight[s] * softplus(lse2[s] * kLn2 - pos, &d);
      d *= p.side_weight[s];
      const float rounded = lse2[s] == -kInf ? 0.f : static_cast<float>(lse2[s]);
      // A repair subtracts the rounded log-sum-exp, so the rounding error is moved into the weight
      double shift = p.constants[FASTCLIP_OFFSET2] - lse2[s];
      if (exact) shift = fabsf(rounded) < HUGE_VALF ? rounded - lse2[s] : 0;
      const bool wanted = lse2[s] != -kInf && d != 0;  // true for NaN, false without negatives
      side.weight[k] = wanted ? in_words(d * exp2(shift)) : 0;
      side.lse2[k] = rounded;
      record[0] += loss;
      record[2] = d > record[2] && d < kInf ? d : record[2];
      own -= d;
    }
    p.own[k] = in_words(own);
    record[1] = own * cosine;
    record[3] = served ? 0 : 1;
  }
  record[0] = warp_sum(record[0]), record[1] = warp_sum(record[1]);
  record[2] = warp_max(record[2]), record[3] = warp_max(record[3]);
  double* out = p.record + kRecordValues * (k / kRecordRows);
  // Another block reads the record, so it must bypass the first-level cache, which other multiprocessors do not see
  if (lane == 0 && k < p.N)
    for (int v = 0; v < kRecordValues; ++v) __stcg(out + v, record[v]);
}

// Returns true in the last of `count` groups of threads that arrives here. Everything that the other groups wrote
// before is visible to it. Called by all threads that `sync` joins; `flag` is a word of theirs in shared memory.
template <class Sync>
__device__ __forceinline__ bool is_last(unsigned* ticket, unsigned count, int thread, unsigned* flag,
                                        const Sync& sync) {
  __threadfence();
  sync();
  if (thread == 0) *flag = atomicAdd(ticket, 1u) == count - 1;
  sync();
  const bool last = *flag != 0;
  if (last) __threadfence();
  sync();  // before the flag is used again
  return last;
}

// Sum all records and store the loss, the gain and the request for a repair. Called by the last block.
template <int kWarps, class Sync>
__device__ __forceinline__ void conclude(const Loss& p, int thread, double (*scratch)[kRecordValues], bool exact,
                                         const Sync& sync) {
  double total[kRecordValues] = {0, 0, 0, 0};
  const int64_t records = (p.N + kRecordRows - 1) / kRecordRows;
  for (int64_t r = thread; r < records; r += 32 * kWarps) {
    const double* record = p.record + kRecordValues * r;
    total[0] += __ldcg(record), total[1] += __ldcg(record + 1);
    const double largest = __ldcg(record + 2), bad = __ldcg(record + 3);
    total[2] = largest > total[2] ? largest : total[2], total[3] = bad > total[3] ? bad : total[3];
  }
  total[0] = warp_sum(total[0]), total[1] = warp_sum(total[1]);
  total[2] = warp_max(total[2]), total[3] = warp_max(total[3]);
  if (thread % 32 == 0)
    for (int v = 0; v < kRecordValues; ++v) scratch[thread / 32][v] = total[v];
  sync();
  if (thread > 0) return;
  for (int w = 1; w < kWarps; ++w) {
    total[0] += scratch[w][0], total[1] += scratch[w][1];
    total[2] = scratch[w][2] > total[2] ? scratch[w][2] : total[2];
    total[3] = scratch[w][3] > total[3] ? scratch[w][3] : total[3];
  }
  *p.loss = static_cast<float>(total[0]);
  *p.own_scale = in_words(total[1]);
  // |G| is at most twice the largest derivative, which is below twice its power of two, and factors of fp16 rows are
  // below 2. Hence gain r_i |G_ij| c_j < 2^15, which fp16 holds.
  const double largest = total[2] > 1e-34 ? (total[2] < 1e34 ? total[2] : 1e34) : 1e-34;
  p.constants[FASTCLIP_GAIN] = static_cast<float>(scalbn(1024.0, -ilogb(largest)));
  if (!exact) p.constants[FASTCLIP_REPAIR] = total[3] > 0 ? 1.f : 0.f;
}

}  // namespace fastclip
