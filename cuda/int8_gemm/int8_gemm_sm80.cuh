// INT8 GEMM by mma.sync, for Ampere and everything after it: out (M, N) = output(a (M, K) .
// b (N, K)^T), see epilogue/output.cuh for what ends it.
//
// a and b are int8 with K contiguous, their rows 16-byte aligned. A block computes one output tile:
// cp.async brings kTileK bytes of every row into a ring of kStages shared-memory buffers, ldmatrix
// takes fragments from there, mma.sync m16n8k32 accumulates exactly in int32. cp.async fills what
// lies past an edge of M, N or K with zeros, so those need no code in the main loop. The sums go
// through shared memory, which turns the fragments into rows of out.
//
// Split-K, for few tiles: the blocks of a tile each take a part of K and write their int32 sums to
// the workspace, where finish_partial_sums adds them up. The sums are exact, so the number of parts
// does not change a bit.
#pragma once

#include <cute/tensor.hpp>

#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include "epilogue/output.cuh"
#include "int8_gemm/int8_gemm_kernels.hpp"
#include "int8_gemm/partial_sums.hpp"
#include "runtime/copy_async.cuh"

namespace fastq::cuda {

struct Sm80Params {
  int M, N, K;
  const int8_t* a;
  int64_t ld_a;
  const int8_t* b;
  int64_t ld_b;
  int64_t part_stride;  // int32 sums of a part of K
  OutputParams output;
};

// Neighbouring blocks take tiles of the same 8 rows of tiles, so that their operands meet in L2.
__device__ inline int2 tile_of_block(int block, int tiles_m, int tiles_n) {
  constexpr int kGroup = 8;
  const int per_group = kGroup * tiles_n;
  const int first_m = block / per_group * kGroup;
  const int rows = min(kGroup, tiles_m - first_m);
  const int in_group = block % per_group;
  return {first_m + in_group % rows, in_group / rows};
}

template <int kTileM, int kTileN, int kTileK, int kStages, int kWarpsM, int kWarpsN>
struct Sm80Traits {
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static_assert(kTileK == 64 || kTileK == 128, "a swizzled row is 64 or 128 bytes");

  using Mma =
      cute::TiledMMA<cute::MMA_Atom<cute::SM80_16x8x32_S32S8S8S32_TN>,
                     cute::Layout<cute::Shape<cute::Int<kWarpsM>, cute::Int<kWarpsN>, cute::_1>>,
                     cute::Tile<cute::Int<16 * kWarpsM>, cute::Int<16 * kWarpsN>, cute::_32>>;
  // The 16-byte chunks of 8 rows are permuted so that ldmatrix meets no bank conflict.
  using SmemAtom =
      decltype(cute::composition(cute::Swizzle<kTileK == 128 ? 3 : 2, 4, 3>{},
                                 cute::Layout<cute::Shape<cute::_8, cute::Int<kTileK>>,
                                              cute::Stride<cute::Int<kTileK>, cute::_1>>{}));
  using SmemA = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::Shape<cute::Int<kTileM>, cute::Int<kTileK>, cute::Int<kStages>>{}));
  using SmemB = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::Shape<cute::Int<kTileN>, cute::Int<kTileK>, cute::Int<kStages>>{}));
  using CopyAtom = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, int8_t>;

  static constexpr int kSmemBytes = kStages * (kTileM + kTileN) * kTileK;
  // The rows of one MMA of every warp, written at a time; padded against bank conflicts.
  static constexpr int kChunk = 16 * kWarpsM;
  using Sums = int32_t[kChunk][kTileN + 4];
  static_assert(kSmemBytes >= sizeof(Sums), "the sums take the stages' place");
};

// Brings tiles of rows [row0, row0 + kRows) of a K-major operand to shared memory. A thread's rows
// differ by a multiple of 8, so the swizzle moves all of its chunks alike.
template <int kRows, int kTileK, int kThreads>
struct TileLoader {
  static constexpr int kChunks = kTileK / 16;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kCopies = (kRows + kRowStep - 1) / kRowStep;
  static_assert(kThreads % kChunks == 0 && kRowStep % 8 == 0);

  const int8_t* source;  // this thread's first chunk, at k = 0
  int64_t step;          // bytes between its rows
  uint32_t shared;       // where the first chunk goes in stage 0
  int k, copies;         // its offset in K, and how many of its rows there are

  template <class SmemTensor>
  __device__ TileLoader(SmemTensor&& stage0, const int8_t* data, int64_t ld, int row0, int rows) {
    const int row = static_cast<int>(threadIdx.x) / kChunks;
    k = static_cast<int>(threadIdx.x) % kChunks * 16;
    const int left = min(rows - row0, kRows) - row;
    copies = left <= 0 ? 0 : (left + kRowStep - 1) / kRowStep;
    source = copies > 0 ? data + (row0 + row) * ld + k : data;
    step = kRowStep * ld;
    shared = static_cast<uint32_t>(__cvta_generic_to_shared(&stage0(row < kRows ? row : 0, k)));
  }

