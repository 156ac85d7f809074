// Hopper's WGMMA for int8: sums (64, N) += a (64, 32) . b (N, 32)^T, both in shared memory, exact
// int32 sums in the registers of a warpgroup.
//
// The operands are rows of 128 bytes of K as TMA writes them with a swizzle of 128 bytes. CuTe's
// tiled MMAs would say the same, but their templates take a minute to compile, and a kernel's
// instances come in dozens.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // widths that are no power of two
#include <cstdint>
#include <utility>

#include <cute/arch/mma_sm90.hpp>

namespace fastq::cuda {

template <int kN>
struct Int8Wgmma;

#define FASTQ_INT8_WGMMA(n) \
  template <>               \
  struct Int8Wgmma<n> : cute::SM90::GMMA::MMA_64x##n##x32_S32S8S8_SS_TN {};
FASTQ_INT8_WGMMA(8)
FASTQ_INT8_WGMMA(16)
FASTQ_INT8_WGMMA(32)
FASTQ_INT8_WGMMA(64)
FASTQ_INT8_WGMMA(80)
FASTQ_INT8_WGMMA(96)
FASTQ_INT8_WGMMA(112)
FASTQ_INT8_WGMMA(128)
FASTQ_INT8_WGMMA(144)
FASTQ_INT8_WGMMA(160)
FASTQ_INT8_WGMMA(192)
#undef FASTQ_INT8_WGMMA

constexpr int kWgmmaK = 32;  // of one instruction

// Where an operand begins, as its descriptor has it: in units of 16 bytes. `rows` begins at a
// multiple of 1024 bytes.
__device__ inline uint32_t wgmma_address(const int8_t* rows) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(rows)) / 16;
}

// What `rows` more rows, a multiple of 8, and the next kWgmmaK of K add to it.
__device__ inline uint32_t wgmma_offset(int rows) { return rows * (128 / 16); }
constexpr uint32_t kWgmmaStepK = kWgmmaK / 16;

// 1024 bytes from eight rows to the next eight, swizzle of 128 bytes.
__device__ inline uint64_t wgmma_descriptor(uint32_t address) {
  return uint64_t{1u << 30 | 1024 / 16} << 32 | address;
}

template <class Wgmma, int kSums, int... i>
__device__ inline void wgmma(uint32_t a, uint32_t b, uint32_t (&sums)[kSums], bool accumulate,
                             std::integer_sequence<int, i...>) {
  using cute::SM90::GMMA::ScaleOut;
  Wgmma::fma(wgmma_descriptor(a), wgmma_descriptor(b), sums[i]...,
             accumulate ? ScaleOut::One : ScaleOut::Zero);
}

template <class Wgmma, int kSums>
__device__ inline void wgmma(uint32_t a, uint32_t b, uint32_t (&sums)[kSums], bool accumulate) {
  wgmma<Wgmma>(a, b, sums, accumulate, std::make_integer_sequence<int, kSums>{});
}

// The compiler does not move accesses to the sums past this.
template <int kBlocks, int kSums>
__device__ inline void wgmma_fence(uint32_t (&sums)[kBlocks][kSums]) {
#pragma unroll
  for (auto& block : sums) {
#pragma unroll
    for (uint32_t& sum : block) cute::warpgroup_fence_operand(sum);
  }
}

}  // namespace fastq::cuda
