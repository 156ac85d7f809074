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
//   ahead      a constant weight is brought while the kernels before this one still run, no faster
//              than memory can, lest they wait long for their few bytes. Of few tokens' weight L2
//              keeps nothing that it has other things to keep for: nobody reads it again.
//   few        Few tokens wait for memory: sums by mma.sync, which take half as long, and blocks
//              that quantise their token themselves gained nothing in steps of decoding (H200).
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

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>

#include "int8_gemm/int8_gemm_kernels.hpp"
#include "int8_gemm/int8_gemm_sm90_swapped_outliers.cuh"
#include "int8_gemm/int8_gemm_sm90_swapped_output.cuh"
#include "int8_gemm/int8_gemm_sm90_swapped_tiles.cuh"
#include "int8_gemm/int8_wgmma.cuh"
#include "runtime/copy_async.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/tma.hpp"

namespace fastq::cuda {

// Of this multiprocessor's clock; differences of less than 2^32 are right.
__device__ inline uint32_t cycles() { return static_cast<uint32_t>(clock64()); }

// Who reads what a block brings: itself and others that bring it for themselves; the two blocks of
// a cluster, half of it from each; or nobody else.
enum class Readers { kMany, kPair, kOne };

// One thread of the first producer warp brings the channels, one of the second the tokens. The loop
// is kept to a few instructions: its latency bounds how fast stages can follow each other.
template <class Traits, bool kBringsB, Readers kReaders>
__device__ inline void swapped_produce(const SwappedParams& p, typename Traits::Shared& shared,
                                       const int8_t* stages) {
  constexpr bool kShares = kReaders == Readers::kPair;
  const CUtensorMap* map = kBringsB ? &p.b : &p.a;
  const uint32_t bytes = (kBringsB ? p.box_n : p.box_m) * Traits::kTileK;
  const uint32_t stride = (kBringsB ? p.width : Traits::kTileM) * Traits::kBoxK;
  const uint32_t full = cute::cast_smem_ptr_to_uint(shared.full);
  RingPosition at{p.stages};
  at.phase = 1;  // a fresh ring is empty
  SwappedTiles<Traits> tiles(p);
  const int part = kShares ? tiles.rank * ((kBringsB ? p.box_n : p.box_m) / Traits::kCluster) : 0;
  const uint32_t target = cute::cast_smem_ptr_to_uint(stages) + part * Traits::kBoxK;
  [[maybe_unused]] const uint64_t first_to_go = kReaders == Readers::kOne ? evict_first() : 0;
  [[maybe_unused]] const uint32_t begin = cycles();
  [[maybe_unused]] int ahead = kReaders == Readers::kOne && p.b_is_constant ? p.stages : 0;
  [[maybe_unused]] uint32_t due = 0;
  for (; tiles.has_tile(); tiles.next()) {
    const int2 box = tiles.box(tiles.origin());
    const int row = (kBringsB ? box.y : box.x) + part;
    const int last = tiles.last_k() * Traits::kTileK;
#pragma unroll 1
    for (int k = tiles.first_k() * Traits::kTileK; k < last; k += Traits::kTileK, at.next()) {
      if constexpr (kReaders == Readers::kOne) {
        if (ahead > 0) {
          while (cycles() - begin < due && !shared.turn.test_wait(0)) continue;
          due += p.pace;
          --ahead;
        }
      }
      shared.empty[at.stage].wait(at.phase);
      const uint32_t barrier = full + 8 * at.stage;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
                   "r"(bytes)
                   : "memory");
#pragma unroll
      for (int i = 0; i < Traits::kBoxes; ++i) {
        const uint32_t box = target + (at.stage * Traits::kBoxes + i) * stride;
        if constexpr (kReaders == Readers::kPair) {
          asm volatile(
              "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
              ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(box),
              "l"(map), "r"(k + i * Traits::kBoxK), "r"(row), "r"(barrier),
              "h"(static_cast<uint16_t>((1 << Traits::kCluster) - 1))
              : "memory");
        } else if constexpr (kReaders == Readers::kOne) {
          asm volatile(
              "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
              ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(box),
              "l"(map), "r"(k + i * Traits::kBoxK), "r"(row), "r"(barrier), "l"(first_to_go)
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
  uint32_t others[std::max(Traits::kChains - 1, 1)][Traits::kTileM / 2];
  int previous = 0;
  bool accumulate = false;
#pragma unroll 1
  for (int k = 0; k < k_tiles; ++k) {
    const int stage = __shfl_sync(0xffffffffu, at.stage, 0);
    shared.full[at.stage].wait(at.phase);
    wgmma_fence(sums);
    if constexpr (Traits::kChains > 1) wgmma_fence(others);
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
          const int chain = j % Traits::kChains;
          wgmma<Wgmma>(b + wgmma_offset(block * Traits::kBlockStride) + j * kWgmmaStepK,
                       a + j * kWgmmaStepK, chain == 0 ? sums[block] : others[chain - 1],
                       accumulate);
        }
        if (j + 1 >= Traits::kChains) accumulate = true;
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
  if constexpr (Traits::kChains > 1) {
    wgmma_fence(others);
#pragma unroll
    for (const auto& chain : others) {
#pragma unroll
      for (int i = 0; i < Traits::kTileM / 2; ++i) sums[0][i] += chain[i];
    }
  }
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
    if constexpr (Traits::kPingpong) NamedBarrier::sync(256, 3 + warpgroup);
    swapped_accumulate<Traits>(p, shared, stages_b, stages_a, p.k_tiles, at,
                               Traits::kPingpong ? lane128 : thread, acc, [&] {
                                 if constexpr (Traits::kPingpong)
                                   NamedBarrier::arrive(256, 4 - warpgroup);
                               });

    if (n0 >= n_end) continue;
    // Not before the main loop, which would wait for them.
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (128 * i + lane128 >= Traits::kTileM) continue;
      shared.rows[warpgroup][128 * i + lane128] = rows[i];
      shared.scales[warpgroup][128 * i + lane128] = rows[i].scale_a;
    }
    part.sync();
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
    shared.turn.init(1);
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
    if (threadIdx.x == 0) shared.turn.arrive();
  }

  if (threadIdx.x >= Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - Traits::kConsumers / 32;
    if (warp < 2 && cute::elect_one_sync()) {
      constexpr Readers kPair = Traits::kCluster > 1 ? Readers::kPair : Readers::kMany;
      const bool shares = (warp == 0) != p.cluster_n;  // where there are clusters
      if (warp != 0) {
        shares ? swapped_produce<Traits, false, kPair>(p, shared, stages_a)
               : swapped_produce<Traits, false, Readers::kMany>(p, shared, stages_a);
      } else if (Traits::kCluster == 1 && p.b_is_read_once) {
        swapped_produce<Traits, true, Readers::kOne>(p, shared, stages_b);
      } else {
        shares ? swapped_produce<Traits, true, kPair>(p, shared, stages_b)
               : swapped_produce<Traits, true, Readers::kMany>(p, shared, stages_b);
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

// How fast a constant weight is brought ahead, of what memory can: measured on an H200, in steps of
// decoding. Faster, and the kernels between two products wait longer for what they read.
constexpr double kPace = 0.83;

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
    SwappedParams params{};
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
    params.b_is_read_once = params.tiles_m == 1 && kCluster == 1;
    params.output = output_params(p);

    const int64_t tiles = int64_t{params.tiles_m} * params.tiles_n;
    const int cluster = kCluster > 1 ? kCluster : c.split_k;
    const int64_t resident = launch.device->sm_count * c.blocks_per_sm / cluster;
    cudaLaunchConfig_t config{};
    config.gridDim =
        static_cast<unsigned>((c.split_k > 1 ? tiles : std::min(tiles, resident)) * cluster);
    if (params.b_is_constant && params.b_is_read_once) {
      const double bytes = static_cast<double>(config.gridDim.x) * params.box_n * Traits::kTileK;
      const double least = kPace * launch.device->memory_bytes_per_cycle;
      params.pace = least > 0 ? static_cast<int>(bytes / least) : 0;
    }
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
