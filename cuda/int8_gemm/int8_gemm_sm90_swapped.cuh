// INT8 GEMM for Hopper (sm_90a): out (M, N) = output(a (M, K) . b (N, K)^T), see
// epilogue/output.cuh for what ends it.
//
// a and b are int8 with K contiguous, which is the only form INT8 WGMMA reads. The operands are
// swapped: the rows of WGMMA's 64-row tiles are output channels (rows of b, the weight), its
// columns are tokens (rows of a), because WGMMA's width is free in steps of 8 and its height is
// not. So one kernel serves one token as well as thousands.
//
//   block      two producer threads fill a ring of stages by TMA (128 or 256 bytes of K of every
//              row); one or two consumer warpgroups multiply, each with 64 channels x kTokens
//              tokens of int32.
//   ping-pong  two warpgroups take turns with tiles of 128 channels: one writes its tile while the
//              other has the tensor cores. Blocks come in clusters of two, neighbours along M or N:
//              each brings half of the channels or tokens that both need (multicast).
//   grid       persistent: a block walks over tiles, and the producers run ahead into the next one.
//   width      the channels of a tile are a run-time number, up to those of the instance. For few
//              tokens it is chosen so that every multiprocessor has the same share of the weight;
//              the rest of the MMA computes on whatever lies in shared memory, and is dropped.
//   edges      TMA is slow where a box leaves the matrix. So the last tile begins as far back as it
//              must to end with the matrix, and leaves to its neighbour what that one writes; a
//              matrix that is smaller than a tile gets smaller boxes.
//   split-K    the blocks of a cluster share one tile, each with a part of K. Their int32 sums meet
//              in distributed shared memory, where each block adds up and writes some of the
//              tokens. The sums are exact, so the order does not matter.
//   outliers   (llm_int8_matmul) the two producer warps that have no operands to bring gather those
//              of a tile while it is multiplied.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>
#include <cstddef>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>

#include "int8_gemm/gather_outliers.cuh"
#include "int8_gemm/int8_gemm_kernels.hpp"
#include "int8_gemm/int8_gemm_sm90_swapped_output.cuh"
#include "int8_gemm/int8_wgmma.cuh"
#include "runtime/dependent_launch.cuh"
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

// One thread of the first producer warp brings the channels, one of the second the tokens. The loop
// is kept to a few instructions: its latency bounds how fast stages can follow each other.
template <class Traits, bool kBringsB, bool kShares>
__device__ inline void swapped_produce(const SwappedParams& p, typename Traits::Shared& shared,
                                       const int8_t* stages) {
  const CUtensorMap* map = kBringsB ? &p.b : &p.a;
  const uint32_t bytes = (kBringsB ? p.box_n : p.box_m) * Traits::kTileK;
  const uint32_t stride = (kBringsB ? p.width : Traits::kTileM) * Traits::kBoxK;
  const uint32_t full = cute::cast_smem_ptr_to_uint(shared.full);
  RingPosition at{p.stages};
  at.phase = 1;  // a fresh ring is empty
  SwappedTiles<Traits> tiles(p);
  const int part = kShares ? tiles.rank * ((kBringsB ? p.box_n : p.box_m) / Traits::kCluster) : 0;
  const uint32_t target = cute::cast_smem_ptr_to_uint(stages) + part * Traits::kBoxK;
  for (; tiles.has_tile(); tiles.next()) {
    const int2 box = tiles.box(tiles.origin());
    const int row = (kBringsB ? box.y : box.x) + part;
    const int last = tiles.last_k() * Traits::kTileK;
#pragma unroll 1
    for (int k = tiles.first_k() * Traits::kTileK; k < last; k += Traits::kTileK, at.next()) {
      shared.empty[at.stage].wait(at.phase);
      const uint32_t barrier = full + 8 * at.stage;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
                   "r"(bytes)
                   : "memory");
#pragma unroll
      for (int i = 0; i < Traits::kBoxes; ++i) {
        const uint32_t box = target + (at.stage * Traits::kBoxes + i) * stride;
        if constexpr (kShares) {
          asm volatile(
              "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
              ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(box),
              "l"(map), "r"(k + i * Traits::kBoxK), "r"(row), "r"(barrier),
              "h"(static_cast<uint16_t>((1 << Traits::kCluster) - 1))
              : "memory");
        } else {
          asm volatile(
              "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
              " [%0], [%1, {%2, %3}], [%4];\n" ::"r"(box),
              "l"(map), "r"(k + i * Traits::kBoxK), "r"(row), "r"(barrier)
              : "memory");
        }
      }
    }
  }
}