  // Part kPart of kParts of a tile that begins at k0. A whole one ends at K or before it, and costs
  // fewer instructions.
  template <int kPart, int kParts, bool kIsWhole>
  __device__ void copy(int stage, int k0, int K) const {
    constexpr int kFirst = kCopies * kPart / kParts, kLast = kCopies * (kPart + 1) / kParts;
    const uint32_t target = shared + stage * (kRows * kTileK);
    const int bytes = min(max(K - k0 - k, 0), 16);
    const int8_t* from = source + k0 + kFirst * step;
#pragma unroll
    for (int i = kFirst; i < kLast; ++i, from += step) {
      if (kRows % kRowStep != 0 && static_cast<int>(threadIdx.x) / kChunks >= kRows) break;
      if constexpr (kIsWhole) {
        copy_async_16_or_zeros(target + i * kRowStep * kTileK, from, i < copies);
      } else {
        const bool reads = i < copies && bytes > 0;
        copy_async_16(target + i * kRowStep * kTileK, reads ? from : source, reads ? bytes : 0);
      }
    }
  }
};

template <class Traits, int kTileM, int kTileN, class Accumulators>
__device__ inline void sm80_write(const OutputParams& p, const Accumulators& acc, int m0, int n0,
                                  typename Traits::Sums& sums) {
  using namespace cute;
  constexpr int kPerRow = kTileN / kOutputColumns;
  constexpr int kChunks = kTileM / Traits::kChunk;
  const int n = threadIdx.x % kPerRow * kOutputColumns;
  OutputColumns columns;
  if (n0 + n < p.N) load_columns(p, n0 + n, columns);
  const AddedOutliers outliers = gathered_outliers(p);
  auto coords = typename Traits::Mma{}
                    .get_slice(threadIdx.x)
                    .partition_C(make_identity_tensor(
                        Shape<Int<kTileM>, Int<kTileN>>{}));  // (MMA, MMA_M, MMA_N)
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int first = chunk * Traits::kChunk;
    const int count = min(Traits::kChunk, p.M - m0 - first);
    if (count <= 0) return;
    __syncthreads();  // the stages, or the chunk before, have been read
    for_each(make_seq<kChunks>{}, [&](auto c) {
      if (chunk != c) return;
#pragma unroll
      for (int j = 0; j < size<2>(acc); ++j) {
#pragma unroll
        for (int i = 0; i < size<0>(acc); ++i) {
          const auto mn = coords(i, c, j);
          sums[get<0>(mn) - c * Traits::kChunk][get<1>(mn)] = acc(i, c, j);
        }
      }
    });
    __syncthreads();
    if (n0 + n >= p.N) continue;
#pragma unroll 1
    for (int row = threadIdx.x / kPerRow; row < count; row += Traits::kThreads / kPerRow) {
      const int m = m0 + first + row;
      int32_t values[8];
      *reinterpret_cast<int4*>(values) = *reinterpret_cast<const int4*>(&sums[row][n]);
      *reinterpret_cast<int4*>(values + 4) = *reinterpret_cast<const int4*>(&sums[row][n + 4]);
      store_row(p, columns, load_row(p, m), m, n0 + n, values, outliers);
    }
  }
}

