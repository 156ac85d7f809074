// FlashAttention's forward pass by mma.sync, for Ampere and everything after it.
//
// A block takes kTileM queries of a head, a warp 16 or 32 of them, and goes over the keys from
// right to left, kTileN at a time: scores by QK^T, the online softmax in registers
// (flash_attention_tile.cuh), whose exponentials are PV's left operand where they lie. cp.async
// brings k while PV runs and v while QK^T does, and fills what lies past the edges with zeros. Rows
// of shared memory are padded by 16 bytes, so that ldmatrix meets no bank conflict.
//
// Template parameters are the dtype and head_dim (rounded up), which shape the registers; masks,
// softcap, ALiBi, packed sequences, grouped heads and strides are run-time branches outside the
// loops over registers.
#pragma once

#include <type_traits>

#include "flash_attention/flash_attention_kernels.hpp"
#include "flash_attention/flash_attention_tile.cuh"
#include "runtime/copy_async.cuh"
#include "runtime/mma_sync.cuh"

namespace fastq::cuda {

template <class T_, int kHeadDim_, int kTileM_, int kTileN_, int kWarps_>
struct Sm80AttentionTraits {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kTileM = kTileM_, kTileN = kTileN_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = kTileM / kWarps, kRowTiles = kWarpRows / 16;
  static constexpr int kPitch = kHeadDim + 8;  // elements
  static constexpr int kSmemBytes = (kTileM + 2 * kTileN) * kPitch * 2;
  // A row of 16-byte chunks is copied by so many threads, a power of two.
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kCopyThreads = kChunks % 8 == 0 ? 8 : 4;
  static_assert(kRowTiles * 16 * kWarps == kTileM && kChunks % kCopyThreads == 0);
};

struct Sm80AttentionParams {
  FlashAttentionProblem problem;
  int tiles_m, group;                         // tiles of queries, heads that share a key head
  bool is_vectorizable, out_is_vectorizable;  // rows begin at multiples of 16 bytes
};

// What copy_rows takes of rows that begin at `rows`.
template <class Traits>
__device__ inline const uint16_t* first_of_thread(const uint16_t* rows, int64_t stride) {
  const int thread = threadIdx.x;
  return rows + thread / Traits::kCopyThreads * stride + thread % Traits::kCopyThreads * 8;
}

// Brings kRows rows of head_dim elements to shared memory, zeros past `rows` and past head_dim; or
// one of `parts` parts of that.
template <class Traits, int kRows>
__device__ inline void copy_rows(uint16_t* shared, const uint16_t* from, int64_t stride, int rows,
                                 int head_dim, int part = 0, int parts = 1) {
  constexpr int kStep = Traits::kThreads / Traits::kCopyThreads;
  constexpr int kPerRow = Traits::kChunks / Traits::kCopyThreads;
  constexpr int kCopies = (kRows + kStep - 1) / kStep * kPerRow;
  const int first = threadIdx.x / Traits::kCopyThreads;
  const int column = threadIdx.x % Traits::kCopyThreads * 8;
  const uint32_t to =
      static_cast<uint32_t>(__cvta_generic_to_shared(shared + first * Traits::kPitch + column));
#pragma unroll
  for (int copy = 0; copy < kCopies; ++copy) {
    if (copy * parts / kCopies != part) continue;
    const int row = copy / kPerRow * kStep, d = copy % kPerRow * Traits::kCopyThreads * 8;
    if (kRows % kStep != 0 && first + row >= kRows) break;
    copy_async_16_or_zeros(to + (row * Traits::kPitch + d) * 2, from + row * stride + d,
                           first + row < rows && column + d < head_dim);
  }
}

// The same, at once and for any alignment.
template <class Traits, int kRows>
__device__ inline void copy_elements(uint16_t* shared, const uint16_t* from, int64_t stride,
                                     int rows, int head_dim) {
  const int first = threadIdx.x / Traits::kCopyThreads;
  const int chunk = threadIdx.x % Traits::kCopyThreads;
  from -= chunk * 8;
#pragma unroll 1
  for (int row = 0; first + row < kRows; row += Traits::kThreads / Traits::kCopyThreads) {
#pragma unroll 1
    for (int d = chunk; d < Traits::kHeadDim; d += Traits::kCopyThreads) {
      const bool is_there = first + row < rows && d < head_dim;
      shared[(first + row) * Traits::kPitch + d] = is_there ? from[row * stride + d] : 0;
    }
  }
}

// Where this lane's ldmatrix begins: rows lane % 8 of four 8 x 8 matrices, the second 8 rows below
// the first and the third 8 columns to its right (operands by rows, and v), or the other way
// around (k).
template <class Traits>
__device__ inline uint32_t matrices_by_rows(const uint16_t* shared) {
  const int lane = threadIdx.x % 32;
  return static_cast<uint32_t>(
      __cvta_generic_to_shared(shared + lane % 16 * Traits::kPitch + lane / 16 * 8));
}
template <class Traits>
__device__ inline uint32_t matrices_by_columns(const uint16_t* shared) {
  const int lane = threadIdx.x % 32;
  return static_cast<uint32_t>(__cvta_generic_to_shared(
      shared + (lane % 8 + lane / 16 * 8) * Traits::kPitch + lane / 8 % 2 * 8));
}

// Outputs of a warp's rows, through its own rows of shared memory.
template <class Traits>
__device__ inline void store_outputs(const Sm80AttentionParams& p, const QueryTile& tile, int query,
                                     uint16_t* shared,
                                     float (&o)[Traits::kRowTiles][Traits::kHeadDim / 8][4],
                                     const float (&scale)[Traits::kRowTiles][2]) {
  using T = typename Traits::T;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Traits::kRowTiles; ++m) {
#pragma unroll
    for (int j = 0; j < Traits::kHeadDim / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* const x = o[m][j] + 2 * half;
        uint16_t* const to =
            shared + (16 * m + lane / 4 + 8 * half) * Traits::kPitch + 8 * j + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(to) = pack(x[0] * scale[m][half], x[1] * scale[m][half], T{});
      }
    }
  }
  __syncwarp();
  uint16_t* const out = tile.row_of<uint16_t>(p.problem.out, tile.begin_q, query, tile.head);
  const int rows = min(Traits::kWarpRows, tile.seqlen_q - query);
  const int head_dim = static_cast<int>(p.problem.head_dim);
  if (p.out_is_vectorizable) {
    for (int i = lane; i < rows * Traits::kChunks; i += 32) {
      const int row = i / Traits::kChunks, d = i % Traits::kChunks * 8;
      if (d >= head_dim) continue;
      *reinterpret_cast<uint4*>(out + row * p.problem.out.stride_seqlen + d) =
          *reinterpret_cast<const uint4*>(shared + row * Traits::kPitch + d);
    }
  } else {
    for (int row = 0; row < rows; ++row) {
      for (int d = lane; d < head_dim; d += 32) {
        out[row * p.problem.out.stride_seqlen + d] = shared[row * Traits::kPitch + d];
      }
    }
  }
}