// What belongs to some columns with outliers, from `first` on, and to a warpgroup's tokens (kIsX)
// or channels. By a warp; all loads are on their way before the first is looked at.
template <class Traits, bool kIsX>
__device__ inline void swapped_fill(const OutlierParams& p, const FoundOutliers& found, int first,
                                    int count, int row0,
                                    typename Traits::Shared::Outliers* outliers) {
  constexpr int kRows = kIsX ? Traits::kTileM : 64 * Traits::kBlocks, kTurns = (kRows + 31) / 32;
  const int lane = threadIdx.x % 32, rows = min(kRows, (kIsX ? p.M : p.N) - row0);
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    OutlierColumn<kIsX> column(p, found, first + c, row0 + lane, 32);
    float* const to = kIsX ? outliers[c].x : outliers[c].b;
    const uint32_t words = cute::cast_smem_ptr_to_uint(to + lane);
#pragma unroll
    for (int i = 0; i < kTurns; ++i, column.next()) {
      if (32 * i + lane >= rows) break;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(words + 128 * i),
                   "l"(word_of(column.address))
                   : "memory");
    }
  }
  float scales[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (32 * i + lane < rows) scales[i] = outlier_scale<kIsX>(p, row0 + 32 * i + lane);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    OutlierColumn<kIsX> column(p, found, first + c, row0 + lane, 32);
    float* const to = kIsX ? outliers[c].x : outliers[c].b;
    float values[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i, column.next()) {
      if (32 * i + lane >= kRows) break;
      const uint32_t word = __float_as_uint(to[32 * i + lane]);
      values[i] = outlier_value<kIsX>(p, column.is_kept, word,
                                      static_cast<uint32_t>(column.address), scales[i]);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (32 * i + lane < kRows) to[32 * i + lane] = values[i];
    }
  }
}

