// Threads for the tiles of a block. They are borrowed from the OpenMP runtime that torch has already loaded, which is
// looked up at run time; if there is none, a small pool is used. A second OpenMP runtime is never loaded. The pool is
// not the first choice, because torch's threads spin for some milliseconds after a matrix product: a pool would share
// the cores with them, which halves the speed of a pass.
#pragma once

#include <cstdint>

namespace fastclip {

enum class Threads { kBorrowed, kPool };

// Choose the threads of later calls, and return those in use. kBorrowed falls back to the pool if no runtime is found,
// and after fork.
void use_threads(Threads threads);
Threads threads_in_use();

// Run task(context, index) for every index in [0, count), on the caller and up to num_threads - 1 workers. Any thread
// may run any index, so results must depend on the index only. May be called after fork and from several threads at
// once, but not from inside a task.
void parallel_for(int64_t count, int num_threads, void (*task)(void* context, int64_t index), void* context);

template <class Task>
void parallel_for(int64_t count, int num_threads, Task& task) {
  parallel_for(count, num_threads, [](void* context, int64_t index) { (*static_cast<Task*>(context))(index); }, &task);
}

}  // namespace fastclip
