// The timers. What is timed is a list of calls that do the same on different copies of the inputs.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <vector>

#include "device.hpp"

namespace bench {

using Calls = std::vector<std::function<void()>>;

// Microseconds a call.
struct Timing {
  double p10_us, p50_us, p90_us;
};

inline Timing quantiles(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double part) { return samples[std::lround(part * (samples.size() - 1))]; };
  return {at(0.1), at(0.5), at(0.9)};
}

inline Timing time_cpu(const Calls& calls, int rounds) {
  using Clock = std::chrono::steady_clock;
  size_t next = 0;
  const auto run = [&](int count) {
    const auto begin = Clock::now();
    for (int i = 0; i < count; ++i) calls[next++ % calls.size()]();
    return std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / count;
  };
  run(2);
  const int count = std::max(1, static_cast<int>(5e3 / run(2)));
  std::vector<double> samples;
  for (int i = 0; i < rounds; ++i) samples.push_back(run(count));
  return quantiles(samples);
}

#ifdef FASTQ_BENCH_CUDA
inline Timing time_cuda(const Calls& calls, int rounds, cudaStream_t stream) {
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin));
  check_cuda(cudaEventCreate(&end));
  const auto elapsed_us = [&](const std::function<void()>& work) {
    check_cuda(cudaEventRecord(begin, stream));
    work();
    check_cuda(cudaEventRecord(end, stream));
    check_cuda(cudaEventSynchronize(end));
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin, end));
    return 1e3 * ms;
  };
  const auto run_all = [&] {
    for (const auto& call : calls) call();
  };
  run_all();
  const double once = elapsed_us(run_all);
  const int repeats = std::max(1, static_cast<int>(1500 / once));

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < repeats; ++i) run_all();
  check_cuda(cudaStreamEndCapture(stream, &graph));
  check_cuda(cudaGraphInstantiate(&executable, graph, 0));
  const auto replay = [&] { check_cuda(cudaGraphLaunch(executable, stream)); };
  std::vector<double> samples;
  for (int i = -5; i < rounds; ++i) {  // the first ones bring the clocks to where they stay
    replay();                          // keeps the GPU busy until the timed one is enqueued
    const double us = elapsed_us(replay) / (static_cast<double>(repeats) * calls.size());
    if (i >= 0) samples.push_back(us);
  }
  check_cuda(cudaGraphExecDestroy(executable));
  check_cuda(cudaGraphDestroy(graph));
  check_cuda(cudaEventDestroy(begin));
  check_cuda(cudaEventDestroy(end));
  return quantiles(samples);
}
#endif

// On CUDA the calls enqueue their work on `stream`.
inline Timing measure(const Calls& calls, int rounds, bool cuda, void* stream) {
#ifdef FASTQ_BENCH_CUDA
  if (cuda) {
    synchronize(cuda);  // the operands were written on another stream
    return time_cuda(calls, rounds, static_cast<cudaStream_t>(stream));
  }
#endif
  (void)cuda, (void)stream;
  return time_cpu(calls, rounds);
}

}  // namespace bench