// The same of what has been gathered.
template <class Traits, bool kIsX>
__device__ inline void swapped_fill_gathered(const OutlierSplit& split, int first, int count,
                                             int row0,
                                             typename Traits::Shared::Outliers* outliers) {
  constexpr int kRows = kIsX ? Traits::kTileM : 64 * Traits::kBlocks;
  const int lane = threadIdx.x % 32;
  const int64_t stride = kIsX ? split.stride_gx : split.stride_gb;
  // Rows are longer than the matrix.
  const float* from = (kIsX ? split.gathered_x : split.gathered_b) + first * stride + row0 + lane;
#pragma unroll 1
  for (int c = 0; c < count; ++c, from += stride) {
    const uint32_t to = cute::cast_smem_ptr_to_uint((kIsX ? outliers[c].x : outliers[c].b) + lane);
#pragma unroll
    for (int i = 0; 32 * i < kRows; ++i) {
      if (32 * i + lane >= kRows) break;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 128 * i),
                   "l"(from + 32 * i)
                   : "memory");
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// A tile's outliers, from where they lie or as they have been gathered. `phases` has two bits of
// each warpgroup's `drained`, and above them which warpgroup's turn it is.
template <class Traits, bool kIsGathered>
__device__ inline void swapped_fill_tile(const SwappedTiles<Traits>& tiles,
                                         typename Traits::Shared& shared, uint32_t& phases) {
  constexpr int kAtATime = Traits::Shared::kOutliers;
  const OutlierParams& p = tiles.p.output.outliers;
  const int2 origin = tiles.origin(), box = tiles.box(origin);
  const auto await_drained = [&](int warpgroup, int half) {
    const int bit = 2 * warpgroup + half;
    shared.drained[warpgroup][half].wait(phases >> bit & 1);
    phases ^= 1u << bit;
  };
#pragma unroll 1
  for (int part = 0; part < Traits::kPerTile; ++part) {
    const int warpgroup = Traits::kPingpong ? phases >> 4 : part, n0 = box.y + 64 * part;
    const bool has_part = n0 < min(p.N, origin.y + tiles.p.width);
    const int count = has_part ? shared.outliers.gathered() : 0;
#pragma unroll 1
    for (int first = 0, half = 0; first < count; first += kAtATime, half ^= 1) {
      // All the staging becomes free with a tile, and then a half when it has been added.
      if (first != kAtATime) await_drained(warpgroup, half);
      if (first == 0) await_drained(warpgroup, 1);
      auto* const to = shared.staging[warpgroup].outliers[half];
      const int some = min(kAtATime, count - first);
      const bool is_x = threadIdx.x % 64 < 32;
      if constexpr (kIsGathered) {
        is_x ? swapped_fill_gathered<Traits, true>(p.split, first, some, box.x, to)
             : swapped_fill_gathered<Traits, false>(p.split, first, some, n0, to);
      } else {
        is_x ? swapped_fill<Traits, true>(p, shared.outliers, first, some, box.x, to)
             : swapped_fill<Traits, false>(p, shared.outliers, first, some, n0, to);
      }
      shared.filled[warpgroup][half].arrive();
    }
  }
  if constexpr (Traits::kPingpong) phases ^= 1u << 4;
}

// The outliers of all tiles, by the other two producer warps. The first tile does not wait for what
// the blocks gather together.
template <class Traits>
__device__ inline void swapped_gather(const SwappedParams& p, typename Traits::Shared& shared) {
  const OutlierParams& outliers = p.output.outliers;
  find_outliers(outliers, shared.outliers, [] { cutlass::arch::NamedBarrier::sync(64, 5); });
  if (threadIdx.x % 64 == 0) shared.found.arrive();
  if (shared.outliers.total() == 0) return;
  SwappedTiles<Traits> tiles(p);
  uint32_t phases = 0;
#pragma unroll 1
  do {
    swapped_fill_tile<Traits, false>(tiles, shared, phases);
    tiles.next();
  } while (tiles.has_tile() && (Traits::kIsNarrow || outliers.split.counters == nullptr));
  if constexpr (!Traits::kIsNarrow) {  // a narrow tile has few elements
    if (!tiles.has_tile()) return;
    gather_together(outliers, shared.outliers);
#pragma unroll 1
    for (; tiles.has_tile(); tiles.next()) swapped_fill_tile<Traits, true>(tiles, shared, phases);
  }
}

// One tile's sums, accumulated over the ring. Calls all_issued() once the tensor cores have it all.
template <class Traits, class AllIssued>
__device__ inline void swapped_accumulate(const SwappedParams& p, typename Traits::Shared& shared,
                                          const int8_t* stages_b, const int8_t* stages_a,
                                          int k_tiles, RingPosition& at, int thread,
                                          typename Traits::Sums& sums,
                                          const AllIssued& all_issued) {
  using Wgmma = Int8Wgmma<Traits::kTileM>;
  // Of the first stage; a warpgroup that shares its tile has the second 64 channels of it. The
  // shuffles, here and below, give what is the same in every lane, as the compiler cannot tell:
  // descriptors in uniform registers spare it many moves between the products.
  const int warpgroup = Traits::kPerTile > 1 ? __shfl_sync(0xffffffffu, thread / 128, 0) : 0;
  const uint32_t first_b = wgmma_address(stages_b) + wgmma_offset(warpgroup * 64);
  const uint32_t first_a = wgmma_address(stages_a);

  const auto release = [&](int stage) {
    if constexpr (Traits::kCluster > 1) {
      shared.empty[stage].arrive(thread % 128, thread % 128 < Traits::kCluster);
    } else {
      if (thread % 128 == 0) shared.empty[stage].arrive();
    }
  };
  int previous = 0;
  bool accumulate = false;
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k) {
    const int stage = __shfl_sync(0xffffffffu, at.stage, 0);
    shared.full[at.stage].wait(at.phase);
    wgmma_fence(sums);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < Traits::kBoxes; ++i) {
      const int box = stage * Traits::kBoxes + i;
      const uint32_t b = first_b + wgmma_offset(box * p.width);
      const uint32_t a = first_a + wgmma_offset(box * Traits::kTileM);
#pragma unroll
      for (int j = 0; j < Traits::kBoxK / kWgmmaK; ++j) {
#pragma unroll
        for (int block = 0; block < Traits::kBlocks; ++block) {
          wgmma<Wgmma>(b + wgmma_offset(block * Traits::kBlockStride) + j * kWgmmaStepK,
                       a + j * kWgmmaStepK, sums[block], accumulate);
        }
        accumulate = true;
      }
    }
    cute::warpgroup_commit_batch();
    if (k > 0) {
      cute::warpgroup_wait<1>();
      release(previous);
    }
    previous = at.stage;
    at.next();
  }
  all_issued();
  cute::warpgroup_wait<0>();
  wgmma_fence(sums);
  release(previous);
}

