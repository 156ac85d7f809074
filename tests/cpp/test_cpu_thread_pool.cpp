// The pool runs every task exactly once: under several callers, nested, with failing tasks, and in
// a forked child. Worth running under ThreadSanitizer too.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/thread_pool.hpp"

namespace {

using fastq::cpu::parallel_for;

std::atomic<int> failures{0};

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("failed: %s\n", what);
}

void run_one(int num_tasks, int threads, bool nested, bool failing) {
  std::vector<int> runs(num_tasks, 0);
  bool caught = false;
  try {
    parallel_for(num_tasks, threads, [&](int64_t task, int slot) {
      expect(slot >= 0 && slot < threads, "a slot lies below the number of threads");
      ++runs[task];
      if (nested) {
        int sum = 0;  // unsynchronised: a nested call stays on its thread
        parallel_for(3, threads, [&](int64_t inner, int) { sum += static_cast<int>(inner); });
        expect(sum == 3, "a nested call runs its tasks");
      }
      if (failing && task == num_tasks / 2) throw std::runtime_error("as asked");
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  expect(caught == (failing && num_tasks > 0), "the exception of a task reaches the caller");
  for (int count : runs) expect(count == 1 || (caught && count == 0), "each task runs once");
}

void run_many(uint32_t seed) {
  for (int i = 0; i < 2000; ++i) {
    seed = seed * 1664525u + 1013904223u;
    run_one(seed >> 16 & 31, 1 + (seed >> 8 & 3), (seed >> 12 & 7) == 0, (seed >> 24 & 31) == 0);
    if ((seed >> 10 & 255) == 0) usleep(300);  // let the workers fall asleep
  }
}

void several_callers() {
  std::vector<std::thread> callers;
  for (uint32_t seed = 1; seed <= 4; ++seed) callers.emplace_back(run_many, seed);
  for (std::thread& caller : callers) caller.join();
}

// The child of a process with workers, one of them perhaps holding the pool, starts its own.
void survives_fork() {
#if defined(__SANITIZE_THREAD__)
  std::printf("skipped survives_fork: ThreadSanitizer allows no new thread in a forked child\n");
  return;
#endif
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) run_one(8, 3, false, false);
  });
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      const int before = failures;
      for (int j = 0; j < 50; ++j) run_one(16, 3, false, false);
      std::_Exit(failures == before ? 0 : 1);
    }
    int status = -1;
    expect(child > 0 && waitpid(child, &status, 0) == child, "fork works");
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the pool works in a forked child");
  }
  stop = true;
  other.join();
}

}  // namespace

int main() {
  run_many(7);
  several_callers();
  survives_fork();
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
