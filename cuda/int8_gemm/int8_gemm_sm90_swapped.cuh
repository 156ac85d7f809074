// INT8 GEMM for Hopper (sm_90a) with swapped operands: out (M, N) = output(a (M, K) . b (N, K)^T),
// see epilogue/output.cuh for what ends it. For few tokens, and for every output that the
// TMA-storing kernels of int8_gemm_sm90.cuh do not write.
//
// a and b are int8 with K contiguous, which is the only form INT8 WGMMA reads. The rows of WGMMA's
// 64-row tiles are output channels (rows of b, the weight), its columns are tokens (rows of a),
// because WGMMA's width is free in steps of 8 and its height is not.
//
//   block   two producer threads fill a ring of stages by TMA (128 bytes of K of every row); one or
//           two consumer warpgroups multiply, each with 64 channels x kTokens tokens of int32.
//   grid    persistent: a block walks over tiles, and the producers run ahead into the next one.
//   width   the channels of a tile are a run-time number, up to those of the instance. It is chosen
//           so that every multiprocessor has the same share of the weight; the rest of the MMA
//           computes on whatever lies in shared memory, and is dropped.
//   edges   TMA is slow where a box leaves the matrix. So the last tile begins as far back as it
//   must
//           to end with the matrix, and leaves to its neighbour what that one writes; a matrix that
//           is smaller than a tile gets smaller boxes.
//   split-K the blocks of a cluster share one tile, each with a part of K. Their int32 sums meet in
//           distributed shared memory, where each block adds up and writes some of the tokens. The
//           sums are exact, so the order does not matter.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>

#include <cute/tensor.hpp>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

#include "epilogue/output.cuh"
#include "int8_gemm/int8_gemm_kernels.hpp"
#include "runtime/dependent_launch.cuh"
#include "runtime/tma.hpp"

namespace fastq::cuda {

struct SwappedParams {
  CUtensorMap a, b;  // tokens and channels
  int tiles_m, tiles_n;
  int width;         // channels of a tile: a multiple of 8
  int box_m, box_n;  // tokens and channels that are loaded for a tile
  int k_tiles, stages;
  int split_k;
  OutputParams output;
};

template <int kTokens, int kWarpgroups>
struct SwappedTraits {
  static constexpr int kTileM = kTokens, kTileN = 64 * kWarpgroups, kTileK = 128;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  // Two blocks a multiprocessor where the accumulators are few: the next kernel's can settle in
  // beside this one's.
  static constexpr bool kIsNarrow = kTokens * kWarpgroups <= 64;
  // Together no more than the block starts with: 128 registers a thread, 80 or 168.
  static constexpr int kConsumerRegisters = kIsNarrow ? (kWarpgroups == 1 ? 200 : 104) : 232;
  static constexpr int kProducerRegisters = kIsNarrow && kWarpgroups == 2 ? 24 : 40;
  static constexpr int kMaxStages = 32;
  // A row of sums is padded against bank conflicts.
  static constexpr int kChunk = kTokens < 32 ? kTokens : 32;  // tokens of sums written at a time
  static constexpr int kPad = 4;

  using SmemAtom = cute::SM90::GMMA::Layout_K_SW128_Atom<int8_t>;
  using SmemA = decltype(cute::tile_to_shape(SmemAtom{},
                                             cute::Shape<cute::Int<kTileM>, cute::Int<kTileK>>{}));
  using SmemB = decltype(cute::tile_to_shape(SmemAtom{},
                                             cute::Shape<cute::Int<kTileN>, cute::Int<kTileK>>{}));
  using Mma = decltype(cute::make_tiled_mma(
      cute::SM90::GMMA::ss_op_selector<
          int8_t, int8_t, int32_t,
          cute::Shape<cute::Int<kTileN>, cute::Int<kTileM>, cute::Int<kTileK>>>(),
      cute::Layout<cute::Shape<cute::Int<kWarpgroups>, cute::_1, cute::_1>>{}));

