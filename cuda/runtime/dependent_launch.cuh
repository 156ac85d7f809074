// Programmatic dependent launch: a kernel launched with the attribute may start while the one
// before it in its stream still runs.
//
// Every kernel so launched waits before it touches global memory (but for the b of an int8_gemm
// that is promised constant), and lets its successor start only then. So when a kernel starts,
// whatever ran before its predecessor has finished. (The kernel that clears a mask of outliers lets
// the quantisation start at once: that touches nothing before it has waited.) A launch without the
// attribute waits for everything, as ever. Code compiled for less than kDependentLaunchArch cannot
// wait, so it must be launched without, wherever it runs.
//
// Where weights are settled (core/settled_weights.hpp), none of that holds for the small kernels
// between two products: they let their successors start at once, so that the second product reads
// its weight ahead while the first one still runs, and kv_append and flash_decode read what is
// settled of their cache before they wait. Whatever any of them writes is waited for as before, one
// kernel by the next.
#pragma once

#include <cuda_runtime_api.h>

namespace fastq::cuda {

constexpr int kDependentLaunchArch = 90;

inline cudaLaunchAttribute dependent_launch() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// What came before in the stream has finished, and its writes are visible.
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both; the successor may start before the turn of this kernel has come.
__device__ inline void wait_for_predecessor(bool lets_successor_start_early) {
  if (lets_successor_start_early) let_successor_start();
  wait_for_predecessor();
  let_successor_start();
}

}  // namespace fastq::cuda
