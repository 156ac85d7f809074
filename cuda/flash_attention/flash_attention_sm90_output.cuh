// FlashAttention for Hopper: how the outputs in a warp's registers get to memory. By TMA where
// shared memory has room for them and no other sequence's rows follow; else from the registers.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "flash_attention/flash_attention_sm90_producers.cuh"
#include "runtime/mma_sync.cuh"

namespace fastq::cuda {

// Outputs of this warp's 16 rows, from `first` on, by way of shared memory, from where TMA takes
// them: what lies past the tensor is left out.
template <class Traits>
__device__ __forceinline__ void store_outputs_by_tma(const Sm90AttentionParams& params,
                                                     const QueryTile& tile, int first,
                                                     const float (&o)[Traits::kHeadDim / 8][4],
                                                     const float (&scale)[2],
                                                     typename Traits::OutputPanel* panels) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % 32;
  // The last outputs are in memory: these may be the same tile's, done again.
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  __syncwarp();
  // Lanes 8 i to 8 i + 7 have the rows of matrix i: 8 upper rows, 8 lower, then the next 8 columns.
  const uint32_t row = static_cast<uint32_t>(__cvta_generic_to_shared(panels)) + lane % 16 * 128;
  const uint32_t to = row + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
  for (int i = 0; i < Traits::kPanels; ++i) {
    const int at = i % Traits::kOutputPanels;
    if (i >= Traits::kOutputPanels) {  // when TMA has read what was there
      if (lane == 0) cute::tma_store_wait<Traits::kOutputPanels - 1>();
      __syncwarp();
    }
#pragma unroll
    for (int j = 8 * i; j < 8 * i + 8 && j < Traits::kHeadDim / 8; j += 2) {
      uint32_t x[4];
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        const float* const y = o[j + l / 2] + l % 2 * 2;
        x[l] = pack(y[0] * scale[l % 2], y[1] * scale[l % 2], T{});
      }
      store_matrices((to ^ (j % 8 << 4)) + at * sizeof(*panels), x);
    }
    cute::tma_store_fence();
    __syncwarp();
    if (lane == 0 && first < tile.seqlen_q) {
      cute::SM90_TMA_STORE_4D::copy(&params.out, panels[at], 64 * i, first, tile.head, tile.batch);
      cute::tma_store_arrive();
    }
  }
}

// One store, which the compiler would take apart where registers do not lie as it needs them.
__device__ inline void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Outputs of this lane's two rows. Four lanes have a row: of each 32 columns they exchange eight
// times two for eight in a row, which is a store of 16 bytes. (Stores of 4 bytes take longer than
// all this.)
template <class Traits>
__device__ __forceinline__ void store_outputs(const Sm90AttentionParams& params,
                                              const QueryTile& tile, int query,
                                              const float (&o)[Traits::kHeadDim / 8][4],
                                              const float (&scale)[2]) {
  using T = typename Traits::T;
  constexpr int kWords = Traits::kHeadDim / 8;
  uint32_t x[2][kWords];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      x[half][j] = pack(o[j][2 * half] * scale[half], o[j][2 * half + 1] * scale[half], T{});
    }
  }
  const int lane = threadIdx.x % 4;
  const int head_dim = static_cast<int>(params.problem.head_dim);
  uint16_t* const out = tile.row_of<uint16_t>(params.problem.out, tile.begin_q, query, tile.head);
  const int64_t next = 8 * params.problem.out.stride_seqlen;  // the second row
  const int rows = tile.seqlen_q - query;
  if (params.out_is_vectorizable) {
    // Transposes words 4 by 4, all of them at a time: a shuffle has a long latency.
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
      const bool is_upper = (lane & step) != 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t got[kWords];
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
          if ((j & step) == 0) {
            const uint32_t given = is_upper ? x[half][j] : x[half][j + step];
            got[j] = __shfl_xor_sync(0xffffffffu, given, step);
          }
        }
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
          if ((j & step) == 0) {
            x[half][j] = is_upper ? got[j] : x[half][j];
            x[half][j + step] = is_upper ? x[half][j + step] : got[j];
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kWords; j += 4) {
        const int d = 8 * (j + lane);
        const uint32_t (&y)[kWords] = x[half];
        if (8 * half < rows && d < head_dim) {
          store_16(out + half * next + d, y[j], y[j + 1], y[j + 2], y[j + 3]);
        }
      }
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = 8 * j + 2 * lane + i;
        if (8 * half < rows && d < head_dim) {
          out[half * next + d] = static_cast<uint16_t>(x[half][j] >> 16 * i);
        }
      }
    }
  }
}

}  // namespace fastq::cuda
