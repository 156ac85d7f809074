// A persistent pool of worker threads for the CPU kernels.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastq::cpu {

constexpr int kMaxThreads = 1024;

// Threads a call may use, the caller included: what set_num_threads said, else FASTQ_NUM_THREADS,
// else the processors this process may run on. Throws when FASTQ_NUM_THREADS is no number from 1
// to kMaxThreads.
int get_num_threads();
void set_num_threads(int count);

using TaskFunction = void (*)(void* context, int64_t task, int slot);

// Runs function(context, task, slot) for each task in [0, num_tasks), the caller taking part; tasks
// are handed out in order, one at a time. `slot` in [0, threads) is a thread's own for the call.
// The first exception of a task reaches the caller; tasks not yet begun are then dropped. A call
// from inside a task, or while another thread's call has the pool, runs on the caller alone.
void run_tasks(int64_t num_tasks, int threads, TaskFunction function, void* context);

template <class Body>  // void body(int64_t task, int slot)
void parallel_for(int64_t num_tasks, int threads, Body&& body) {
  using Target = std::remove_reference_t<Body>;
  run_tasks(
      num_tasks, threads,
      [](void* context, int64_t task, int slot) { (*static_cast<Target*>(context))(task, slot); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastq::cpu