  // What lies behind the stages. Lines of 16-bit output take the place of the sums.
  struct Shared {
    union Staging {
      int32_t sums[kChunk][64 + kPad];
      uint4 lines[kTokens < 64 ? kTokens : 64][8];
    };
    alignas(16) Staging staging[kWarpgroups];
    alignas(16) OutputRow rows[kWarpgroups][kTokens];
    cutlass::arch::ClusterTransactionBarrier full[kMaxStages];
    cutlass::arch::ClusterBarrier empty[kMaxStages];
  };
  // Split-K: the whole tile's sums take the stages' place.
  using SplitSums = int32_t[kTileM][kTileN + kPad];

  static constexpr int kSmemLimit = 227 * 1024;
  static int stage_bytes(int width) { return (kTileM + width) * kTileK; }
  static int stages(int width, int blocks_per_sm) {
    const int limit = blocks_per_sm == 2 ? 113 * 1024 : kSmemLimit;
    return std::min<int>(kMaxStages, (limit - sizeof(Shared)) / stage_bytes(width));
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
};

// A block's tiles, one after the other. Tiles that run at the same time share their operands in L2:
// they come from 16 columns of tiles.
struct SwappedTiles {
  const SwappedParams& p;
  int index;
  int rank;  // in the cluster that shares a tile

  __device__ explicit SwappedTiles(const SwappedParams& params)
      : p(params),
        index(blockIdx.x / p.split_k),
        rank(p.split_k == 1 ? 0 : static_cast<int>(cute::block_rank_in_cluster())) {}
  __device__ bool has_tile() const { return index < p.tiles_m * p.tiles_n; }
  __device__ void next() { index += gridDim.x / p.split_k; }
  // The first token and channel that it writes.
  __device__ int2 origin(int tile_m) const {
    constexpr int kGroup = 16;
    const int per_group = kGroup * p.tiles_m;
    const int first = index / per_group * kGroup;
    const int group = min(kGroup, p.tiles_n - first);
    const int in_group = index % per_group;
    return {in_group / group * tile_m, (first + in_group % group) * p.width};
  }
  // The first token and channel that are loaded for it; the latter stays a multiple of 8.
  __device__ int2 box(int2 origin) const {
    const int last_n = p.output.N % 8 == 0 ? p.output.N - p.box_n : origin.y;
    return {min(origin.x, p.output.M - p.box_m), min(origin.y, last_n)};
  }
  __device__ int first_k() const { return rank * p.k_tiles / p.split_k; }
  __device__ int last_k() const { return (rank + 1) * p.k_tiles / p.split_k; }
};

// One thread of the first producer warp brings the channels, one of the second the tokens. The loop
// is kept to a few instructions: its latency bounds how fast stages can follow each other.
template <class Traits>
__device__ inline void swapped_produce(const SwappedParams& p, typename Traits::Shared& shared,
                                       const int8_t* stages, bool brings_b) {
  const CUtensorMap* map = brings_b ? &p.b : &p.a;
  const uint32_t bytes = (brings_b ? p.box_n : p.box_m) * Traits::kTileK;
  const uint32_t stride = (brings_b ? p.width : Traits::kTileM) * Traits::kTileK;
  const uint32_t target = cute::cast_smem_ptr_to_uint(stages);
  const uint32_t full = cute::cast_smem_ptr_to_uint(shared.full);
  RingPosition at{p.stages};
  at.phase = 1;  // a fresh ring is empty
  for (SwappedTiles tiles(p); tiles.has_tile(); tiles.next()) {
    const int2 box = tiles.box(tiles.origin(Traits::kTileM));
    const int row = brings_b ? box.y : box.x;
    const int last = tiles.last_k() * Traits::kTileK;
#pragma unroll 1
    for (int k = tiles.first_k() * Traits::kTileK; k < last; k += Traits::kTileK, at.next()) {
      shared.empty[at.stage].wait(at.phase);
      const uint32_t barrier = full + 8 * at.stage;
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier),
                   "r"(bytes)
                   : "memory");
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
          " [%0], [%1, {%2, %3}], [%4];\n" ::"r"(target + at.stage * stride),
          "l"(map), "r"(k), "r"(row), "r"(barrier)
          : "memory");
    }
  }
}

