// One job at a time. A worker that sees a new epoch counts itself in (`inside_`), reads `job_`, and
// takes tasks from the job's counter. The caller does the same, then withdraws the job and waits
// for the workers still inside, never for one that has not come: on a busy machine the caller does
// the work of a worker that sleeps. All of it rests on sequentially consistent atomics: a worker
// counts itself in before it reads `job_`, the caller clears `job_` before it reads `inside_`, so
// at least one of them sees the other.
#include "cpu/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>

#include "core/error.hpp"

namespace fastq::cpu {
namespace {

// Long enough to bridge the gap between two calls of one model layer, short enough not to be felt.
constexpr int kWorkerSpins = 600;
constexpr int kCallerSpins = 4000;

// Set in workers, and in a caller while it runs tasks: a nested call then runs serially.
thread_local bool inside_task = false;

class TaskScope {
 public:
  TaskScope() { inside_task = true; }
  ~TaskScope() { inside_task = outer_; }
  TaskScope(const TaskScope&) = delete;
  TaskScope& operator=(const TaskScope&) = delete;

 private:
  const bool outer_ = inside_task;
};

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Job {
  TaskFunction function;
  void* context;
  int64_t num_tasks;
  int max_slots;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_slot{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work() {
    const int slot = next_slot.fetch_add(1);
    if (slot >= max_slots) return;
    try {
      for (int64_t task; (task = next_task.fetch_add(1)) < num_tasks;) {
        function(context, task, slot);
      }
    } catch (...) {
      next_task.store(num_tasks);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

class ThreadPool {
 public:
  // False when another thread's job has the pool.
  bool run(Job& job) {
    std::unique_lock<std::mutex> region(region_mutex_, std::try_to_lock);
    if (!region.owns_lock()) return false;
    start_workers(job.max_slots - 1);
    job_.store(&job);
    epoch_.fetch_add(1);
    wake_workers(job.max_slots - 1);
    {
      const TaskScope scope;
      job.work();
    }
    job_.store(nullptr);
    wait_for_workers();
    return true;
  }

 private:
  void start_workers(int count) {
    for (; num_workers_ < count; ++num_workers_) {
      // Signals belong to the threads of the program: its handlers must not run on a worker.
      sigset_t all, previous;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &previous);
      bool started = true;
      try {
        std::thread([this, seen = epoch_.load()] { worker_loop(seen); }).detach();
      } catch (const std::system_error&) {
        started = false;  // out of threads: those there are do the work
      }
      pthread_sigmask(SIG_SETMASK, &previous, nullptr);
      if (!started) return;
    }
  }

  void wake_workers(int count) {
    const int sleepers = sleepers_.load();
    if (sleepers == 0) return;
    {
      std::lock_guard<std::mutex> lock(sleep_mutex_);
    }
    for (int i = 0; i < std::min(sleepers, count); ++i) wake_.notify_one();
  }

  void worker_loop(uint32_t seen) {
    inside_task = true;
    for (;;) {
      for (int spin = 0; spin < kWorkerSpins && epoch_.load() == seen; ++spin) cpu_relax();
      if (epoch_.load() == seen) {
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
      }
      seen = epoch_.load();
      inside_.fetch_add(1);
      if (Job* job = job_.load()) job->work();
      if (inside_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
        std::lock_guard<std::mutex> lock(sleep_mutex_);
        all_left_.notify_one();
      }
    }
  }

  void wait_for_workers() {
    for (int spin = 0; spin < kCallerSpins; ++spin) {
      if (inside_.load() == 0) return;
      cpu_relax();
    }
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    caller_sleeps_.store(true);
    all_left_.wait(lock, [&] { return inside_.load() == 0; });
    caller_sleeps_.store(false);
  }

  std::mutex region_mutex_;
  int num_workers_ = 0;  // guarded by region_mutex_
  std::atomic<Job*> job_{nullptr};
  std::atomic<uint32_t> epoch_{0};
  std::atomic<int> inside_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  std::condition_variable all_left_;
};

// Never destroyed: detached workers may wait in it while the process ends.
alignas(ThreadPool) unsigned char pool_storage[sizeof(ThreadPool)];

// The workers do not exist in a forked child, and the locks may have been held: begin afresh.
void reset_pool_after_fork() {
  new (pool_storage) ThreadPool;
  inside_task = false;
}

ThreadPool& pool() {
  static ThreadPool* const instance = [] {
    auto* created = new (pool_storage) ThreadPool;
    pthread_atfork(nullptr, nullptr, reset_pool_after_fork);
    return created;
  }();
  return *instance;
}

int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

int default_num_threads() {
  const char* text = std::getenv("FASTQ_NUM_THREADS");
  if (text == nullptr || *text == '\0') return std::min(available_processors(), kMaxThreads);
  char* end = nullptr;
  const long count = std::strtol(text, &end, 10);
  if (*end != '\0' || count < 1 || count > kMaxThreads) {
    invalid_value(std::string("FASTQ_NUM_THREADS: expected a number from 1 to ") +
                  std::to_string(kMaxThreads) + ", got '" + text + "'");
  }
  return static_cast<int>(count);
}

std::atomic<int> chosen_threads{0};

}  // namespace

int get_num_threads() {
  int count = chosen_threads.load(std::memory_order_relaxed);
  if (count == 0) {
    count = default_num_threads();
    int unset = 0;  // a concurrent set_num_threads wins
    if (!chosen_threads.compare_exchange_strong(unset, count)) count = unset;
  }
  return count;
}

void set_num_threads(int count) {
  if (count < 1 || count > kMaxThreads) {
    invalid_value("set_num_threads: expected num_threads from 1 to " + std::to_string(kMaxThreads) +
                  ", got " + std::to_string(count));
  }
  chosen_threads.store(count);
}

void run_tasks(int64_t num_tasks, int threads, TaskFunction function, void* context) {
  const int wanted = static_cast<int>(std::min<int64_t>(threads, num_tasks));
  if (wanted > 1 && !inside_task) {
    Job job{function, context, num_tasks, wanted, {}, {}, {}, {}};
    if (pool().run(job)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  const TaskScope scope;
  for (int64_t task = 0; task < num_tasks; ++task) function(context, task, 0);
}

}  // namespace fastq::cpu
