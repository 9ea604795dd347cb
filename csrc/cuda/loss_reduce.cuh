// From log-sum-exps to the loss and to what the backward is made of: shared by the reduction and by the repair.
//
//   Math      t = lse - s cosine; loss += w softplus(t) / N; d = w sigmoid(t) / N; weight = d e^(offset - lse);
//             own = -(d_row + d_col)
//   Precision fp64: softplus of a difference keeps the digits of a small loss
//   Order     32 indices a record by a tree of lanes, records by threads and a tree: bitwise repeatable
#pragma once
#include <cstring>

#include "loss_rows.cuh"

namespace fastclip {

constexpr double kInf = HUGE_VAL;

// softplus(t) and its derivative, without a division, whose subroutine would cost the tile kernel its registers.
__device__ __forceinline__ double softplus(double t, double* derivative) {
  const double e = exp(-fabs(t)), u = 1 + e;  // in [1, 2], or NaN
  double inverse = inverse_fast(static_cast<float>(u));
  inverse = fma(inverse, fma(-u, inverse, 1.0), inverse);
  inverse = fma(inverse, fma(-u, inverse, 1.0), inverse);
  *derivative = (t >= 0 ? 1 : e) * inverse;
  return (t > 0 ? t : 0) + (log(u) + (e - (u - 1)) * inverse);  // log1p(e): what u lost of e is put back
}

// A number whose two words are fp32 numbers as well, no NaN: torch compares what is saved as such. Costs 2^-29 of it.
__device__ __forceinline__ double in_words(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof x);
  bits &= ~(uint64_t{1} << 23);
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Index k of both sides, by a whole warp with consecutive k: lse2 are its log2-sum-exp2, `served` whether one offset
// serves both sums.
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
      // A repair subtracts the rounded log-sum-exp: what rounding took from it goes into the weight
      double shift = p.constants[FASTCLIP_OFFSET2] - lse2[s];
      if (exact) shift = fabsf(rounded) < HUGE_VALF ? rounded - lse2[s] : 0;
      const bool wanted = lse2[s] != -kInf && d != 0;  // NaN is wanted; no negatives, no weight
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
  // The last of all blocks reads them: past the first-level cache, which nobody else sees
  if (lane == 0 && k < p.N)
    for (int v = 0; v < kRecordValues; ++v) __stcg(out + v, record[v]);
}

// Whether this block is the last of `count` to come here: everything it wrote is visible to the last one. By all
// threads that `sync` joins; `flag` is theirs in shared memory.
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

// The sum of all records, by the last block: loss, gain, and whether a repair is needed.
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
  // |G| is at most twice the largest derivative, that at most twice its power of two; factors of fp16 rows are below 2:
  // 2^15 > gain r_i |G_ij| c_j
  const double largest = total[2] > 1e-34 ? (total[2] < 1e34 ? total[2] : 1e34) : 1e-34;
  p.constants[FASTCLIP_GAIN] = static_cast<float>(scalbn(1024.0, -ilogb(largest)));
  if (!exact) p.constants[FASTCLIP_REPAIR] = total[3] > 0 ? 1.f : 0.f;
}

}  // namespace fastclip
