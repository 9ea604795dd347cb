// The PTX instructions of sm_90a that the tile kernels use, one function each. csrc/tests/emulate_sm90.h implements the
// same functions on a CPU.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace sm90 {

__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ unsigned char raw[];
  return raw;
}

__device__ __forceinline__ uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- barriers in shared memory, and the 16 named ones of a CTA ----

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes)
               : "memory");
}

// Arrives without cluster scope, which would put fences into the main loop. No fence is needed, because only wgmma and
// the TMA access a stage.
__device__ __forceinline__ void mbarrier_arrive_in(uint64_t* bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(smem_address(bar)),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(smem_address(bar)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor memory accelerator: x counts elements of a row, y rows ----

__device__ __forceinline__ void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          smem_address(dst)),
      "l"(map), "r"(smem_address(bar)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y,
                                                   uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(smem_address(dst)),
      "l"(map), "r"(smem_address(bar)), "r"(x), "r"(y), "h"(ctas)
      : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(smem_address(src)), "r"(x), "r"(y)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void tma_store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes this thread's writes to shared memory visible to the TMA.
__device__ __forceinline__ void tma_store_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers ----

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ float as_float(int32_t bits) { return __int_as_float(bits); }
__device__ __forceinline__ int32_t as_int(float x) { return __float_as_int(x); }

// Four 8 x 8 matrices of 16-bit values: lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrix_x4(uint32_t addr, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// ---- arithmetic ----

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float inverse_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <bool kHalf>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t y;
  if constexpr (kHalf)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

template <bool kHalf>
__device__ __forceinline__ void unpack(uint32_t x, float& low, float& high) {
  if constexpr (kHalf)
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(x));
  else
    low = as_float(static_cast<int32_t>(x << 16)), high = as_float(static_cast<int32_t>(x & 0xffff0000));
}

// ---- tensor cores ----

// K-major operand in rows of 128 bytes with the 128-byte swizzle: address / 16 in bits 0-13, leading offset unused (1),
// 1024 bytes from one group of 8 rows to the next (bits 32-45), swizzle kind 1 (bits 62-63).
__device__ __forceinline__ uint64_t operand(uint32_t addr) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 16) | ((addr & 0x3ffff) >> 4);
}

// Needed before the first product, and after other instructions have accessed the accumulators.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of x across this point: a wgmma wait does not name the accumulators.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// Makes the compiler compute values that depend on x again after this point, in place of keeping them in registers.
__device__ __forceinline__ void forget(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void forget(int& x) { asm volatile("" : "+r"(x)); }

// Keeps the compiler from moving later loads before this point, where they would occupy registers.
__device__ __forceinline__ void load_later() { asm volatile("" ::: "memory"); }

#define REG8(i)                                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define REG32(i) REG8(i), REG8(i + 8), REG8(i + 16), REG8(i + 24)
#define NAMES32                                                                                   \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25" \
  ",%26,%27,%28,%29,%30,%31"
#define NAMES64                                                                                  \
  NAMES32                                                                                        \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54" \
  ",%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES96                                                                                  \
  NAMES64                                                                                        \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86" \
  ",%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA(n, type, names, a, b, s)                                                                       \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " s ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type \
  " {" names "}, " a ", " b ", p, 1, 1, 0, 0;\n}"

// d (64 x 2 kAcc) = a (64 x 16) b^T (2 kAcc x 16) [+ d]
template <bool kHalf, int kAcc>
__device__ __forceinline__ void wgmma(float (&d)[kAcc], uint64_t a, uint64_t b, int accumulate) {
  static_assert(kAcc == 96 || kAcc == 64 || kAcc == 32, "one asm statement per width");
  if constexpr (kAcc == 96 && kHalf)
    asm volatile(WGMMA("192", "f16", NAMES96, "%96", "%97", "%98")
                 : REG32(0), REG32(32), REG32(64)
                 : "l"(a), "l"(b), "r"(accumulate));
  else if constexpr (kAcc == 96)
    asm volatile(WGMMA("192", "bf16", NAMES96, "%96", "%97", "%98")
                 : REG32(0), REG32(32), REG32(64)
                 : "l"(a), "l"(b), "r"(accumulate));
  else if constexpr (kAcc == 64 && kHalf)
    asm volatile(WGMMA("128", "f16", NAMES64, "%64", "%65", "%66")
                 : REG32(0), REG32(32)
                 : "l"(a), "l"(b), "r"(accumulate));
  else if constexpr (kAcc == 64)
    asm volatile(WGMMA("128", "bf16", NAMES64, "%64", "%65", "%66")
                 : REG32(0), REG32(32)
                 : "l"(a), "l"(b), "r"(accumulate));
  else if constexpr (kHalf)
    asm volatile(WGMMA("64", "f16", NAMES32, "%32", "%33", "%34") : REG32(0) : "l"(a), "l"(b), "r"(accumulate));
  else
    asm volatile(WGMMA("64", "bf16", NAMES32, "%32", "%33", "%34") : REG32(0) : "l"(a), "l"(b), "r"(accumulate));
}

#undef REG8
#undef REG32
#undef NAMES32
#undef NAMES64
#undef NAMES96
#undef WGMMA

}  // namespace sm90
