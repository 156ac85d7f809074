// What all of Hopper's WGMMAs share: how shared memory is described to them, and fences.
//
// Operands are panels of rows of 128 bytes as TMA writes them with a swizzle of 128 bytes, each
// beginning at a multiple of 1024 bytes. CuTe's tiled MMAs would say the same, but their templates
// take a minute to compile, and a kernel's instances come in dozens.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // widths that are no power of two
#include <cstdint>
#include <utility>

#include <cute/arch/mma_sm90.hpp>

namespace fastq::cuda {

// Where an operand begins, as its descriptor has it: in units of 16 bytes.
__device__ inline uint32_t wgmma_address(const void* panel) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(panel)) / 16;
}

// What `rows` more rows, a multiple of 8, add to it.
__host__ __device__ constexpr uint32_t wgmma_offset(int rows) { return rows * (128 / 16); }

// 1024 bytes from eight rows to the next eight, swizzle of 128 bytes. Rows are M or N of the
// product and bytes K; or rows are K (MN-major), and `panel` is the distance to the next 128 bytes
// of N.
__device__ inline uint64_t wgmma_descriptor(uint32_t address, uint32_t panel = 0) {
  return uint64_t{1u << 30 | 1024 / 16} << 32 | (panel << 16 | address);
}

// The compiler does not move accesses to the registers past this. (No loop: where there are many of
// these, it would rather keep the array in memory than unroll them all.)
template <class T, int kRows, int kColumns, int... i>
__device__ __forceinline__ void wgmma_fence(T (&registers)[kRows][kColumns],
                                            std::integer_sequence<int, i...>) {
  (cute::warpgroup_fence_operand(registers[i / kColumns][i % kColumns]), ...);
}
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void wgmma_fence(T (&registers)[kRows][kColumns]) {
  wgmma_fence(registers, std::make_integer_sequence<int, kRows * kColumns>{});
}

}  // namespace fastq::cuda