template <int kTileM, int kTileN, int kTileK, int kStages, int kWarpsM, int kWarpsN>
__global__ void __launch_bounds__(32 * kWarpsM * kWarpsN)
    int8_gemm_sm80(const __grid_constant__ Sm80Params p) {
  using namespace cute;
  using Traits = Sm80Traits<kTileM, kTileN, kTileK, kStages, kWarpsM, kWarpsN>;
  constexpr int kThreads = Traits::kThreads;
  extern __shared__ __align__(128) int8_t shared[];
  auto sA = make_tensor(make_smem_ptr(shared), typename Traits::SmemA{});  // (M, K, STAGE)
  auto sB = make_tensor(make_smem_ptr(shared + cosize_v<typename Traits::SmemA>),
                        typename Traits::SmemB{});  // (N, K, STAGE)

  const int tiles_m = (p.M + kTileM - 1) / kTileM, tiles_n = (p.N + kTileN - 1) / kTileN;
  const int2 tile = tile_of_block(blockIdx.x, tiles_m, tiles_n);
  const int m0 = tile.x * kTileM, n0 = tile.y * kTileN;

  typename Traits::Mma mma;
  auto thread_mma = mma.get_slice(threadIdx.x);
  auto rA = thread_mma.partition_fragment_A(sA(_, _, 0));  // (MMA, MMA_M, MMA_K)
  auto rB = thread_mma.partition_fragment_B(sB(_, _, 0));  // (MMA, MMA_N, MMA_K)
  auto acc = partition_fragment_C(mma, Shape<Int<kTileM>, Int<kTileN>>{});
  clear(acc);
  auto copy_a = make_tiled_copy_A(typename Traits::CopyAtom{}, mma);
  auto copy_b = make_tiled_copy_B(typename Traits::CopyAtom{}, mma);
  auto from_a = copy_a.get_slice(threadIdx.x).partition_S(sA);  // (CPY, CPY_M, CPY_K, STAGE)
  auto from_b = copy_b.get_slice(threadIdx.x).partition_S(sB);
  auto to_a = copy_a.get_slice(threadIdx.x).retile_D(rA);
  auto to_b = copy_b.get_slice(threadIdx.x).retile_D(rB);

  // The tiles of K that this block takes; a whole one ends at K or before it.
  const int all_k_tiles = (p.K + kTileK - 1) / kTileK;
  const int first_k_tile = static_cast<int>(int64_t{all_k_tiles} * blockIdx.y / gridDim.y);
  const int k_tiles = static_cast<int>(int64_t{all_k_tiles} * (blockIdx.y + 1) / gridDim.y);
  const int whole_k_tiles = min(k_tiles, p.K / kTileK);
  const TileLoader<kTileM, kTileK, kThreads> load_a(sA(_, _, 0), p.a, p.ld_a, m0, p.M);
  const TileLoader<kTileN, kTileK, kThreads> load_b(sB(_, _, 0), p.b, p.ld_b, n0, p.N);
  constexpr int kSteps = kTileK / 32;
  int load_stage = 0;
  const auto load = [&](auto part, auto parts, auto is_whole, int k_tile) {
    if (is_whole || k_tile < k_tiles) {
      load_a.template copy<part, parts, is_whole>(load_stage, k_tile * kTileK, p.K);
      load_b.template copy<part, parts, is_whole>(load_stage, k_tile * kTileK, p.K);
    }
    if (part + 1 < parts) return;
    copy_async_commit();  // an empty group keeps the count of groups in flight
    load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
  };
  const auto read_fragments = [&](int k, int stage) {
    copy(copy_a, from_a(_, _, k, stage), to_a(_, _, k));
    copy(copy_b, from_b(_, _, k, stage), to_b(_, _, k));
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(_0{}, _1{}, false_type{}, first_k_tile + i);
  copy_async_wait<kStages - 2>();
  __syncthreads();
  read_fragments(0, 0);

  // Fragments are read one step ahead of the MMAs that take them, across tiles too; a share of the
  // tile that comes kStages - 1 later is brought at each step but the last, over the tile before
  // this one.
  int stage = 0;
  const auto multiply = [&](int k_tile, auto is_whole) {
    for_each(make_int_sequence<kSteps>{}, [&](auto k) {
      if constexpr (k == kSteps - 1) {
        copy_async_wait<kStages - 2>();
        __syncthreads();  // the next tile has arrived, and all have read this one
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      read_fragments((k + 1) % kSteps, stage);
      if constexpr (k < kSteps - 1) {
        load(k, Int<kSteps - 1>{}, is_whole, k_tile + kStages - 1);
      }
      gemm(mma, rA(_, _, k), rB(_, _, k), acc);
    });
  };
  int k_tile = first_k_tile;
#pragma unroll 1
  for (; k_tile + kStages - 1 < whole_k_tiles; ++k_tile) multiply(k_tile, true_type{});
#pragma unroll 1
  for (; k_tile < k_tiles; ++k_tile) multiply(k_tile, false_type{});
  copy_async_wait<0>();
  auto& sums = *reinterpret_cast<typename Traits::Sums*>(shared);
  if (gridDim.y == 1) {
    sm80_write<Traits, kTileM, kTileN>(p.output, acc, m0, n0, sums);
  } else {
    OutputParams part = p.output;
    part.out = static_cast<int32_t*>(part.out) + blockIdx.y * p.part_stride;
    sm80_write<Traits, kTileM, kTileN>(part, acc, m0, n0, sums);
  }
}

template <int kTileM, int kTileN, int kTileK, int kStages, int kWarpsM, int kWarpsN>
struct Sm80Gemm {
  using Traits = Sm80Traits<kTileM, kTileN, kTileK, kStages, kWarpsM, kWarpsN>;
  static constexpr auto kKernel =
      &int8_gemm_sm80<kTileM, kTileN, kTileK, kStages, kWarpsM, kWarpsN>;

  static void load() {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Traits::kSmemBytes),
          "loading an sm_80 INT8 GEMM");
  }

  static void launch(const GemmLaunch& launch) {
    const Int8GemmProblem& p = *launch.problem;
    const int parts = launch.config->split_k;
    const PartialSums sums{launch.partial_sums, p.M, p.N, parts};
    const Sm80Params params{
        int(p.M),    int(p.N),           int(p.K),
        launch.a,    launch.ld_a,        launch.b,
        launch.ld_b, sums.part_stride(), output_params(parts > 1 ? sums.as_output() : p)};
    const dim3 blocks(static_cast<unsigned>(ceil_div(p.M, kTileM) * ceil_div(p.N, kTileN)), parts);
    kKernel<<<blocks, Traits::kThreads, Traits::kSmemBytes, launch.stream>>>(params);
    check(cudaGetLastError(), "launching an sm_80 INT8 GEMM");
    if (parts > 1) finish_partial_sums(sums, p, launch.stream);
  }

  static bool register_kernel() {
    return register_gemm_kernel(
        {KernelFamily::kSm80, {kTileM, kTileN, kTileK, Schedule::kMultistage}, &launch, &load});
  }
};

}  // namespace fastq::cuda