// One tile of a split-K cluster: its sums go to shared memory, from where the blocks add them up.
template <class Traits>
__device__ inline void swapped_split_tile(const SwappedParams& p, const SwappedTiles<Traits>& tiles,
                                          int8_t* stages_b, int8_t* stages_a,
                                          typename Traits::Shared& shared, RingPosition& at,
                                          typename Traits::Sums& acc) {
  const int thread = threadIdx.x, lane128 = thread % 128;
  const int2 origin = tiles.origin();
  const int2 box = tiles.box(origin);
  const int n_end = min(p.output.N, origin.y + p.width);
  OutputColumns columns;  // read ahead of the main loop, which hides the latency
  const int n = box.y + thread % (Traits::kTileN / 8) * 8;
  if (n < n_end) load_columns(p.output, n, columns);
  swapped_accumulate<Traits>(p, shared, stages_b, stages_a, tiles.last_k() - tiles.first_k(), at,
                             thread, acc, [] {});
  auto& sums = *reinterpret_cast<typename Traits::SplitSums*>(stages_b);
  cutlass::arch::NamedBarrier::sync(Traits::kConsumers, 1);  // nobody reads the stages now
  const int rows = p.output.M - box.x;
  for_each_sum<Traits::kTileM>(lane128, [&](int i, int channel, int token) {
    if (token < rows) sums[token][thread / 128 * 64 + channel] = acc[0][i];
  });
  cute::cluster_sync();
  swapped_reduce<Traits>(p.output, sums, box, origin, n_end, tiles.rank, p.split_k, thread,
                         columns);
  cute::cluster_sync();  // the others may still read here
}

// The outliers' products, as they are filled in, are added to what are floats by then.
template <class Traits>
__device__ inline void swapped_add_outliers(typename Traits::Shared& shared,
                                            const SwappedPart& part, int warpgroup,
                                            typename Traits::Sums& acc) {
  constexpr int kAtATime = Traits::Shared::kOutliers;
  const int count = shared.outliers.gathered(), chunks = (count + kAtATime - 1) / kAtATime;
  const uint32_t phases = shared.phases[warpgroup];
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int half = chunk % 2, first = chunk * kAtATime;
    shared.filled[warpgroup][half].wait((phases >> half ^ chunk >> 1) & 1);
    swapped_add_outliers<Traits>(shared.staging[warpgroup].outliers[half],
                                 min(kAtATime, count - first), part.lane128, acc);
    if (chunk + 2 < chunks) shared.drained[warpgroup][half].arrive();
  }
  part.sync();  // what is written takes the same place
  // The first half has been filled once more than the second where the chunks are odd.
  const uint32_t turned = ((chunks + 1) / 2 & 1) | (chunks / 2 & 1) << 1;
  if (part.lane128 == 0) shared.phases[warpgroup] = phases ^ turned;
}