// With a causal mask the last queries of a head have the most to do: they come first.
template <int kTileM>
__device__ inline bool set_tile(const Sm80AttentionParams& params, int block, QueryTile& tile) {
  const int heads = static_cast<int>(params.problem.num_heads);
  const int index = block / params.tiles_m;
  const int first = (params.tiles_m - 1 - block % params.tiles_m) * kTileM;
  return tile.set(params.problem, params.group, index / heads, index % heads, first);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    flash_attention_sm80(const __grid_constant__ Sm80AttentionParams params) {
  using T = typename Traits::T;
  constexpr int kTileM = Traits::kTileM, kTileN = Traits::kTileN, kHeadDim = Traits::kHeadDim;
  constexpr int kRowTiles = Traits::kRowTiles, kPitch = Traits::kPitch;
  const FlashAttentionProblem& p = params.problem;
  extern __shared__ __align__(128) uint16_t shared[];
  uint16_t* const shared_q = shared;
  uint16_t* const shared_k = shared_q + kTileM * kPitch;
  uint16_t* const shared_v = shared_k + kTileN * kPitch;

  QueryTile tile;
  if (!set_tile<kTileM>(params, blockIdx.x, tile)) return;
  const int first_query = tile.first;
  const QueryTile::KeyBlocks blocks = tile.key_blocks(0, kTileM, kTileN);
  const int begin = blocks.begin, end = blocks.end;

  const int head_dim = static_cast<int>(p.head_dim);
  const auto* q = tile.row_of<const uint16_t>(p.q, tile.begin_q, first_query, tile.head);
  const int rows_q = tile.seqlen_q - first_query;
  const auto last_block = [&](const AttentionTensor& t) {
    const auto* rows =
        tile.row_of<const uint16_t>(t, tile.begin_k, (end - 1) * kTileN, tile.head_k);
    return first_of_thread<Traits>(rows, t.stride_seqlen);
  };
  const uint16_t *k = last_block(p.k), *v = last_block(p.v);
  const auto copy_k = [&](int block) {
    copy_rows<Traits, kTileN>(shared_k, k, p.k.stride_seqlen, tile.seqlen_k - block * kTileN,
                              head_dim);
  };
  const auto copy_v = [&](int block, int part = 0, int parts = 1) {
    copy_rows<Traits, kTileN>(shared_v, v, p.v.stride_seqlen, tile.seqlen_k - block * kTileN,
                              head_dim, part, parts);
  };
  const auto copy_elements_of = [&](uint16_t* shared, const uint16_t* from,
                                    const AttentionTensor& t, int block) {
    copy_elements<Traits, kTileN>(shared, from, t.stride_seqlen, tile.seqlen_k - block * kTileN,
                                  head_dim);
  };
  q = first_of_thread<Traits>(q, p.q.stride_seqlen);
  if (params.is_vectorizable) {
    copy_rows<Traits, kTileM>(shared_q, q, p.q.stride_seqlen, rows_q, head_dim);
    if (begin < end) copy_k(end - 1);
    copy_async_commit();
    if (begin < end) copy_v(end - 1);
    copy_async_commit();
  } else {
    copy_elements<Traits, kTileM>(shared_q, q, p.q.stride_seqlen, rows_q, head_dim);
    if (begin < end) copy_elements_of(shared_k, k, p.k, end - 1);
    if (begin < end) copy_elements_of(shared_v, v, p.v, end - 1);
  }
  k -= kTileN * p.k.stride_seqlen;

  const int warp_row = threadIdx.x / 32 * Traits::kWarpRows;
  const int query = first_query + warp_row + threadIdx.x % 32 / 4;  // this lane's first
  const uint32_t q_matrices = matrices_by_rows<Traits>(shared_q + warp_row * kPitch);
  const uint32_t k_matrices = matrices_by_columns<Traits>(shared_k);
  const uint32_t v_matrices = matrices_by_rows<Traits>(shared_v);

  // Worked out anew where it is needed, sooner than take registers from the loop.
  const auto tile_again = [&] {
    QueryTile its;
    set_tile<kTileM>(params, not_hoisted(blockIdx.x), its);
    return its;
  };

  float o[kRowTiles][kHeadDim / 8][4] = {};
  RowSoftmax softmax[kRowTiles];
#pragma unroll 1
  for (int block_n = end - 1; block_n >= begin; --block_n) {
    const int key = block_n * kTileN;
    copy_async_wait<1>();
    __syncthreads();  // k has arrived, and v has been read
    // The copies of v are spread over the product, which waits for shared memory otherwise.
    const bool copies_v = params.is_vectorizable && block_n < end - 1;
    if (!params.is_vectorizable && block_n < end - 1) copy_elements_of(shared_v, v, p.v, block_n);

    float s[kRowTiles][kTileN / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      if (copies_v) copy_v(block_n, d / 16, kHeadDim / 16);
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_matrices(q_matrices + (m * 16 * kPitch + d) * 2, a[m]);
      }
#pragma unroll
      for (int n = 0; n < kTileN; n += 16) {
        uint32_t b[4];
        load_matrices(k_matrices + (n * kPitch + d) * 2, b);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(a[m], b[0], b[1], s[m][n / 8]);
          mma<T>(a[m], b[2], b[3], s[m][n / 8 + 1]);
        }
      }
    }
    copy_async_commit();
    __syncthreads();  // k has been read
    if (block_n > begin) {
      if (params.is_vectorizable) {
        copy_k(block_n - 1);
      } else {
        copy_elements_of(shared_k, k, p.k, block_n - 1);
      }
    }
    copy_async_commit();

    if (transforms_scores(p)) {
      const QueryTile its = tile_again();
      const float slope = alibi_slope(p, its);
      const auto distance = static_cast<float>(its.position(query) - key);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) transform_scores(p, slope, distance + 16 * m, s[m]);
    }
    if (key < blocks.whole_begin || key + kTileN > blocks.whole_end) {
      const QueryTile its = tile_again();
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) mask_scores(its, query + 16 * m, key, s[m]);
    }
    uint32_t exponentials[kRowTiles][kTileN / 16][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      float rescale[2];
      const bool rescales = softmax[m].refer(s[m], score_factor(p), rescale);
      softmax[m].exponentiate(s[m], score_factor(p));
#pragma unroll
      for (int n = 0; n < kTileN / 16; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const x = s[m][2 * n + i / 2] + i % 2 * 2;
          // Now: the compiler would rather keep both floats until the product, and spill others.
          exponentials[m][n][i] = not_hoisted(pack(x[0], x[1], T{}));
        }
      }
      if (!rescales) continue;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][j][i] *= rescale[i / 2];
      }
    }
    copy_async_wait<1>();
    __syncthreads();  // v has arrived
