// INT8 GEMM by mma.sync, for Ampere and everything after it: out (M, N) = dequantize(a (M, K) .
// b (N, K)^T), see epilogue/dequantize.cuh for the epilogue's formula.
//
// a and b are int8 with K contiguous, their rows 16-byte aligned. A block computes one output tile:
// cp.async brings kTileK bytes of every row into a ring of kStages shared-memory buffers, ldmatrix
// takes fragments from there, mma.sync m16n8k32 accumulates exactly in int32. cp.async fills what
// lies past an edge of M, N or K with zeros, so those need no code in the main loop; out is written
// element by element at its real strides.
#pragma once

#include <cute/tensor.hpp>

#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include "epilogue/dequantize.cuh"
#include "int8_gemm/int8_gemm_kernels.hpp"

namespace fastq::cuda {

struct Sm80Params {
  int M, N, K;
  const int8_t* a;
  int64_t ld_a;
  const int8_t* b;
  int64_t ld_b;
  void* out;
  int64_t stride_om, stride_on;
  bool pairs;  // two neighbouring elements of a row of out can be written at once
  DequantizeParams epilogue;
};

// 16 bytes from global to shared memory, of which those past `bytes` are zeros.
__device__ inline void copy_async_16(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(bytes));
}

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
  static_assert(kSmemBytes >= 4 * (kTileM + 2 * kTileN), "the epilogue's vectors reuse it");
};

// Starts the copy of rows [row0, row0 + kRows), bytes [k0, k0 + kTileK) of a K-major operand.
template <int kRows, int kTileK, int kThreads, class SmemTensor>
__device__ inline void load_tile(SmemTensor&& stage, const int8_t* data, int64_t ld, int row0,
                                 int rows, int k0, int K) {
  constexpr int kChunks = kTileK / 16;
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int chunk = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = chunk / kChunks, k = chunk % kChunks * 16;
    const int left = row0 + row < rows ? K - k0 - k : 0;
    const int bytes = min(max(left, 0), 16);
    const int8_t* source = bytes > 0 ? data + (row0 + row) * ld + k0 + k : data;
    copy_async_16(&stage(row, k), source, bytes);
  }
}

template <class Traits, int kTileM, int kTileN, class Word, class Accumulators>
__device__ inline void store_tile(const Sm80Params& p, Accumulators& acc, int m0, int n0,
                                  float* shared) {
  float* scale_a = shared;
  float* scale_b = scale_a + kTileM;
  float* bias = scale_b + kTileN;
  for (int i = threadIdx.x; i < kTileM; i += Traits::kThreads) {
    scale_a[i] = load_or(p.epilogue.scale_a, m0 + i, p.M, 0.0f);
  }
  for (int i = threadIdx.x; i < kTileN; i += Traits::kThreads) {
    scale_b[i] = load_or(p.epilogue.scale_b, n0 + i, p.N, 0.0f);
    bias[i] = load_or(p.epilogue.bias, n0 + i, p.N, 0.0f);
  }
  __syncthreads();

  const bool has_bias = p.epilogue.bias.data != nullptr;
  const OutputKind kind = p.epilogue.kind;
  auto* out = static_cast<Word*>(p.out);
  auto thread_mma = typename Traits::Mma{}.get_slice(threadIdx.x);
  auto coords = thread_mma.partition_C(
      cute::make_identity_tensor(cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>>{}));
#pragma unroll
  for (int i = 0; i < cute::size(acc); i += 2) {  // elements i and i + 1 are neighbours in a row
    const int m = cute::get<0>(coords(i)), n = cute::get<1>(coords(i));
    if (m0 + m >= p.M || n0 + n >= p.N) continue;
    Word words[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float value = dequantize(acc(i + j), scale_a[m], scale_b[n + j], bias[n + j], has_bias);
      words[j] = output_word<Word>(acc(i + j), value, kind);
    }
    Word* target = out + (m0 + m) * p.stride_om + (n0 + n) * p.stride_on;
    const bool second = n0 + n + 1 < p.N;
    if (p.pairs && second) {
      using Pair = std::conditional_t<sizeof(Word) == 2, uint32_t, uint2>;
      *reinterpret_cast<Pair*>(target) = *reinterpret_cast<const Pair*>(words);
    } else {
      target[0] = words[0];
      if (second) target[p.stride_on] = words[1];
    }
  }
}

template <int kTileM, int kTileN, int kTileK, int kStages, int kWarpsM, int kWarpsN, class Word>
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

  const int k_tiles = (p.K + kTileK - 1) / kTileK;
  auto load = [&](int k_tile) {
    if (k_tile < k_tiles) {
      const int stage = k_tile % kStages;
      load_tile<kTileM, kTileK, kThreads>(sA(_, _, stage), p.a, p.ld_a, m0, p.M, k_tile * kTileK,
                                          p.K);
      load_tile<kTileN, kTileK, kThreads>(sB(_, _, stage), p.b, p.ld_b, n0, p.N, k_tile * kTileK,
                                          p.K);
    }
    cp_async_fence();  // an empty group keeps the count of groups in flight
  };
#pragma unroll
  for (int k_tile = 0; k_tile < kStages - 1; ++k_tile) load(k_tile);

  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the tile has arrived, and all have read the one that is overwritten next
    load(k_tile + kStages - 1);
    const int stage = k_tile % kStages;
#pragma unroll
    for (int k = 0; k < size<2>(rA); ++k) {
      copy(copy_a, from_a(_, _, k, stage), to_a(_, _, k));
      copy(copy_b, from_b(_, _, k, stage), to_b(_, _, k));
      gemm(mma, rA(_, _, k), rB(_, _, k), acc);
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the epilogue's vectors take the stages' place
  store_tile<Traits, kTileM, kTileN, Word>(p, acc, m0, n0, reinterpret_cast<float*>(shared));
}

template <int kTileM, int kTileN, int kTileK, int kStages, int kWarpsM, int kWarpsN, class Word>
struct Sm80Gemm {
  using Traits = Sm80Traits<kTileM, kTileN, kTileK, kStages, kWarpsM, kWarpsN>;
  static constexpr auto kKernel =
      &int8_gemm_sm80<kTileM, kTileN, kTileK, kStages, kWarpsM, kWarpsN, Word>;

  static void load() {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Traits::kSmemBytes),
          "loading an sm_80 INT8 GEMM");
  }

  static void launch(const GemmLaunch& launch) {
    const Int8GemmProblem& p = *launch.problem;
    const bool pairs = p.stride_on == 1 && (p.M == 1 || p.stride_om % 2 == 0) &&
                       reinterpret_cast<uintptr_t>(p.out) % (2 * sizeof(Word)) == 0;
    const Sm80Params params{
        int(p.M),    int(p.N),    int(p.K),
        launch.a,    launch.ld_a, launch.b,
        launch.ld_b, p.out,       p.stride_om,
        p.stride_on, pairs,       {p.scale_a, p.scale_b, p.bias, output_kind(p.out_dtype)}};
    const int64_t blocks = (round_up(p.M, kTileM) / kTileM) * (round_up(p.N, kTileN) / kTileN);
    kKernel<<<static_cast<unsigned>(blocks), Traits::kThreads, Traits::kSmemBytes, launch.stream>>>(
        params);
    check(cudaGetLastError(), "launching an sm_80 INT8 GEMM");
  }

  static bool register_kernel() {
    const TileConfig tile{kTileM, kTileN, kTileK, 1, 1, Schedule::kMultistage};
    return register_gemm_kernel(
        {KernelFamily::kSm80, tile, static_cast<int>(sizeof(Word)), &launch, &load});
  }
};

}  // namespace fastq::cuda