// One tile's sums, accumulated over the ring.
template <class Traits, class Accumulators>
__device__ inline void swapped_accumulate(const SwappedParams& p, typename Traits::Shared& shared,
                                          const int8_t* stages_b, const int8_t* stages_a,
                                          int k_tiles, RingPosition& at, int thread,
                                          Accumulators& acc) {
  using namespace cute;
  auto sA = make_tensor(make_smem_ptr(stages_a), typename Traits::SmemA{});  // (tokens, K)
  auto sB = make_tensor(make_smem_ptr(stages_b), typename Traits::SmemB{});  // (channels, K)
  typename Traits::Mma mma;
  auto slice = mma.get_slice(thread);
  // Descriptors of the first stage; the operands are swapped.
  auto rB = slice.make_fragment_A(slice.partition_A(sB));
  auto rA = slice.make_fragment_B(slice.partition_B(sA));
  mma.accumulate_ = SM90::GMMA::ScaleOut::Zero;

  const auto release = [&](int stage) {
    if (thread % 128 == 0) shared.empty[stage].arrive();
  };
  int previous = 0;
  for (int k = 0; k < k_tiles; ++k) {
    // A descriptor counts in units of 16 bytes.
    auto stage_b = make_tensor(rB.data() + at.stage * (p.width * Traits::kTileK / 16), rB.layout());
    auto stage_a =
        make_tensor(rA.data() + at.stage * (Traits::kTileM * Traits::kTileK / 16), rA.layout());
    shared.full[at.stage].wait(at.phase);
    warpgroup_fence_operand(acc);
    warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < size<2>(rA); ++i) {
      gemm(mma, stage_b(_, _, i), stage_a(_, _, i), acc);
      mma.accumulate_ = SM90::GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    if (k > 0) {
      warpgroup_wait<1>();
      release(previous);
    }
    previous = at.stage;
    at.next();
  }
  warpgroup_wait<0>();
  warpgroup_fence_operand(acc);
  release(previous);
}

// What a warpgroup writes: its part of a tile.
struct SwappedPart {
  int m0, n0;            // the first token and channel of the accumulators
  int m_begin, n_begin;  // the first ones to write
  int n_end;             // past the last channel
  int lane128;           // this thread in the warpgroup
  int barrier;           // the warpgroup's named barrier

  __device__ void sync() const { cutlass::arch::NamedBarrier::sync(128, barrier); }
};

// Calls visit(i, channel, token) for this thread's accumulators i of tokens
// [kFirst, kFirst + kCount) in a block of 64 channels.
template <int kFirst, int kCount, class Visit>
__device__ inline void for_each_sum(int lane128, const Visit& visit) {
#pragma unroll
  for (int j = kFirst / 8; j < (kFirst + kCount) / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = lane128 / 32 * 16 + lane128 % 32 / 4 + i / 2 * 8;
      visit(4 * j + i, channel, 8 * j + lane128 % 4 * 2 + i % 2);
    }
  }
}

// Any output: 64 channels and a chunk of tokens at a time, the int32 sums go through shared memory,
// which turns the fragments into rows of out.
template <class Traits, class Accumulators>
__device__ inline void swapped_write(const OutputParams& p,
                                     typename Traits::Shared::Staging& staging,
                                     const OutputRow* rows, const SwappedPart& part,
                                     const Accumulators& acc) {
  constexpr int kChunk = Traits::kChunk;
  constexpr int kChunks = Traits::kTileM / kChunk;
  static_assert(Traits::kTileM % kChunk == 0);
  auto& sums = staging.sums;
  const int in_tile = part.lane128 % 8 * 8, n = part.n0 + in_tile;
  OutputColumns columns;
  if (n < part.n_end) load_columns(p, n, columns);
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int first = chunk * kChunk;
    const int count = min(kChunk, p.M - part.m0 - first);
    if (count <= 0) return;  // the same for the whole warpgroup
    part.sync();             // the chunk before has been read
    cute::for_each(cute::make_seq<kChunks>{}, [&](auto c) {
      constexpr int kFirst = c * kChunk;
      if (chunk != c) return;
      for_each_sum<kFirst, kChunk>(part.lane128, [&](int i, int channel, int token) {
        sums[token - kFirst][channel] = acc(i);
      });
    });
    part.sync();
    if (n < part.n_begin || n >= part.n_end) continue;
#pragma unroll 1
    for (int row = part.lane128 / 8; row < count; row += 16) {
      if (part.m0 + first + row < part.m_begin) continue;
      int32_t values[8];
      const int4* source = reinterpret_cast<const int4*>(&sums[row][in_tile]);
      *reinterpret_cast<int4*>(values) = source[0];
      *reinterpret_cast<int4*>(values + 4) = source[1];
      store_row(p, columns, rows[first + row], part.m0 + first + row, n, values);
    }
  }
}

