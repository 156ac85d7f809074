// Hopper's WGMMAs of attention, 16-bit operands and float32 sums in the registers of a warpgroup:
//   scores (64, N) = q (64, d) . k (N, d)^T       q and k in shared memory
//   outputs (64, N) += p (64, keys) . v (keys, N)  p in registers, v in shared memory
// Registers are x[N / 8][4], as flash_attention_tile.cuh has them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

#include "runtime/wgmma.cuh"

namespace fastq::cuda {

template <class T, int kN>
struct ScoresWgmma;
template <class T, int kN>
struct OutputWgmma;

#define FASTQ_SCORES_WGMMA(n)                                                          \
  template <>                                                                          \
  struct ScoresWgmma<__half, n>                                                        \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K,     \
                                                       cute::SM90::GMMA::Major::K> {}; \
  template <>                                                                          \
  struct ScoresWgmma<__nv_bfloat16, n>                                                 \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K,   \
                                                         cute::SM90::GMMA::Major::K> {};
#define FASTQ_OUTPUT_WGMMA(n)                                                           \
  template <>                                                                           \
  struct OutputWgmma<__half, n>                                                         \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K,      \
                                                       cute::SM90::GMMA::Major::MN> {}; \
  template <>                                                                           \
  struct OutputWgmma<__nv_bfloat16, n>                                                  \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K,    \
                                                         cute::SM90::GMMA::Major::MN> {};
FASTQ_SCORES_WGMMA(64)
FASTQ_SCORES_WGMMA(80)
FASTQ_SCORES_WGMMA(112)
FASTQ_SCORES_WGMMA(128)
FASTQ_OUTPUT_WGMMA(64)
FASTQ_OUTPUT_WGMMA(96)
FASTQ_OUTPUT_WGMMA(128)
FASTQ_OUTPUT_WGMMA(192)
FASTQ_OUTPUT_WGMMA(256)
#undef FASTQ_SCORES_WGMMA
#undef FASTQ_OUTPUT_WGMMA

template <class Wgmma, int kTiles, int... i>
__device__ __forceinline__ void scores_wgmma(uint32_t q, uint32_t k, float (&s)[kTiles][4],
                                             bool accumulate, std::integer_sequence<int, i...>) {
  using cute::SM90::GMMA::ScaleOut;
  Wgmma::fma(wgmma_descriptor(q), wgmma_descriptor(k), s[i / 4][i % 4]...,
             accumulate ? ScaleOut::One : ScaleOut::Zero);
}

// s = q . k^T over kHeadDim, in panels of 64 columns. A panel of q has 64 rows, of k 8 * kTiles.
template <class T, int kHeadDim, int kTiles>
__device__ __forceinline__ void scores_wgmma(uint32_t q, uint32_t k, float (&s)[kTiles][4]) {
#pragma unroll
  for (int d = 0; d < kHeadDim; d += 16) {
    const uint32_t in_panel = d % 64 / 8;
    scores_wgmma<ScoresWgmma<T, 8 * kTiles>>(q + d / 64 * wgmma_offset(64) + in_panel,
                                             k + d / 64 * wgmma_offset(8 * kTiles) + in_panel, s,
                                             d > 0, std::make_integer_sequence<int, 4 * kTiles>{});
  }
}

template <class Wgmma, int kTiles, int... i>
__device__ __forceinline__ void output_wgmma(const uint32_t (&p)[4], uint64_t v,
                                             float (&o)[kTiles][4],
                                             std::integer_sequence<int, i...>) {
  Wgmma::fma(p[0], p[1], p[2], p[3], v, o[i / 4][i % 4]..., cute::SM90::GMMA::ScaleOut::One);
}

// o += p . v over steps kBegin to kEnd of 16 keys. A panel of v has 16 * kSteps rows, and 64
// columns.
template <class T, int kBegin, int kEnd, int kSteps, int kTiles>
__device__ __forceinline__ void output_wgmma(const uint32_t (&p)[kSteps][4], uint32_t v,
                                             float (&o)[kTiles][4]) {
#pragma unroll
  for (int step = kBegin; step < kEnd; ++step) {
    const uint64_t rows = wgmma_descriptor(v + wgmma_offset(16 * step), wgmma_offset(16 * kSteps));
    output_wgmma<OutputWgmma<T, 8 * kTiles>>(p[step], rows, o,
                                             std::make_integer_sequence<int, 4 * kTiles>{});
  }
}

}  // namespace fastq::cuda
