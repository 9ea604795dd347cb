// Reading, writing and copying rows of features, one warp per row, and sums over a warp.
#pragma once
#include "loss.cuh"
#include "tile.cuh"

namespace fastclip {

constexpr int kRowThreads = 32 * kRowsOfBlock;

template <class T>
__device__ __forceinline__ T warp_sum(T sum) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) sum += __shfl_xor_sync(0xffffffff, sum, bit);
  return sum;
}

template <class T>
__device__ __forceinline__ T warp_max(T top) {
#pragma unroll
  for (int bit = 16; bit > 0; bit >>= 1) {
    const T other = __shfl_xor_sync(0xffffffff, top, bit);
    top = top < other ? other : top;
  }
  return top;
}

__device__ __forceinline__ const uint16_t* row_of(const void* x, int64_t stride, int64_t k) {
  return static_cast<const uint16_t*>(x) + k * stride;
}

// Read eight adjacent elements, aligned to 16 bytes.
template <bool kHalf>
__device__ __forceinline__ void read8(const uint16_t* x, float (&values)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(x);
  unpack<kHalf>(bits.x, values[0], values[1]), unpack<kHalf>(bits.y, values[2], values[3]);
  unpack<kHalf>(bits.z, values[4], values[5]), unpack<kHalf>(bits.w, values[6], values[7]);
}

template <bool kHalf>
__device__ __forceinline__ float read1(const uint16_t* x) {
  float low, high;
  unpack<kHalf>(*x, low, high);
  return low;
}

template <bool kHalf>
__device__ __forceinline__ void write8(uint16_t* x, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(x) = make_uint4(pack<kHalf>(values[0], values[1]), pack<kHalf>(values[2], values[3]),
                                            pack<kHalf>(values[4], values[5]), pack<kHalf>(values[6], values[7]));
}

template <bool kHalf>
__device__ __forceinline__ void write1(uint16_t* x, float value) {
  *x = static_cast<uint16_t>(pack<kHalf>(value, 0.f));
}

// The same for fp32 memory, in which the sigmoid's forward keeps the gradients of fp16 features.
template <bool kHalf>
__device__ __forceinline__ void write8(float* x, const float (&values)[8]) {
  float4* out = reinterpret_cast<float4*>(x);
  out[0] = make_float4(values[0], values[1], values[2], values[3]);
  out[1] = make_float4(values[4], values[5], values[6], values[7]);
}

template <bool kHalf>
__device__ __forceinline__ void write1(float* x, float value) {
  *x = value;
}

__device__ __forceinline__ void read8(const float* x, float (&values)[8]) {
  const float4* in = reinterpret_cast<const float4*>(x);
  const float4 low = in[0], high = in[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__host__ __device__ __forceinline__ int64_t row_blocks(int64_t rows) {
  return (rows + kRowsOfBlock - 1) / kRowsOfBlock;
}

// Copy row k of a side for the products: x times `power`, a power of two, and zeros up to the width.
template <bool kHalf>
__device__ __forceinline__ void copy_row(const Loss& p, const LossSide& side, int64_t k, float power, int lane) {
  const uint16_t* x = row_of(side.x, side.x_stride, k);
  uint16_t* out = static_cast<uint16_t*>(side.rows) + k * side.rows_stride;
  for (int d = 8 * lane; d < p.width; d += 8 * 32) {
    float values[8];
    if (p.vectors)
      read8<kHalf>(x + d, values);
    else
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = d + e < p.D ? read1<kHalf>(x + d + e) : 0.f;
#pragma unroll
    for (float& value : values) value *= power;
    write8<kHalf>(out + d, values);
  }
}

}  // namespace fastclip
