// How the kernels of int8_gemm_sm90_swapped.cuh write what a warpgroup has summed up: the
// accumulators hold channels x tokens, the rows of out are tokens.
#pragma once

#include <cutlass/arch/barrier.h>

#include "epilogue/output.cuh"

namespace fastq::cuda {

// What a warpgroup writes: its part of a tile.
struct SwappedPart {
  int m0, n0;            // the first token and channel of the accumulators; blocks of 64 channels
                         // are Traits::kBlockStride apart
  int m_begin, n_begin;  // the first ones to write
  int n_end;             // past the last channel
  int lane128;           // this thread in the warpgroup
  int barrier;           // the warpgroup's named barrier

  __device__ void sync() const { cutlass::arch::NamedBarrier::sync(128, barrier); }
};

// Calls visit(i, channel, token) for this thread's accumulators i of kTokens tokens in a block of
// 64 channels.
template <int kTokens, class Visit>
__device__ inline void for_each_sum(int lane128, const Visit& visit) {
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int channel = lane128 / 32 * 16 + lane128 % 32 / 4 + i / 2 * 8;
      visit(4 * j + i, channel, 8 * j + lane128 % 4 * 2 + i % 2);
    }
  }
}

// Any output: 64 channels and a chunk of tokens at a time, the int32 sums go through shared memory,
// which turns the fragments into rows of out.
template <class Traits>
__device__ inline void swapped_write(const OutputParams& p,
                                     typename Traits::Shared::Staging& staging,
                                     const OutputRow* rows, const SwappedPart& part,
                                     const AddedOutliers& outliers,
                                     const typename Traits::Sums& acc) {
  constexpr int kChunk = Traits::kChunk;
  constexpr int kChunks = Traits::kTileM / kChunk;
  static_assert(Traits::kTileM % kChunk == 0);
  auto& sums = staging.sums;
  const int in_block = part.lane128 % 8 * 8;
  OutputColumns columns;
#pragma unroll 1
  for (int turn = 0; turn < Traits::kBlocks * kChunks; ++turn) {
    const int n = part.n0 + turn / kChunks * Traits::kBlockStride + in_block;
    const int first = turn % kChunks * kChunk;
    const int count = min(kChunk, p.M - part.m0 - first);
    if (first == 0 && n < part.n_end) load_columns(p, n, columns);
    if (count <= 0) continue;  // the same for the whole warpgroup
    part.sync();               // the chunk before has been read
#pragma unroll
    for (int t = 0; t < Traits::kBlocks * kChunks; ++t) {  // registers have fixed indices
      if (turn != t) continue;
      for_each_sum<kChunk>(part.lane128, [&](int i, int channel, int token) {
        sums[token][channel] = acc[t / kChunks][t % kChunks * (kChunk / 2) + i];
      });
    }
    part.sync();
    if (n < part.n_begin || n >= part.n_end) continue;
#pragma unroll 1
    for (int row = part.lane128 / 8; row < count; row += 16) {
      if (part.m0 + first + row < part.m_begin) continue;
      int32_t values[8];
      const int4* source = reinterpret_cast<const int4*>(&sums[row][in_block]);
      *reinterpret_cast<int4*>(values) = source[0];
      *reinterpret_cast<int4*>(values + 4) = source[1];
      store_row(p, columns, rows[first + row], part.m0 + first + row, n, values, outliers);
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
// warp's 16, and 8 more, in each block of 64.
template <class Traits>
struct SwappedPlainColumns {
  float scale_b[Traits::kBlocks][2], bias[Traits::kBlocks][2];

  __device__ void load(const OutputParams& p, int n0, int lane128) {
#pragma unroll
    for (int block = 0; block < Traits::kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n =
            n0 + block * Traits::kBlockStride + lane128 / 32 * 16 + 8 * i + lane128 % 32 / 4;
        if (n >= p.N) continue;
        scale_b[block][i] = load_float(p.scale_b.data, DType::kFloat32, n * p.scale_b.stride);
        bias[block][i] = -0.0f;
        if (p.bias.data == nullptr) continue;
        bias[block][i] = load_float(p.bias.data, p.bias.dtype, n * p.bias.stride);
      }
    }
  }
};

// 16 bytes in one instruction, which the compiler might split.
__device__ inline void store_16_bytes(void* out, const uint4& words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(out), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// A plain output of 16-bit floats: scaled in registers, unless it is, turned by stmatrix, 64
// channels and up to 64 tokens at a time.
template <class Traits, DType kDType>
__device__ inline void swapped_write_plain(const OutputParams& p,
                                           typename Traits::Shared::Staging& staging,
                                           const float* scales, const SwappedPart& part,
                                           const SwappedPlainColumns<Traits>& columns,
                                           bool is_scaled, const typename Traits::Sums& acc) {
  constexpr int kLines = Traits::kLines, kStores = (kLines + 15) / 16;
  const int lane = part.lane128 % 32, warp = part.lane128 / 32;
  // A line is 64 channels of a token; its eight 16-byte pieces are permuted by the token.
  const int piece = part.lane128 % 8, first_line = part.lane128 / 8;
  uint16_t* const corner =
      static_cast<uint16_t*>(p.out) + (part.m0 + first_line) * p.stride_om + part.n0 + 8 * piece;
#pragma unroll
  for (int turn = 0; turn < Traits::kTurns; ++turn) {
    const int block = turn % Traits::kBlocks, first = turn / Traits::kBlocks * kLines;
    auto& lines = staging.lines[turn % Traits::kLineBuffers];
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
          const uint32_t sum = acc[block][at + j];
          const float scale_b = columns.scale_b[block][i % 2];
          y[j] = is_scaled ? __uint_as_float(sum) : scale_sum(sum, scales[token + j], scale_b);
          y[j] = __fadd_rn(y[j], columns.bias[block][i % 2]);
        }
        words[i] = narrow_pair(y[0], y[1], kDType);
      }
      const int line = t + lane / 16 * 8 + lane % 8;
      store_matrices_transposed<Traits::kTileM == 8 ? 2 : 4>(
          &lines[line % kLines][(2 * warp + lane / 8 % 2) ^ (lane % 8)], words);
    }
    part.sync();
    const int n = part.n0 + block * Traits::kBlockStride + 8 * piece;
    if (n < part.n_begin || n >= part.n_end) continue;
    const int begin = part.m_begin - part.m0 - first;
    const int end = min(min(kLines, Traits::kTileM - first), p.M - part.m0 - first);
    uint16_t* out = corner + first * p.stride_om + block * Traits::kBlockStride;
    if (n + 8 > p.N) {  // N ends within the piece
      for (int line = first_line; line < end; line += 16, out += 16 * p.stride_om) {
        const auto* source = reinterpret_cast<const uint16_t*>(&lines[line][piece ^ (line % 8)]);
        for (int i = 0; line >= begin && n + i < p.N; ++i) out[i] = source[i];
      }
      continue;
    }
    uint4 words[kStores];
#pragma unroll
    for (int i = 0; i < kStores; ++i) {
      words[i] = lines[(first_line + 16 * i) % kLines][piece ^ (first_line % 8)];
    }
#pragma unroll
    for (int i = 0; i < kStores; ++i, out += 16 * p.stride_om) {
      const int line = first_line + 16 * i;
      if (line >= begin && line < end) store_16_bytes(out, words[i]);
    }
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
    store_row(p, columns, output_row, box.x + row, n, values, {});
  }
}

}  // namespace fastq::cuda
