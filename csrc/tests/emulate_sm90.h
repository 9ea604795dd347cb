// The functions of cuda/sm90_ptx.cuh, and the few CUDA built-ins that the kernels use, on a CPU. Every CUDA thread of a
// cluster, or of a few blocks of an ordinary kernel, is a fiber. Fibers run in random order.
// A missing wait or an early release shows as a wrong result, because asynchronous work completes as late as its waits
// allow or at a random time. Products complete at their wait, TMA loads at a random time. A random half of the TMA
// stores complete at their wait, the others at once. Missing fences are reported. Writes of one block for another
// (__stcg) become visible at the writer's next __threadfence. Without a fence, they do so only after the kernel.
//
// Registers, the order of ordinary memory accesses and speed are not modelled.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <set>
#include <tuple>
#include <vector>

namespace sm90 {

using std::min;

[[noreturn]] void fail(const char* what);  // reports an operation that is an error on a GPU

struct Warp {
  uint32_t values[2][32];
  long arrivals = 0;
};
struct Named {
  int arrived = 0;
  long generation = 0;
};
struct Block {
  unsigned char* smem;
  uint32_t size;
  unsigned index, rank, threads, running;  // running: threads that have not returned
  std::vector<Warp> warps;
  Named named[16];
  bool unfenced_barriers = false;    // initialised, not yet visible to the cluster
  std::vector<unsigned char> dirty;  // 4-byte words that are not yet visible to the TMA
};
struct Gemm {
  float* d;
  int n;
  uint64_t a, b;
  bool accumulate, half;
};
struct Map {  // stored inside a CUtensorMap
  unsigned char* data;
  int64_t rows, cols, row_bytes;
  int box_rows, box_cols;
};
struct Store {
  const Map* map;
  uint32_t src;
  int x, y;
};
struct Fiber {
  void* context;
  Block* block;
  unsigned thread;
  std::function<bool()> ready;  // empty if the fiber can run
  bool done = false, fenced = false;
  long warp_steps = 0;
  std::vector<Gemm> open;
  std::deque<std::vector<Gemm>> groups;
  std::vector<Store> open_stores;
  std::deque<std::vector<Store>> stores;
  std::set<std::tuple<const Map*, int, int>> written;  // boxes whose store may not be complete
  std::vector<uint32_t> unfenced;                      // words of `dirty` that it wrote
  std::vector<std::function<void()>> writes;           // to global memory, not yet visible to other blocks
};

extern Fiber* fiber;  // the running fiber
extern std::vector<Block>* cluster_blocks;
extern std::vector<std::function<void()>> loads;  // TMA loads in flight
extern unsigned grid_size;
extern Named cluster_barrier;

void wait_until(std::function<bool()> ready);
void maybe_yield();  // lets other fibers run now and then
bool coin();

template <unsigned (*kGet)()>
struct Index {
  struct {
    operator unsigned() const { return kGet(); }
  } x;
};
inline unsigned thread_index() { return fiber->thread; }
inline unsigned block_index() { return fiber->block->index; }
inline unsigned grid_blocks() { return grid_size; }
inline Index<thread_index> threadIdx;
inline Index<block_index> blockIdx;
inline Index<grid_blocks> gridDim;

inline Block& block() { return *fiber->block; }

using std::fmaxf;
inline float __fmul_rn(float a, float b) { return a * b; }

#undef __launch_bounds__
#define __launch_bounds__(...)
template <class T>
T __ldg(const T* p) {
  maybe_yield();
  return *p;
}

// ---- global memory between blocks ----

template <class T>
void __stcg(T* p, T value) {
  fiber->writes.push_back([=] { *p = value; });
}
template <class T>
T __ldcg(const T* p) {
  maybe_yield();
  return *p;
}
inline void __threadfence() {
  for (const auto& write : fiber->writes) write();
  fiber->writes.clear();
  maybe_yield();
}
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  maybe_yield();
  const unsigned before = *p;
  return *p = before + value, before;
}

constexpr uint32_t kBase = 1024;  // where the dynamic shared memory of a CTA starts
inline unsigned char* dynamic_smem() { return block().smem; }
inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - block().smem) + kBase;
}
inline unsigned char* at_address(Block& b, uint32_t address) {
  if (address < kBase || address >= kBase + b.size) fail("an address outside shared memory");
  return b.smem + (address - kBase);
}
inline Block& present(Block& b) {  // after a CTA has returned, its shared memory may belong to another one
  if (b.running == 0) fail("a CTA that has left is written to");
  return b;
}
inline uint32_t cluster_rank() { return block().rank; }

// ---- barriers ----

inline void barrier_join(Named& b, int threads, bool wait) {
  const long generation = b.generation;
  if (++b.arrived == threads) b.arrived = 0, ++b.generation;
  if (wait) wait_until([&b, generation] { return b.generation != generation; });
}
inline void cluster_sync() {
  if (block().unfenced_barriers) fail("barriers are used in the cluster without a fence after their initialisation");
  barrier_join(cluster_barrier, 384 * static_cast<int>(cluster_blocks->size()), true);
}
inline void __syncthreads() { barrier_join(block().named[0], static_cast<int>(block().threads), true); }
inline void named_sync(int id, int threads) { barrier_join(block().named[id], threads, true); }
inline void named_arrive(int id, int threads) { barrier_join(block().named[id], threads, false); }

