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
  bool are_open = false;  // the exchanges of all of them

  __device__ RowBlocks() {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    row = blockIdx.x >> (__ffs(count) - 1);  // a power of two
#endif
  }
};

// What the threads of a row tell one another, each place once: within a block as usual, and then a
// block tells all blocks of the row what it has found, by stores that count their bytes at a
// barrier of the block that they reach. (A cluster's own barrier waits for all that its threads
// have stored, in global memory as well.) So a block that has all that is sent to it may end.
class RowExchange {
 public:
  // By all threads, first.
  __device__ void open(const RowBlocks& blocks) {
#if __CUDA_ARCH__ >= 900
    if (blocks.count == 1) return;
    if (threadIdx.x == 0) {
#pragma unroll
      for (const uint64_t& barrier : arrived_) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(barrier)));
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
  }

  // Of a row's elements, the same in all threads; i: one of two places.
  __device__ uint32_t maximum(RowBlocks& blocks, float value, int i) {
    const uint32_t bits = maximum_of_block(value, maxima_[i]);
    if (blocks.count == 1) return bits;
    tell(blocks, i, bits);
    return maximum_told(blocks, i, 0);
  }
  // A norm's: two at a time, and one more where that is not enough.
  __device__ float sum(RowBlocks& blocks, float value) {
    value = sum_of_block(value, sums_);
    if (blocks.count == 1) return value;
    tell(blocks, kNorm, __float_as_uint(value));
    return sum_told(blocks, kNorm, 0);
  }
  struct SumAndMaximum {
    float sum;
    uint32_t maximum;
  };
  __device__ SumAndMaximum sum_and_maximum(RowBlocks& blocks, float sum, float maximum) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    SumAndMaximum its{sum_of_warp(sum), __reduce_max_sync(0xffffffffu, __float_as_uint(maximum))};
    if (warps > 1) {
      if (lane == 0) sums_[warp] = its.sum, maxima_[0][warp] = its.maximum;
      __syncthreads();
      its.sum = sum_of_warp(lane < warps ? sums_[lane] : 0);
      its.maximum = __reduce_max_sync(0xffffffffu, lane < warps ? maxima_[0][lane] : 0);
    }
    if (blocks.count == 1) return its;
    tell(blocks, kNorm, __float_as_uint(its.sum), its.maximum);
    its.sum = sum_told(blocks, kNorm, 0);
    return {its.sum, maximum_told(blocks, kNorm, 1)};
  }
  __device__ float2 sums(RowBlocks& blocks, float x, float y) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float2 its{sum_of_warp(x), sum_of_warp(y)};
    if (warps > 1) {
      if (lane == 0) pairs_[warp] = its;
      __syncthreads();
      if (warps > 4) {
        its = lane < warps ? pairs_[lane] : float2{};
        its = {sum_of_warp(its.x), sum_of_warp(its.y)};
      } else {
        its = pairs_[0];
#pragma unroll
        for (int i = 1; i < 4; ++i) {
          if (i < warps) its = {its.x + pairs_[i].x, its.y + pairs_[i].y};
        }
      }
    }
    if (blocks.count == 1) return its;
    tell(blocks, kSums, __float_as_uint(its.x), __float_as_uint(its.y));
    return {sum_told(blocks, kSums, 0), sum_told(blocks, kSums, 1)};
  }

 private:
  static constexpr int kNorm = 2, kSums = 3, kPlaces = 4, kWords = 2;

  __device__ static uint32_t address_of(const uint64_t& shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&shared));
  }

  // All blocks of the row have told this one when it returns.
  template <class... Words>
  __device__ void tell(RowBlocks& blocks, int place, Words... words) {
#if __CUDA_ARCH__ >= 900
    if (!blocks.are_open) {
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
      blocks.are_open = true;
    }
    static_assert(sizeof...(Words) <= kWords);
    const uint32_t barrier = address_of(arrived_[place]);
    if (threadIdx.x < blocks.count) {
      const uint32_t mine =
          static_cast<uint32_t>(__cvta_generic_to_shared(told_[place][blocks.rank]));
      send(threadIdx.x, mine, barrier, words...);
    }
    if (threadIdx.x == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(static_cast<uint32_t>(4 * sizeof...(Words)) * blocks.count)
                   : "memory");
    }
    asm volatile(
        "{\n"
        ".reg .pred arrived;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 arrived, [%0], 0;\n"
        "@!arrived bra again;\n"
        "}\n" ::"r"(barrier)
        : "memory");
#endif
  }
  __device__ static void to_block(uint32_t rank, uint32_t& to, uint32_t& barrier) {
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(barrier) : "r"(rank));
#endif
  }
  __device__ static void send(uint32_t rank, uint32_t to, uint32_t barrier, uint32_t word) {
#if __CUDA_ARCH__ >= 900
    to_block(rank, to, barrier);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
        "r"(word), "r"(barrier)
        : "memory");
#endif
  }
  __device__ static void send(uint32_t rank, uint32_t to, uint32_t barrier, uint32_t a,
                              uint32_t b) {
#if __CUDA_ARCH__ >= 900
    to_block(rank, to, barrier);
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
        "[%3];" ::"r"(to),
        "r"(a), "r"(b), "r"(barrier)
        : "memory");
#endif
  }
  // What all blocks have told, put together.
  __device__ uint32_t maximum_told(const RowBlocks& blocks, int place, int word) const {
    const uint32_t rank = threadIdx.x % 32;
    return __reduce_max_sync(0xffffffffu, rank < blocks.count ? told_[place][rank][word] : 0);
  }
  __device__ float sum_told(const RowBlocks& blocks, int place, int word) const {
    float sum = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < blocks.count; ++i) sum += __uint_as_float(told_[place][i][word]);
    return sum;
  }

  static constexpr int kMaxWarps = kMaxQuantizeThreads / 32;
  alignas(16) float sums_[kMaxWarps];
  float2 pairs_[kMaxWarps];
  uint32_t maxima_[2][kMaxWarps];
  alignas(16) uint32_t told_[kPlaces][kMaxRowBlocks][kWords];  // by each block
  uint64_t arrived_[kPlaces];
};

}  // namespace fastq::cuda
