// Threads for the tiles of a block: those of the OpenMP runtime that torch has already loaded, found at run time, else
// a small pool of our own. Never a second OpenMP runtime. After a matrix product torch's threads spin for some
// milliseconds; a pool of our own would share the cores with them, which costs a pass half its speed.
#pragma once

#include <cstdint>

namespace fastclip {

enum class Threads { kBorrowed, kPool };

// What later calls use (kBorrowed falls back to the pool where no runtime is found, and after fork), and do use.
void use_threads(Threads threads);
Threads threads_in_use();

// Runs task(context, index) for every index in [0, count), on the caller and up to num_threads - 1 workers.
// Which thread runs which index is not fixed: results must depend on the index only. Usable after fork and from
// several threads at once, not from inside a task.
void parallel_for(int64_t count, int num_threads, void (*task)(void* context, int64_t index), void* context);

template <class Task>
void parallel_for(int64_t count, int num_threads, Task& task) {
  parallel_for(count, num_threads, [](void* context, int64_t index) { (*static_cast<Task*>(context))(index); }, &task);
}

}  // namespace fastclip
