// Sums and maxima over a row: of a warp, of a block, of the cluster of blocks that has the row.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "quantize/quantize_kernels.hpp"

namespace fastq::cuda {

// A sum or a maximum of a block's threads, the same in all of them. `of_warp` is used once.
__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}
__device__ inline float sum_of_block(float value, float (&of_warp)[kMaxQuantizeThreads / 32]) {
  value = sum_of_warp(value);
  if (blockDim.x == 32) return value;
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  const unsigned warps = blockDim.x / 32;
  if (warps > 4) return sum_of_warp(threadIdx.x % 32 < warps ? of_warp[threadIdx.x % 32] : 0);
  const float4 four = *reinterpret_cast<const float4*>(of_warp);
  return (four.x + four.y) + ((warps > 2 ? four.z : 0) + (warps > 3 ? four.w : 0));
}
__device__ inline uint32_t maximum_of_block(float value,
                                            uint32_t (&of_warp)[kMaxQuantizeThreads / 32]) {
  const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(value));
  if (blockDim.x == 32) return bits;
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = bits;
  __syncthreads();
  return __reduce_max_sync(0xffffffffu,
                           threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0);
}

// The blocks that have a row: those of a cluster, or one.
struct RowBlocks {
  uint32_t count = 1, rank = 0;
  int64_t row = blockIdx.x;

  __device__ RowBlocks() {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    row = blockIdx.x >> (__ffs(count) - 1);  // a power of two
#endif
  }
  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (count == 1) return;
    asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
  }
  // What the block of a rank has at the place of `mine`, which is in shared memory.
  __device__ static uint32_t value_of(const uint32_t& mine, uint32_t rank) {
    uint32_t value = mine;
#if __CUDA_ARCH__ >= 900
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(&mine));
    asm volatile("mapa.shared::cluster.u32 %0, %0, %1;\n" : "+r"(address) : "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
#endif
    return value;
  }
};

// The same over all blocks of a row. `of_block` is used once.
__device__ inline float sum_of_row(const RowBlocks& blocks, float value,
                                   float (&of_warp)[kMaxQuantizeThreads / 32], uint32_t& of_block) {
  value = sum_of_block(value, of_warp);
  if (blocks.count == 1) return value;
  if (threadIdx.x == 0) of_block = __float_as_uint(value);
  blocks.sync();
  value = 0;
#pragma unroll 1
  for (uint32_t i = 0; i < blocks.count; ++i) {
    value += __uint_as_float(RowBlocks::value_of(of_block, i));
  }
  return value;
}
__device__ inline uint32_t maximum_of_row(const RowBlocks& blocks, float value,
                                          uint32_t (&of_warp)[kMaxQuantizeThreads / 32],
                                          uint32_t& of_block) {
  uint32_t bits = maximum_of_block(value, of_warp);
  if (blocks.count == 1) return bits;
  if (threadIdx.x == 0) of_block = bits;
  blocks.sync();
#pragma unroll 1
  for (uint32_t i = 0; i < blocks.count; ++i) bits = max(bits, RowBlocks::value_of(of_block, i));
  return bits;
}

// What a block's threads tell one another. Each is used once.
struct RowExchange {
  alignas(16) float sums[2][kMaxQuantizeThreads / 32];
  uint32_t maxima[2][kMaxQuantizeThreads / 32];
  uint32_t of_block[4];
};

}  // namespace fastq::cuda
