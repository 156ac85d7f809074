// cp.async: copies from global to shared memory that go on while the thread does.
#pragma once

#include <cstdint>

namespace fastq::cuda {

// A policy for what nobody reads again: L2 gives it up first, not what somebody does.
__device__ inline uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0;\n" : "=l"(policy));
  return policy;
}

// 16 bytes from global to shared memory, of which those past `bytes` are zeros.
__device__ inline void copy_async_16(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global),
               "r"(bytes));
}

// The same of what nobody reads again.
__device__ inline void copy_async_16_once(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared),
               "l"(global), "r"(bytes), "l"(evict_first()));
}

// 16 bytes from global to shared memory, or 16 zeros.
__device__ inline void copy_async_16_or_zeros(uint32_t shared, const void* global, bool is_there) {
  asm volatile(
      "{\n"
      ".reg .pred absent;\n"
      "setp.eq.u32 absent, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, absent;\n"
      "}\n" ::"r"(shared),
      "l"(global), "r"(static_cast<uint32_t>(is_there)));
}

// 4 bytes, or a zero.
__device__ inline void copy_async_4_or_zero(uint32_t shared, const void* global, bool is_there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared), "l"(global),
               "r"(is_there ? 4 : 0));
}

__device__ inline void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// This thread's copies, but for the last kLeft groups that it committed, have arrived.
template <int kLeft>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

}  // namespace fastq::cuda
