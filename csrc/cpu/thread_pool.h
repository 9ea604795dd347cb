// A small pool of threads that sleeps between calls: no OpenMP, so no second runtime beside torch's.
#pragma once

#include <cstdint>

namespace fastclip {

// Runs task(context, index) for every index in [0, count), on the caller and up to num_threads - 1 workers.
// Which thread runs which index is not fixed: results must depend on the index only. Usable after fork and from
// several threads at once (one of them gets the workers, the others run alone), not from inside a task.
void parallel_for(int64_t count, int num_threads, void (*task)(void* context, int64_t index), void* context);

template <class Task>
void parallel_for(int64_t count, int num_threads, Task& task) {
  parallel_for(
      count, num_threads, [](void* context, int64_t index) { (*static_cast<Task*>(context))(index); }, &task);
}

}  // namespace fastclip
