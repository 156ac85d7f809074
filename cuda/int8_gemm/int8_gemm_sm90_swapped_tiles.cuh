// What the kernels of int8_gemm_sm90_swapped.cuh are made with, and which tiles a block has.
#pragma once

#include <cutlass/arch/barrier.h>

#include <algorithm>
#include <cstddef>

#include <cute/arch/cluster_sm90.hpp>

#include "epilogue/output.cuh"
#include "int8_gemm/gather_outliers.cuh"
#include "runtime/tma.hpp"

namespace fastq::cuda {

struct SwappedParams {
  CUtensorMap a, b;      // tokens and channels
  int tiles_m, tiles_n;  // of clusters, where there are any
  bool cluster_n;        // of neighbours along N, which share tokens; else along M: channels
  int group;             // columns of tiles that are worked off together
  int width;             // channels of a tile: a multiple of 8
  int box_m, box_n;      // tokens and channels that are loaded for a tile
  int k_tiles, stages;
  int split_k;
  bool b_is_constant;  // the kernel before this one does not write it
  bool b_is_read_once;
  int pace;  // cycles between stages of a constant b, until this kernel's turn has come
  OutputParams output;
};

template <int kTokens, int kWarpgroups, bool kIsPingpong>
struct SwappedTraits {
  static_assert(!kIsPingpong || kWarpgroups == 2);
  static constexpr bool kPingpong = kIsPingpong;
  static constexpr int kCluster = kPingpong ? 2 : 1;            // blocks that bring what both need
  static constexpr int kPerTile = kPingpong ? 1 : kWarpgroups;  // warpgroups that share a tile
  static constexpr int kBlocks = kPingpong ? 2 : 1;             // of 64 channels, of a warpgroup
  static constexpr int kBlockStride = 64 * kPerTile;
  static constexpr int kTileM = kTokens, kTileN = kBlockStride * kBlocks;
  // What a stage holds of K, in boxes of a swizzle's width. Small tiles multiply so fast that the
  // barriers of a stage are felt: two boxes share them. With larger ones, many stages are worth
  // more.
  static constexpr int kBoxK = 128, kBoxes = kTokens <= 32 || kWarpgroups == 1 ? 2 : 1;
  static constexpr int kTileK = kBoxes * kBoxK;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  // Two blocks a multiprocessor where the accumulators are few: the next kernel's can settle in
  // beside this one's.
  static constexpr bool kIsNarrow = kBlocks == 1 && kTokens * kWarpgroups <= 64;
  // Together no more than the block starts with: 128 registers a thread, 80 or 168.
  static constexpr bool kIsLargest = kBlocks * kTokens > 224;
  static constexpr int kConsumerRegisters = kIsNarrow    ? (kWarpgroups == 1 ? 192 : 104)
                                            : kIsLargest ? 232
                                                         : 224;
  static constexpr int kProducerRegisters = kWarpgroups == 1 ? 64
                                            : kIsNarrow      ? 32
                                            : kIsLargest     ? 40
                                                             : 56;
  static constexpr int kMaxStages = 32;
  // Tokens of sums written at a time, their rows padded against bank conflicts.
  static constexpr int kChunk = kTokens < 32 ? kTokens : kTokens % 32 == 0 ? 32 : 16;
  static constexpr int kPad = 4;
  // What is written of a plain output at a time, in turns that alternate between two buffers.
  static constexpr int kLines = kTokens < 64 ? kTokens : kTokens > 128 ? 32 : 64;
  static constexpr int kTurns = kBlocks * ((kTokens + kLines - 1) / kLines);
  static constexpr int kLineBuffers = kTurns > 1 ? 2 : 1;

  // Where a product takes less time than the one before it to end, several sums take turns.
  static constexpr int kChains = kTokens <= 16 && kWarpgroups == 1 ? 4 : 1;

  // The sums of a warpgroup: for every 64 channels, WGMMA's kTokens / 2 registers a thread.
  using Sums = uint32_t[kBlocks][kTokens / 2];