struct Barrier {  // overlays the 64-bit mbarrier
  int32_t bytes;
  uint8_t pending, expected, phase, unused;
};
static_assert(sizeof(Barrier) == 8, "an mbarrier's size");
inline Barrier& barrier_of(void* p) { return *static_cast<Barrier*>(p); }
inline void barrier_check(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected;
}
inline void barrier_arrive(Barrier& b) {
  if (b.pending == 0) fail("more arrivals at an mbarrier than it expects");
  --b.pending, barrier_check(b);
}
inline void mbarrier_init(uint64_t* p, uint32_t n) {
  barrier_of(p) = {0, static_cast<uint8_t>(n), static_cast<uint8_t>(n), 0, 0};
  block().unfenced_barriers = true;
}
inline void mbarrier_init_fence() { block().unfenced_barriers = false; }
inline void mbarrier_expect(uint64_t* p, uint32_t bytes) {
  barrier_of(p).bytes += static_cast<int32_t>(bytes);
  barrier_arrive(barrier_of(p));
}
inline void mbarrier_arrive_in(uint64_t* p, uint32_t rank) {
  barrier_arrive(barrier_of(at_address(present((*cluster_blocks)[rank]), smem_address(p))));
}
inline void mbarrier_wait(uint64_t* p, uint32_t parity) {
  wait_until([p, parity] { return barrier_of(p).phase != parity; });
}

// ---- tensor memory accelerator ----

inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void load_box(const Map* map, const std::vector<Block*>& blocks, uint32_t dst, uint32_t bar, int x, int y) {
  for (Block* b : blocks) {
    present(*b);
    for (int r = 0; r < map->box_rows; ++r)
      for (int c = 0; c < map->box_cols; ++c) {
        uint16_t value = 0;
        if (y + r >= 0 && y + r < map->rows && x + c >= 0 && x + c < map->cols)
          std::memcpy(&value, map->data + (y + r) * map->row_bytes + (x + c) * 2, 2);
        std::memcpy(at_address(*b, swizzle_128(dst + r * 128 + c * 2)), &value, 2);
      }
    Barrier& barrier = barrier_of(at_address(*b, bar));
    barrier.bytes -= map->box_rows * map->box_cols * 2, barrier_check(barrier);
  }
}
inline void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, uint16_t ctas) {
  std::vector<Block*> blocks;
  for (Block& b : *cluster_blocks)
    if (ctas >> b.rank & 1) blocks.push_back(&b);
  const uint32_t d = smem_address(dst), m = smem_address(bar);
  loads.push_back([=] { load_box(reinterpret_cast<const Map*>(map), blocks, d, m, x, y); });
}
inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  tma_load_multicast(dst, map, bar, x, y, static_cast<uint16_t>(1 << block().rank));
}

void store_box(const Store& s);
inline void tma_store(const CUtensorMap* map, const void* src, int x, int y) {
  const Map* to = reinterpret_cast<const Map*>(map);
  if (!fiber->written.insert({to, x, y}).second) fail("two TMA stores to one place, in no order");
  const Store store = {to, smem_address(src), x, y};
  if (coin())
    store_box(store);
  else
    fiber->open_stores.push_back(store);
}
inline void tma_store_commit() { fiber->stores.push_back(std::move(fiber->open_stores)), fiber->open_stores.clear(); }
inline void tma_store_finish(size_t pending) {
  for (; fiber->stores.size() > pending; fiber->stores.pop_front())
    for (const Store& s : fiber->stores.front()) store_box(s);
}
template <int kPending>
void tma_store_wait_read() {
  tma_store_finish(kPending);
}
inline void tma_store_wait_all() { tma_store_finish(0), fiber->written.clear(); }
inline void tma_store_fence() {
  for (uint32_t word : fiber->unfenced) block().dirty[word] = 0;
  fiber->unfenced.clear();
}