#pragma unroll
    for (int n = 0; n < kTileN; n += 16) {
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16) {
        uint32_t b[4];
        load_transposed_matrices(v_matrices + (n * kPitch + d) * 2, b);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(exponentials[m][n / 16], b[0], b[1], o[m][d / 8]);
          mma<T>(exponentials[m][n / 16], b[2], b[3], o[m][d / 8 + 1]);
        }
      }
    }
    copy_async_commit();  // nothing: one group comes after k's, as in the first turn
    k -= kTileN * p.k.stride_seqlen;
    v -= kTileN * p.v.stride_seqlen;
  }
  copy_async_wait<0>();
  __syncthreads();  // q has arrived even where there are no keys, and been read

  const QueryTile its = tile_again();
  float scale[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    softmax[m].finish(its, query + 16 * m, scale[m]);
    softmax[m].store_lse(p, its, query + 16 * m);
  }
  if (first_query + warp_row < its.seqlen_q) {
    store_outputs<Traits>(params, its, first_query + warp_row, shared_q + warp_row * kPitch, o,
                          scale);
  }
}

template <class Traits>
struct Sm80Attention {
  static constexpr auto kKernel = &flash_attention_sm80<Traits>;

  static void load() {
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Traits::kSmemBytes),
          "loading an sm_80 attention kernel");
  }

  static void launch(const FlashAttentionProblem& p, void*) {
    Sm80AttentionParams params{};
    params.problem = p;
    params.tiles_m = static_cast<int>(ceil_div(p.seqlen_q, Traits::kTileM));
    params.group = static_cast<int>(p.num_heads / p.num_heads_k);
    const bool whole_chunks = p.head_dim % 8 == 0;
    params.is_vectorizable =
        whole_chunks && is_aligned(p.q, 8) && is_aligned(p.k, 8) && is_aligned(p.v, 8);
    params.out_is_vectorizable = whole_chunks && is_aligned(p.out, 8);
    const int64_t blocks = p.batch * p.num_heads * params.tiles_m;
    kKernel<<<attention_grid(blocks), Traits::kThreads, Traits::kSmemBytes,
              static_cast<cudaStream_t>(p.stream)>>>(params);
    check(cudaGetLastError(), "launching an sm_80 attention kernel");
  }

  static bool register_kernel() {
    constexpr DType dtype =
        std::is_same_v<typename Traits::T, __half> ? DType::kFloat16 : DType::kBFloat16;
    return register_attention_kernel(
        {KernelFamily::kSm80, dtype, Traits::kHeadDim, Traits::kTileM, 0, &launch, &load});
  }
};

}  // namespace fastq::cuda
