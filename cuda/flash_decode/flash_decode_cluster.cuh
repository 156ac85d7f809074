// The shares of a tile that the blocks of a cluster had, combined without a second kernel: as
// flash_decode_combine.cu does, in the order of the blocks, out of their shared memories.
#pragma once

#include <cooperative_groups.h>

#include "flash_decode/flash_decode_keys.cuh"
#include "flash_decode/flash_decode_work.cuh"

namespace fastq::cuda {

// Of a block, in its shared memory: (columns, kHeadDim) outputs, and a column's reference and sum.
template <int kHeadDim>
struct ClusterPart {
  float* x;
  float2* sums;
};

template <class Traits>
__device__ inline ClusterPart<Traits::kHeadDim> cluster_part(typename Traits::Shared& shared) {
  return {Traits::sums_of_warp(shared, 0), shared.references[0]};
}

// `mine` has been written. All threads of the cluster call this.
template <class Traits>
__device__ inline void combine_in_cluster(const FlashDecodeParams& params, const DecodeTile& tile,
                                          int head_k, const ClusterPart<Traits::kHeadDim>& mine) {
#if __CUDA_ARCH__ >= 900
  constexpr int kHeadDim = Traits::kHeadDim;
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  const int count = params.cluster, rank = static_cast<int>(cluster.block_rank());
  for (int i = rank * Traits::kThreads + threadIdx.x; i < tile.rows * kHeadDim;
       i += count * Traits::kThreads) {
    const int column = i / kHeadDim;
    float2 its[kMaxDecodeCluster];
    float x[kMaxDecodeCluster];
    float reference = -INFINITY;
#pragma unroll
    for (int block = 0; block < kMaxDecodeCluster; ++block) {
      its[block] = make_float2(-INFINITY, 0), x[block] = 0;
      if (block >= count) continue;
      its[block] = cluster.map_shared_rank(mine.sums, block)[column];
      x[block] = cluster.map_shared_rank(mine.x, block)[i];
    }
#pragma unroll
    for (const float2& part : its) reference = fmaxf(reference, part.x);
    float sum = 0, out[1] = {0};
#pragma unroll
    for (int block = 0; block < kMaxDecodeCluster; ++block) {
      // All references may be -inf.
      const bool is_largest = its[block].x == reference;
      const float by = is_largest ? 1.0f : fast_exp2(its[block].x - reference);
      sum += its[block].y * by;
      out[0] += x[block] * by;
    }
    store_row<typename Traits::T>(params, tile, head_k, column, reference, sum, i % kHeadDim, 1,
                                  out);
  }
  cluster.sync();  // others may still read here
#endif
}

}  // namespace fastq::cuda