// ---- registers and warps ----

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline float as_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int32_t as_int(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline void warp_join() {
  Warp& w = block().warps[fiber->thread / 32];
  const long goal = 32 * ++fiber->warp_steps;
  ++w.arrivals;
  wait_until([&w, goal] { return w.arrivals >= goal; });
}
inline uint32_t* warp_publish(uint32_t value) {  // returns the values of all lanes, valid until the lane's next call
  uint32_t* values = block().warps[fiber->thread / 32].values[fiber->warp_steps & 1];
  values[fiber->thread % 32] = value;
  warp_join();
  return values;
}
inline void __syncwarp() { warp_join(); }
inline int __any_sync(unsigned, int value) {
  const uint32_t* values = warp_publish(value != 0);
  return std::any_of(values, values + 32, [](uint32_t v) { return v != 0; });
}
template <typename T>
T shuffle_from(T v, unsigned lane) {
  uint32_t bits[sizeof(T) / 4];
  std::memcpy(bits, &v, sizeof v);
  for (uint32_t& word : bits) word = warp_publish(word)[lane];
  std::memcpy(&v, bits, sizeof v);
  return v;
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, unsigned bit) {
  return shuffle_from(v, (fiber->thread % 32) ^ bit);
}
template <typename T>
T __shfl_sync(unsigned, T v, unsigned lane) {
  return shuffle_from(v, lane);
}

inline void store_matrix_x4(uint32_t address, const uint32_t (&v)[4]) {
  const uint32_t* addresses = warp_publish(address);
  const unsigned lane = fiber->thread % 32;
  for (unsigned m = 0; m < 4; ++m) {
    const uint32_t dst = addresses[8 * m + lane / 4] + 4 * (lane % 4);
    std::memcpy(at_address(block(), dst), &v[m], 4);
    block().dirty[(dst - kBase) / 4] = 1, fiber->unfenced.push_back((dst - kBase) / 4);
  }
}

// ---- arithmetic ----

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 1.17549435e-38f ? 0.f : y;
}
inline float inverse_fast(float x) { return 1.f / x; }

inline uint16_t narrow(float x, bool half) {
  uint16_t bits;
  if (half) {
    const _Float16 h = static_cast<_Float16>(x);
    std::memcpy(&bits, &h, 2);
  } else {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  return bits;
}
inline float widen(uint16_t bits, bool half) {
  if (!half) return as_float(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16));
  static const std::vector<float> all = [] {
    std::vector<float> values(65536);
    for (unsigned k = 0; k < values.size(); ++k) {
      const uint16_t u = static_cast<uint16_t>(k);
      _Float16 h;
      std::memcpy(&h, &u, 2), values[k] = static_cast<float>(h);
    }
    return values;
  }();
  return all[bits];
}
template <bool kHalf>
uint32_t pack(float low, float high) {
  return narrow(low, kHalf) | static_cast<uint32_t>(narrow(high, kHalf)) << 16;
}

template <bool kHalf>
void unpack(uint32_t x, float& low, float& high) {
  low = widen(static_cast<uint16_t>(x), kHalf), high = widen(static_cast<uint16_t>(x >> 16), kHalf);
}

// ---- tensor cores ----

inline uint64_t operand(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 / 16} << 32) | (uint64_t{1} << 16) | ((address & 0x3ffff) >> 4);
}
// Row of a K-major operand, with the descriptor interpreted as in the PTX manual. The swizzle acts on address bits, 16
// bytes at a time.
inline void operand_row(uint64_t desc, int row, bool half, float (&values)[16]) {
  if (desc >> 62 != 1 || (desc >> 49 & 7) != 0) fail("a descriptor of another kind");
  const uint32_t start = (desc & 0x3fff) << 4, group = (desc >> 32 & 0x3fff) << 4;
  uint16_t bits[16];
  for (uint32_t k = 0; k < 2; ++k)
    std::memcpy(bits + 8 * k, at_address(block(), swizzle_128(start + row / 8 * group + row % 8 * 128 + k * 16)), 16);
  for (int k = 0; k < 16; ++k) values[k] = widen(bits[k], half);
}
inline void wgmma_fence() { fiber->fenced = true; }
inline void pin(float&) { fiber->fenced = false; }  // other instructions touch the accumulators
template <class T>
void forget(T&) {}
inline void load_later() {}
inline void wgmma_commit() { fiber->groups.push_back(std::move(fiber->open)), fiber->open.clear(); }
template <int kPending>
void wgmma_wait() {
  for (; fiber->groups.size() > kPending; fiber->groups.pop_front())
    for (const Gemm& g : fiber->groups.front()) {
      const int t = static_cast<int>(fiber->thread % 128);
      float a[2][16], b[16];
      for (int h = 0; h < 2; ++h) operand_row(g.a, 16 * (t / 32) + t % 32 / 4 + 8 * h, g.half, a[h]);
      for (int i = 0; i < g.n; i += 4)
        for (int e = 0; e < 2; ++e) {
          operand_row(g.b, 8 * (i / 4) + 2 * (t % 4) + e, g.half, b);
          for (int h = 0; h < 2; ++h) {
            double sum = g.accumulate ? g.d[i + 2 * h + e] : 0;
            for (int k = 0; k < 16; ++k) sum += a[h][k] * static_cast<double>(b[k]);
            g.d[i + 2 * h + e] = static_cast<float>(sum);
          }
        }
    }
  warp_join();  // no lane continues before all have read their operands
}
template <bool kHalf, int kAcc>
void wgmma(float (&d)[kAcc], uint64_t a, uint64_t b, int accumulate) {
  if (!fiber->fenced) fail("a product without a fence after other instructions touched its accumulators");
  fiber->open.push_back({d, kAcc, a, b, accumulate != 0, kHalf});
}

}  // namespace sm90