// Two or four 8x8 matrices of 16-bit words, each register holding two neighbours of a row, are
// stored with rows and columns swapped; lane i names the place of column i % 8 of matrix i / 8.
template <int kMatrices>
__device__ inline void store_matrices_transposed(void* shared, const uint32_t (&words)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kMatrices == 4) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(address),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
        : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(address),
                 "r"(words[0]), "r"(words[1])
                 : "memory");
  }
}

// What a thread of swapped_write_plain needs of the vectors along N: of channels lane / 4 of its
// warp's 16, and 8 more.
struct SwappedPlainColumns {
  float scale_b[2], bias[2];

  __device__ void load(const OutputParams& p, int n0, int lane128) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = n0 + lane128 / 32 * 16 + 8 * i + lane128 % 32 / 4;
      if (n >= p.N) continue;
      scale_b[i] = load_float(p.scale_b.data, DType::kFloat32, n * p.scale_b.stride);
      if (p.bias.data == nullptr) continue;
      bias[i] = load_float(p.bias.data, p.bias.dtype, n * p.bias.stride);
    }
  }
};

// A plain output of 16-bit floats: scaled in registers, turned by stmatrix, 64 tokens at a time.
template <class Traits, DType kDType, class Accumulators>
__device__ inline void swapped_write_plain(const OutputParams& p,
                                           typename Traits::Shared::Staging& staging,
                                           const OutputRow* rows, const SwappedPart& part,
                                           const SwappedPlainColumns& columns,
                                           const Accumulators& acc) {
  constexpr int kLines = Traits::kTileM < 64 ? Traits::kTileM : 64;
  const int lane = part.lane128 % 32, warp = part.lane128 / 32;
  const bool has_bias = p.bias.data != nullptr;
#pragma unroll
  for (int first = 0; first < Traits::kTileM; first += kLines) {
    const int count = min(min(kLines, Traits::kTileM - first), p.M - part.m0 - first);
    if (count <= 0) return;  // the same for the whole warpgroup
#pragma unroll
    for (int t = 0; t < kLines && first + t < Traits::kTileM; t += 16) {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < (Traits::kTileM == 8 ? 2 : 4); ++i) {
        // Matrix i: channels + 8 (i % 2), tokens + 8 (i / 2).
        const int token = first + t + i / 2 * 8 + lane % 4 * 2;
        const int at = (first + t) / 2 + i / 2 * 4 + i % 2 * 2;
        float y[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          y[j] = scale_sum(acc(at + j), rows[token + j].scale_a, columns.scale_b[i % 2],
                           columns.bias[i % 2], has_bias);
        }
        words[i] = narrow_pair(y[0], y[1], kDType);
      }
      // A line is 64 channels of a token; its eight 16-byte pieces are permuted by the token.
      const int line = t + lane / 16 * 8 + lane % 8;
      store_matrices_transposed<Traits::kTileM == 8 ? 2 : 4>(
          &staging.lines[line % kLines][(2 * warp + lane / 8 % 2) ^ (lane % 8)], words);
    }
    part.sync();
    const int piece = part.lane128 % 8, n = part.n0 + 8 * piece;
#pragma unroll
    for (int i = 0; i < (kLines + 15) / 16; ++i) {
      const int line = part.lane128 / 8 + 16 * i;
      const int m = part.m0 + first + line;
      if (line >= count || m < part.m_begin || n < part.n_begin || n >= part.n_end) continue;
      const uint4 words = staging.lines[line][piece ^ (line % 8)];
      uint16_t* out = static_cast<uint16_t*>(p.out) + m * p.stride_om + n;
      if (n + 8 <= p.N) {
        *reinterpret_cast<uint4*>(out) = words;
        continue;
      }
      for (int j = 0; n + j < p.N; ++j) {
        const uint32_t pair = j < 2 ? words.x : j < 4 ? words.y : j < 6 ? words.z : words.w;
        out[j] = static_cast<uint16_t>(pair >> j % 2 * 16);
      }
    }
    part.sync();  // before the lines are written again
  }
}

