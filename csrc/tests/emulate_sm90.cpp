// Runs the Hopper kernels on a CPU, through the CUDA run-time functions that csrc/cuda calls. See emulate_sm90.h.
#include "emulate_sm90.h"

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <random>

#include "../cuda/loss_kernels.h"
#include "../cuda/tile.cuh"

namespace sm90 {

Fiber* fiber;
std::vector<Block>* cluster_blocks;
std::vector<std::function<void()>> loads;
unsigned grid_size;
Named cluster_barrier;

namespace {

ucontext_t scheduler;
std::mt19937 dice;
std::function<void()> body;
int launches;                                    // since the last fastclip_emulated_launches()
std::vector<std::function<void()>> late_writes;  // not yet made visible by a fence

void start() {
  body();
  for (auto& write : fiber->writes) late_writes.push_back(std::move(write));
  fiber->done = true;
  swapcontext(static_cast<ucontext_t*>(fiber->context), &scheduler);
}

// Run the blocks with these indices together: a cluster, or a few blocks that happen to run side by side. Threads run
// in random order, TMA loads complete at random times.
void run_blocks(const std::vector<unsigned>& indices, unsigned threads, size_t smem) {
  constexpr size_t kStack = 96 * 1024;
  static std::vector<unsigned char> stacks;
  const unsigned size = static_cast<unsigned>(indices.size());
  std::vector<Block> blocks(size);
  std::vector<std::vector<unsigned char>> memory(size, std::vector<unsigned char>(smem + 1024, 0xff));  // 0xffff: NaN
  std::vector<Fiber> fibers(static_cast<size_t>(size) * threads);
  std::vector<ucontext_t> contexts(fibers.size());
  if (stacks.size() < fibers.size() * kStack) stacks.resize(fibers.size() * kStack);
  cluster_blocks = &blocks, cluster_barrier = {}, loads.clear();
  for (unsigned b = 0; b < size; ++b) {
    blocks[b].smem = memory[b].data(), blocks[b].size = static_cast<uint32_t>(smem);
    blocks[b].index = indices[b], blocks[b].rank = b, blocks[b].threads = blocks[b].running = threads;
    blocks[b].warps.resize(threads / 32), blocks[b].dirty.resize(smem / 4 + 1);
    for (unsigned t = 0; t < threads; ++t) {
      const size_t k = static_cast<size_t>(b) * threads + t;
      fibers[k].block = &blocks[b], fibers[k].thread = t, fibers[k].context = &contexts[k];
      getcontext(&contexts[k]);
      contexts[k].uc_stack.ss_sp = stacks.data() + k * kStack, contexts[k].uc_stack.ss_size = kStack;
      makecontext(&contexts[k], start, 0);
    }
  }
  std::vector<size_t> order(fibers.size());
  for (size_t k = 0; k < order.size(); ++k) order[k] = k;
  unsigned asleep = 0, warp = 0, rounds = 0;  // a CTA, or a warp of it, that falls behind, and for how long
  for (size_t left = fibers.size(); left > 0;) {
    if (rounds == 0 && dice() % 64 == 0) {
      asleep = dice() % size, warp = dice() % (2 * threads / 32);  // from threads / 32 on: all warps of the CTA
      rounds = dice() % (warp < threads / 32 ? 64 : 1024);
    }
    const auto sleeps = [&](const Fiber& f) {
      return rounds > 0 && f.block->rank == asleep && (warp >= threads / 32 || f.thread / 32 == warp);
    };
    std::shuffle(order.begin(), order.end(), dice);
    bool moved = false;
    for (size_t k : order) {
      Fiber& f = fibers[k];
      if (f.done || sleeps(f) || (f.ready && !f.ready())) continue;
      f.ready = nullptr, fiber = &f, moved = true;
      swapcontext(&scheduler, &contexts[k]);
      left -= f.done, f.block->running -= f.done;
    }
    if (!loads.empty() && (dice() % 2 || !moved)) {
      std::swap(loads[dice() % loads.size()], loads.back());
      const auto load = std::move(loads.back());
      loads.pop_back(), load(), moved = true;
    }
    if (!moved && rounds == 0) fail("a deadlock");
    rounds = moved && rounds > 0 ? rounds - 1 : 0;
  }
  for (Fiber& f : fibers)
    if (!f.groups.empty() || !f.open.empty() || !f.stores.empty()) fail("work that nobody waited for");
  for (Block& b : blocks)
    for (Named& n : b.named)
      if (n.arrived) fail("arrivals at a named barrier that nobody waited for");
  cluster_blocks = nullptr;
}

// Run a grid in random order: clusters of `size` blocks, or one to four blocks at a time without clusters.
void run_grid(unsigned blocks, unsigned size, unsigned threads, size_t smem) {
  std::vector<unsigned> order(blocks / (size ? size : 1));
  for (size_t k = 0; k < order.size(); ++k) order[k] = static_cast<unsigned>(k);
  std::shuffle(order.begin(), order.end(), dice);
  for (size_t k = 0; k < order.size();) {
    std::vector<unsigned> indices;
    for (unsigned b = 0; b < size; ++b) indices.push_back(order[k] * size + b);
    if (size) {
      ++k;
    } else {
      const size_t end = std::min(order.size(), k + 1 + dice() % 4);
      for (; k < end; ++k) indices.push_back(order[k]);
    }
    run_blocks(indices, threads, smem);
  }
  for (const auto& write : late_writes) write();
  late_writes.clear();
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType, cuuint32_t, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const Map map = {static_cast<unsigned char*>(data), static_cast<int64_t>(sizes[1]), static_cast<int64_t>(sizes[0]),
                   static_cast<int64_t>(strides[0]),  static_cast<int>(box[1]),       static_cast<int>(box[0])};
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  fiber->ready = std::move(ready);
  swapcontext(static_cast<ucontext_t*>(fiber->context), &scheduler);
}

void store_box(const Store& s) {
  for (int r = 0; r < s.map->box_rows; ++r)
    for (int c = 0; c < s.map->box_cols; ++c) {
      const uint32_t src = swizzle_128(s.src + r * 128 + c * 2);
      if (block().dirty[(src - kBase) / 4]) fail("a TMA store reads what was written without a fence");
      const int64_t cols = (s.map->cols + 7) / 8 * 8;  // the last 16 bytes of a row are written whole
      if (s.y + r < s.map->rows && s.x + c < cols)
        std::memcpy(s.map->data + (s.y + r) * s.map->row_bytes + (s.x + c) * 2, at_address(block(), src), 2);
    }
}

bool coin() { return dice() % 2; }

void maybe_yield() {
  if (dice() % 8) return;
  swapcontext(static_cast<ucontext_t*>(fiber->context), &scheduler);
}

}  // namespace sm90

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&sm90::encode), *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t) { return "an error"; }

cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

// Runs several schedules of one launch, chosen by FASTCLIP_EMULATE_SEED.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** args) {
  using namespace fastclip;
  const char* seed = std::getenv("FASTCLIP_EMULATE_SEED");
  sm90::dice.seed(seed ? static_cast<unsigned>(std::atoi(seed)) : 1);
  ++sm90::launches;
  const unsigned size = config->numAttrs ? config->attrs[0].val.clusterDim.x : 0;
  sm90::grid_size = config->gridDim.x;
  if (size) {
    const auto kernel =
        reinterpret_cast<void (*)(CUtensorMap, CUtensorMap, CUtensorMap, Params)>(const_cast<void*>(function));
    sm90::body = [=] {
      kernel(*static_cast<CUtensorMap*>(args[0]), *static_cast<CUtensorMap*>(args[1]),
             *static_cast<CUtensorMap*>(args[2]), *static_cast<Params*>(args[3]));
    };
  } else {  // an ordinary kernel
    const auto kernel = reinterpret_cast<LossKernel>(const_cast<void*>(function));
    sm90::body = [=] { kernel(*static_cast<Loss*>(args[0])); };
  }
  sm90::run_grid(config->gridDim.x, size, config->blockDim.x, config->dynamicSmemBytes);
  return cudaSuccess;
}

int fastclip_emulated_launches() {
  const int count = sm90::launches;
  return sm90::launches = 0, count;
}

}  // extern "C"
