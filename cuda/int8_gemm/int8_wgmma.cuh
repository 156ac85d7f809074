// Hopper's WGMMA for int8: sums (64, N) += a (64, 32) . b (N, 32)^T, both in shared memory, exact
// int32 sums in the registers of a warpgroup.
#pragma once

#include <utility>

#include "runtime/wgmma.cuh"

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

// What the next kWgmmaK of K add to an address.
constexpr uint32_t kWgmmaStepK = kWgmmaK / 16;

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

}  // namespace fastq::cuda