// A consumer warpgroup: the sums of its tiles, and what becomes of them.
template <class Traits>
__device__ inline void swapped_consume(const SwappedParams& p, typename Traits::Shared& shared,
                                       int8_t* stages_b, int8_t* stages_a) {
  using cutlass::arch::NamedBarrier;
  constexpr int kRows = (Traits::kTileM + 127) / 128;
  const int thread = threadIdx.x, warpgroup = thread / 128, lane128 = thread % 128;
  typename Traits::Sums acc;
  RingPosition at{p.stages};
  // Ping-pong: a warpgroup begins when the other has issued its last product, as the ring's parity
  // tells apart no more than one turn. Barrier 3 + i says so to warpgroup i.
  [[maybe_unused]] bool is_mine = warpgroup == 1;
  if (Traits::kPingpong && warpgroup == 1) NamedBarrier::arrive(256, 3);
  const bool has_outliers = p.output.outliers.split.masks != nullptr;
  for (SwappedTiles<Traits> tiles(p); tiles.has_tile(); tiles.next()) {
    if constexpr (Traits::kPingpong) {
      is_mine = !is_mine;
      if (!is_mine) {
        at.skip(p.k_tiles);
        continue;
      }
    } else {
      if (p.split_k > 1) {
        swapped_split_tile<Traits>(p, tiles, stages_b, stages_a, shared, at, acc);
        continue;
      }
    }
    const int2 origin = tiles.origin();
    const int2 box = tiles.box(origin);
    const int n_end = min(p.output.N, origin.y + p.width);
    const int n0 = box.y + (Traits::kPingpong ? 0 : 64 * warpgroup);

    // Read ahead of the main loop, which hides the latency.
    OutputRow rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = box.x + 128 * i + lane128;
      if (m < p.output.M) rows[i] = load_row(p.output, m);
    }
    SwappedPlainColumns<Traits> columns;
    if (p.output.is_plain) columns.load(p.output, n0, lane128);

    const SwappedPart part{box.x, n0, origin.x, origin.y, n_end, lane128, 1 + warpgroup};
    auto& staging = shared.staging[warpgroup];
    part.sync();  // the tile before has been written
    if (has_outliers && n0 < n_end) {
      shared.drained[warpgroup][0].arrive();
      shared.drained[warpgroup][1].arrive();
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (128 * i + lane128 >= Traits::kTileM) continue;
      shared.rows[warpgroup][128 * i + lane128] = rows[i];
      shared.scales[warpgroup][128 * i + lane128] = rows[i].scale_a;
    }
    part.sync();

    if constexpr (Traits::kPingpong) NamedBarrier::sync(256, 3 + warpgroup);
    swapped_accumulate<Traits>(p, shared, stages_b, stages_a, p.k_tiles, at,
                               Traits::kPingpong ? lane128 : thread, acc, [&] {
                                 if constexpr (Traits::kPingpong)
                                   NamedBarrier::arrive(256, 4 - warpgroup);
                               });

    if (n0 >= n_end) continue;
    const float* scales = shared.scales[warpgroup];
    int outliers = 0;
    if (has_outliers) {
      shared.found.wait(0);
      outliers = shared.outliers.total();
    }
    const bool is_scaled = outliers > 0;
    if (is_scaled) {
      if (!p.output.is_plain) columns.load(p.output, n0, lane128);
      swapped_scale<Traits>(scales, part, columns, acc);
      swapped_add_outliers<Traits>(shared, part, warpgroup, acc);
    }
    if (!p.output.is_plain || outliers > kOutlierCapacity) {
      swapped_write<Traits>(p.output, staging, shared.rows[warpgroup], part, {outliers, is_scaled},
                            acc);
    } else if (p.output.dtype == DType::kBFloat16) {
      swapped_write_plain<Traits, DType::kBFloat16>(p.output, staging, scales, part, columns,
                                                    is_scaled, acc);
    } else {
      swapped_write_plain<Traits, DType::kFloat16>(p.output, staging, scales, part, columns,
                                                   is_scaled, acc);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kIsNarrow ? 2 : 1)
    int8_gemm_sm90_swapped(const __grid_constant__ SwappedParams p) {
  extern __shared__ __align__(1024) int8_t stages_b[];
  int8_t* stages_a = stages_b + p.stages * p.width * Traits::kTileK;
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(stages_a + p.stages * Traits::kTileM *
                                                                            Traits::kTileK);

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.a));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.b));
    for (int i = 0; i < p.stages; ++i) {
      shared.full[i].init(2);  // the two producers
      shared.empty[i].init(Traits::kPerTile * Traits::kCluster);
    }
    shared.found.init(1);
    for (int i = 0; i < Traits::kConsumers / 128; ++i) {
      for (int half = 0; half < 2; ++half) {
        shared.drained[i][half].init(128);
        shared.filled[i][half].init(64);  // the threads that gather
      }
      shared.phases[i] = 0;
    }
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (Traits::kCluster > 1) {
    cute::cluster_sync();
  } else {
    __syncthreads();
  }
  // A constant weight is brought while the kernel before this one still runs.
  if (threadIdx.x / 32 != Traits::kConsumers / 32 || !p.b_is_constant) {
    wait_for_predecessor();
    let_successor_start();
  }

  if (threadIdx.x >= Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - Traits::kConsumers / 32;
    if (warp < 2 && cute::elect_one_sync()) {
      constexpr bool kShares = Traits::kCluster > 1;
      const bool shares = kShares && (warp == 0) != p.cluster_n;
      if (warp == 0) {
        shares ? swapped_produce<Traits, true, kShares>(p, shared, stages_b)
               : swapped_produce<Traits, true, false>(p, shared, stages_b);
      } else {
        shares ? swapped_produce<Traits, false, kShares>(p, shared, stages_a)
               : swapped_produce<Traits, false, false>(p, shared, stages_a);
      }
    }
    if (threadIdx.x % 128 >= 64 && p.output.outliers.split.masks != nullptr) {
      swapped_gather<Traits>(p, shared);
    }
    __syncwarp();
    if (Traits::kCluster == 1 && p.split_k > 1) {
      cute::cluster_sync();
      cute::cluster_sync();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    swapped_consume<Traits>(p, shared, stages_b, stages_a);
  }
  // No block may leave while the other still writes to it.
  if constexpr (Traits::kCluster > 1) cute::cluster_sync();
}

