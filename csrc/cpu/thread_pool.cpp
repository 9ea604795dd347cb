#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define FASTCLIP_POSIX 1
#endif

namespace fastclip {
namespace {

class ThreadPool {
 public:
  // Serves one caller at a time. Returns false if another caller has the workers.
  bool try_run(int64_t count, int num_threads, void (*task)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    int helpers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      helpers = grow(num_threads - 1);
      task_ = task;
      context_ = context;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      seats_ = helpers;
      running_ = helpers;
      ++round_;
    }
    if (helpers > 0) wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    running_ -= seats_;  // do not wait for workers that have not woken yet
    seats_ = 0;
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  int grow(int wanted) {  // mutex_ is held. If the system refuses threads, fewer are used.
    try {
      while (size_ < wanted) {
        std::thread([this] { serve(); }).detach();
        ++size_;
      }
    } catch (const std::system_error&) {
    }
    return std::min(wanted, size_);
  }

  void work() {
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(context_, index);
  }

  void serve() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return round_ != seen && seats_ > 0; });
      seen = round_;
      --seats_;
      lock.unlock();
      work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> next_{0};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  int size_ = 0, seats_ = 0, running_ = 0;
  uint64_t round_ = 0;
};

// The pool is never destroyed, because its threads may outlive static destructors. After fork the child has none of the
// threads, and the locks are in an unknown state, so it starts a new pool and leaks the old one.
std::atomic<ThreadPool*> g_pool{nullptr};
std::atomic<bool> g_forked{false};
std::atomic<Threads> g_threads{Threads::kBorrowed};

void start() {
  static const bool once = [] {
    g_pool.store(new ThreadPool);
#ifdef FASTCLIP_POSIX
    pthread_atfork(nullptr, nullptr, [] {
      g_pool.store(new ThreadPool);
      g_forked.store(true);
    });
#endif
    return true;
  }();
  (void)once;
}

// The entry point of the OpenMP runtime that torch has loaded, or null. It is looked up by its stable GNU name, which
// LLVM's and Intel's runtimes have too; fastclip links no OpenMP runtime. After fork the runtime's threads are gone and
// a call would hang, so null is returned.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

GompParallel borrowed_runtime() {
#ifdef FASTCLIP_POSIX
  static const auto entry = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (g_threads.load() == Threads::kBorrowed && !g_forked.load()) return entry;
#endif
  return nullptr;
}

struct Job {
  void (*task)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
};

}  // namespace

void use_threads(Threads threads) { g_threads.store(threads); }

Threads threads_in_use() { return borrowed_runtime() != nullptr ? Threads::kBorrowed : Threads::kPool; }

void parallel_for(int64_t count, int num_threads, void (*task)(void*, int64_t), void* context) {
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, count));
  if (threads > 1) {
    start();
    if (const GompParallel gomp_parallel = borrowed_runtime()) {
      Job job{task, context, count};
      const auto body = [](void* data) {
        Job& j = *static_cast<Job*>(data);
        for (int64_t index; (index = j.next.fetch_add(1, std::memory_order_relaxed)) < j.count;)
          j.task(j.context, index);
      };
      gomp_parallel(body, &job, static_cast<unsigned>(threads), 0);
      return;
    }
    if (g_pool.load()->try_run(count, threads, task, context)) return;
  }
  for (int64_t index = 0; index < count; ++index) task(context, index);
}

}  // namespace fastclip