  // What lies behind the stages. Lines of 16-bit output take the place of the sums.
  struct Shared {
    // Of a column with outliers: x, and the weight.
    struct Outliers {
      float x[kTokens], b[64 * kBlocks];
    };
    static constexpr int kStagingBytes =
        std::max(kChunk * (64 + kPad) * 4, kLineBuffers * kLines * 128);
    // In halves: while one is added, the other is filled.
    static constexpr int kOutliers = kStagingBytes / static_cast<int>(sizeof(Outliers)) / 2;
    union Staging {
      int32_t sums[kChunk][64 + kPad];
      uint4 lines[kLineBuffers][kLines][8];
      Outliers outliers[2][kOutliers];
    };
    alignas(16) Staging staging[kWarpgroups];
    alignas(16) OutputRow rows[kWarpgroups][kTokens];
    alignas(16) float scales[kWarpgroups][kTokens];  // theirs alone
    cutlass::arch::ClusterTransactionBarrier full[kMaxStages];
    cutlass::arch::ClusterBarrier empty[kMaxStages];
    cutlass::arch::ClusterBarrier turn;  // of this kernel: what came before it has finished
    // The outliers' columns are found; a warpgroup's staging may take their elements, and has some.
    cutlass::arch::ClusterBarrier found, drained[kWarpgroups][2], filled[kWarpgroups][2];
    uint32_t phases[kWarpgroups];  // of `filled`, a bit for each half
    FoundOutliers outliers;        // the last: it is there only where the product has any
  };
  // Split-K: the whole tile's sums take the stages' place.
  using SplitSums = int32_t[kTileM][kTileN + kPad];

  static constexpr int kSmemLimit = 227 * 1024;
  static int stage_bytes(int width) { return (kTileM + width) * kTileK; }
  static int shared_bytes(bool has_outliers) {
    return static_cast<int>(has_outliers ? sizeof(Shared) : offsetof(Shared, outliers));
  }
  static int stages(int width, int blocks_per_sm, bool has_outliers) {
    const int limit = blocks_per_sm == 2 ? 113 * 1024 : kSmemLimit;
    return std::min(kMaxStages, (limit - shared_bytes(has_outliers)) / stage_bytes(width));
  }
};

// The stage of the ring and the parity of its turn.
struct RingPosition {
  int stages;
  int stage = 0;
  uint32_t phase = 0;

  __device__ void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
  __device__ void skip(int count) {
    stage += count;
    phase ^= stage / stages & 1;
    stage %= stages;
  }
};

// A block's tiles, one after the other. Tiles that run at the same time share operands in L2: they
// come from a few columns of tiles.
template <class Traits>
struct SwappedTiles {
  const SwappedParams& p;
  int index;
  int rank = 0;  // in the cluster

  __device__ explicit SwappedTiles(const SwappedParams& params)
      : p(params), index(blockIdx.x / blocks()) {
    if (blocks() > 1) rank = static_cast<int>(cute::block_rank_in_cluster());
  }
  __device__ int blocks() const { return Traits::kCluster > 1 ? Traits::kCluster : p.split_k; }
  __device__ bool has_tile() const { return index < p.tiles_m * p.tiles_n; }
  __device__ void next() { index += gridDim.x / blocks(); }
  // The first token and channel that it writes.
  __device__ int2 origin() const {
    const int per_group = p.group * p.tiles_m;
    const int first = index / per_group * p.group;
    const int group = min(p.group, p.tiles_n - first);
    const int in_group = index % per_group;
    int row = in_group / group, column = first + in_group % group;
    if (Traits::kCluster > 1) {
      row = p.cluster_n ? row : row * Traits::kCluster + rank;
      column = p.cluster_n ? column * Traits::kCluster + rank : column;
    }
    return {row * Traits::kTileM, column * p.width};
  }
  // The first token and channel that are loaded for it; the latter stays a multiple of 8.
  __device__ int2 box(int2 origin) const {
    const int last_n = p.output.N % 8 == 0 ? max(p.output.N - p.box_n, 0) : origin.y;
    return {min(origin.x, max(p.output.M - p.box_m, 0)), min(origin.y, last_n)};
  }
  __device__ int first_k() const { return p.split_k == 1 ? 0 : rank * p.k_tiles / p.split_k; }
  __device__ int last_k() const {
    return p.split_k == 1 ? p.k_tiles : (rank + 1) * p.k_tiles / p.split_k;
  }
};

}  // namespace fastq::cuda