template <int kTokens, int kWarpgroups, bool kPingpong>
struct Sm90SwappedGemm {
  using Traits = SwappedTraits<kTokens, kWarpgroups, kPingpong>;
  static constexpr int kCluster = Traits::kCluster;
  static constexpr auto kKernel = &int8_gemm_sm90_swapped<Traits>;

  static void load() {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Traits::kSmemLimit),
          "loading an sm_90a INT8 GEMM");
  }

  static void launch(const GemmLaunch& launch) {
    const Int8GemmProblem& p = *launch.problem;
    const GemmConfig& c = *launch.config;
    const int width = c.width > 0 ? c.width : Traits::kTileN;
    SwappedParams params;
    // A box that two blocks bring has a fixed size.
    const int cluster_n = c.cluster_n ? kCluster : 1, cluster_m = kCluster / cluster_n;
    params.cluster_n = c.cluster_n;
    params.box_m = static_cast<int>(cluster_n > 1 ? kTokens : std::min<int64_t>(kTokens, p.M));
    params.box_n = static_cast<int>(cluster_m > 1 ? width : std::min<int64_t>(width, p.N));
    params.a = cached_operand_map(launch.a, p.M, p.K, launch.ld_a, params.box_m / cluster_n);
    params.b = cached_operand_map(launch.b, p.N, p.K, launch.ld_b, params.box_n / cluster_m);
    params.tiles_m = static_cast<int>(ceil_div(p.M, kTokens * cluster_m));
    params.tiles_n = static_cast<int>(ceil_div(p.N, width * cluster_n));
    // Neighbouring multiprocessors get channels fastest that both need. Many rows of tiles would
    // leave too little of the tokens in L2, and clusters along M are such neighbours already.
    const bool is_row_fastest = params.tiles_m <= 16 && cluster_m == 1;
    params.group = is_row_fastest ? 1 : 16 / kCluster;
    params.width = width;
    params.k_tiles = static_cast<int>(ceil_div(p.K, Traits::kTileK));
    const bool has_outliers = p.outliers != nullptr;
    params.stages = Traits::stages(width, c.blocks_per_sm, has_outliers);
    params.split_k = c.split_k;
    params.b_is_constant = launch.b_is_constant;
    params.output = output_params(p);

    const int64_t tiles = int64_t{params.tiles_m} * params.tiles_n;
    const int cluster = kCluster > 1 ? kCluster : c.split_k;
    const int64_t resident = launch.device->sm_count * c.blocks_per_sm / cluster;
    cudaLaunchConfig_t config{};
    config.gridDim =
        static_cast<unsigned>((c.split_k > 1 ? tiles : std::min(tiles, resident)) * cluster);
    config.blockDim = Traits::kThreads;
    config.dynamicSmemBytes =
        params.stages * Traits::stage_bytes(width) + Traits::shared_bytes(has_outliers);
    config.stream = launch.stream;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0] = dependent_launch();
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.attrs = attributes;
    config.numAttrs = cluster > 1 ? 2 : 1;  // an attribute costs the host time
    check(cudaLaunchKernelEx(&config, kKernel, params), "launching an sm_90a INT8 GEMM");
  }

  static bool register_kernel() {
    return register_gemm_kernel({KernelFamily::kSm90,
                                 {kTokens, Traits::kTileN, Traits::kTileK,
                                  kPingpong ? Schedule::kSwappedPingpong : Schedule::kSwapped},
                                 &launch,
                                 &load});
  }
};

}  // namespace fastq::cuda