// 16 bytes of the shared memory of another block of the cluster, at the address that they have
// here.
__device__ inline int4 load_cluster(const void* shared, uint32_t rank) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;\n" : "+r"(address) : "r"(rank));
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// The blocks of a split-K cluster add their sums up, each for some of the tokens.
template <class Traits>
__device__ inline void swapped_reduce(const OutputParams& p, typename Traits::SplitSums& sums,
                                      int2 box, int2 origin, int n_end, int rank, int split_k,
                                      int thread, const OutputColumns& columns) {
  constexpr int kPerRow = Traits::kTileN / 8;
  const int in_tile = thread % kPerRow * 8, n = box.y + in_tile;
  const int rows = min(Traits::kTileM, p.M - box.x);
  if (n < origin.y || n >= n_end) return;
  for (int row = rank + split_k * (thread / kPerRow); row < rows;
       row += split_k * (Traits::kConsumers / kPerRow)) {
    if (box.x + row < origin.x) continue;
    const OutputRow output_row = load_row(p, box.x + row);
    int32_t values[8] = {};
#pragma unroll 4
    for (int i = 0; i < split_k; ++i) {
      const int4 x = load_cluster(&sums[row][in_tile], i);
      const int4 y = load_cluster(&sums[row][in_tile + 4], i);
      values[0] += x.x, values[1] += x.y, values[2] += x.z, values[3] += x.w;
      values[4] += y.x, values[5] += y.y, values[6] += y.z, values[7] += y.w;
    }
    store_row(p, columns, output_row, box.x + row, n, values);
  }
}

template <int kTokens, int kWarpgroups>
__global__ void __launch_bounds__(128 * kWarpgroups + 128,
                                  SwappedTraits<kTokens, kWarpgroups>::kIsNarrow ? 2 : 1)
    int8_gemm_sm90_swapped(const __grid_constant__ SwappedParams p) {
  using Traits = SwappedTraits<kTokens, kWarpgroups>;
  using cutlass::arch::NamedBarrier;
  extern __shared__ __align__(1024) int8_t stages_b[];
  int8_t* stages_a = stages_b + p.stages * p.width * Traits::kTileK;
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(stages_a + p.stages * Traits::kTileM *
                                                                            Traits::kTileK);

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.a));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.b));
    for (int i = 0; i < p.stages; ++i) {
      shared.full[i].init(2);  // the two producers
      shared.empty[i].init(kWarpgroups);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_predecessor();
  let_successor_start();

  if (threadIdx.x >= Traits::kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0) - Traits::kConsumers / 32;
    if (warp < 2 && cute::elect_one_sync()) {
      swapped_produce<Traits>(p, shared, warp == 0 ? stages_b : stages_a, warp == 0);
    }
    __syncwarp();
    if (p.split_k > 1) {
      cute::cluster_sync();
      cute::cluster_sync();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    const int thread = threadIdx.x, warpgroup = thread / 128, lane128 = thread % 128;
    auto acc = cute::partition_fragment_C(
        typename Traits::Mma{}, cute::Shape<cute::Int<Traits::kTileN>, cute::Int<kTokens>>{});
    RingPosition at{p.stages};
    for (SwappedTiles tiles(p); tiles.has_tile(); tiles.next()) {
      const int2 origin = tiles.origin(Traits::kTileM);
      const int2 box = tiles.box(origin);
      const int n_end = min(p.output.N, origin.y + p.width);
      if (p.split_k > 1) {
        OutputColumns columns;  // read ahead of the main loop, which hides the latency
        const int n = box.y + thread % (Traits::kTileN / 8) * 8;
        if (n < n_end) load_columns(p.output, n, columns);
        swapped_accumulate<Traits>(p, shared, stages_b, stages_a, tiles.last_k() - tiles.first_k(),
                                   at, thread, acc);
        auto& sums = *reinterpret_cast<typename Traits::SplitSums*>(stages_b);
        NamedBarrier::sync(Traits::kConsumers, 1);  // nobody reads the stages now
        const int rows = p.output.M - box.x;
        for_each_sum<0, kTokens>(lane128, [&](int i, int channel, int token) {
          if (token < rows) sums[token][64 * warpgroup + channel] = acc(i);
        });
        cute::cluster_sync();
        swapped_reduce<Traits>(p.output, sums, box, origin, n_end, tiles.rank, p.split_k, thread,
                               columns);
        cute::cluster_sync();  // the others may still read here
        continue;
      }

      // Read ahead of the main loop, which hides the latency.
      OutputRow rows[(kTokens + 127) / 128];
#pragma unroll
      for (int i = 0; i < (kTokens + 127) / 128; ++i) {
        const int m = box.x + 128 * i + lane128;
        if (m < p.output.M) rows[i] = load_row(p.output, m);
      }
      const int n0 = box.y + 64 * warpgroup;
      SwappedPlainColumns columns;
      if (p.output.is_plain) columns.load(p.output, n0, lane128);
      swapped_accumulate<Traits>(p, shared, stages_b, stages_a, p.k_tiles, at, thread, acc);

      const SwappedPart part{box.x, n0, origin.x, origin.y, n_end, lane128, 1 + warpgroup};
      auto& staging = shared.staging[warpgroup];
      part.sync();  // the tile before has been read
#pragma unroll
      for (int i = 0; i < (kTokens + 127) / 128; ++i) {
        if (128 * i + lane128 < kTokens) shared.rows[warpgroup][128 * i + lane128] = rows[i];
      }
      part.sync();
      if (n0 >= n_end) continue;
      if (p.output.is_plain && p.output.dtype == DType::kBFloat16) {
        swapped_write_plain<Traits, DType::kBFloat16>(p.output, staging, shared.rows[warpgroup],
                                                      part, columns, acc);
        continue;
      }
      if (p.output.is_plain) {
        swapped_write_plain<Traits, DType::kFloat16>(p.output, staging, shared.rows[warpgroup],
                                                     part, columns, acc);
        continue;
      }
      swapped_write<Traits>(p.output, staging, shared.rows[warpgroup], part, acc);
    }
  }
}

template <int kTokens, int kWarpgroups>
struct Sm90SwappedGemm {
  using Traits = SwappedTraits<kTokens, kWarpgroups>;
  static constexpr auto kKernel = &int8_gemm_sm90_swapped<kTokens, kWarpgroups>;

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
    params.box_m = static_cast<int>(std::min<int64_t>(kTokens, p.M));
    params.box_n = static_cast<int>(std::min<int64_t>(width, p.N));
    params.a = cached_operand_map({launch.a, p.M, p.K, launch.ld_a, params.box_m});
    params.b = cached_operand_map({launch.b, p.N, p.K, launch.ld_b, params.box_n});
    params.tiles_m = static_cast<int>(ceil_div(p.M, kTokens));
    params.tiles_n = static_cast<int>(ceil_div(p.N, width));
    params.width = width;
    params.k_tiles = static_cast<int>(ceil_div(p.K, Traits::kTileK));
    params.stages = Traits::stages(width, c.blocks_per_sm);
    params.split_k = c.split_k;
    params.output = output_params(p);

    const int64_t tiles = int64_t{params.tiles_m} * params.tiles_n;
    const int64_t resident = launch.device->sm_count * c.blocks_per_sm;
    cudaLaunchConfig_t config{};
    config.gridDim =
        static_cast<unsigned>(c.split_k > 1 ? tiles * c.split_k : std::min(tiles, resident));
    config.blockDim = Traits::kThreads;
    config.dynamicSmemBytes =
        params.stages * Traits::stage_bytes(width) + sizeof(typename Traits::Shared);
    config.stream = launch.stream;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0] = dependent_launch();
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(c.split_k), 1, 1};
    config.attrs = attributes;
    config.numAttrs = c.split_k > 1 ? 2 : 1;  // an attribute costs the host time
    check(cudaLaunchKernelEx(&config, kKernel, params), "launching an sm_90a INT8 GEMM");
  }

  static bool register_kernel() {
    return register_gemm_kernel({KernelFamily::kSm90,
                                 {kTokens, Traits::kTileN, Traits::kTileK, Schedule::kSwapped},
                                 &launch,
                                 &load});
  }
};

}  // namespace fastq::cuda
