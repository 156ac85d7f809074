// What an instruction set provides for int8_gemm: a few functions that fill one tile of int32 sums,
// and one that turns such a tile into output.
//
// A tile is acc[kTileM][kTileN], row-major; rows and columns past the problem's edge hold anything.
// Operands of a tile function are read exactly within their (rows, K): the last K % 64 bytes of a
// row go through a zero-padded copy.
#pragma once

#include <cstdint>

#include "core/problem.hpp"
#include "cpu/isa.hpp"

// Before a loop over accumulators: unrolled early, they are registers. GCC otherwise keeps an array
// of them on the stack and stores each one after each use.
#define FASTQ_UNROLL _Pragma("GCC unroll 16")

namespace fastq::cpu {

constexpr int kTileM = 128;
constexpr int kTileN = 32;
constexpr int kPanelRows = 32;                  // rows of a packed panel of a
constexpr int kMaxPanelCols = 64;               // columns that a panel is multiplied by at once
constexpr int kBlockN = 16;                     // columns of a packed block
constexpr int kBlockK = 64;                     // rows of K of a packed block
constexpr int kBlockBytes = kBlockN * kBlockK;  // [16 groups of k][16 n][4 k]

// Cache lines that will be needed soon: `rows` runs of `lines` each, `stride` bytes apart. An
// address, not a pointer: to fetch past the end of the memory does nothing.
struct Fetch {
  uintptr_t address;
  int64_t stride;
  int64_t rows;
  int64_t lines;
};

struct Run {
  uintptr_t address;
  int64_t lines;
};

// acc[m][n] = sum_k a[m * stride_am + k] * b(k, n), b as packed blocks: column block j at
// b + j * block_stride, its K blocks consecutive.
struct PackedTile {
  const int8_t* a;
  int64_t stride_am;
  int rows;  // at most kTileM
  const int8_t* b;
  int64_t block_stride;
  int cols;  // at most kTileN
  int64_t K;
  Fetch out;  // what the output will be written to
};

// The same sums with rows of a in packed form, [K / 64][rows][64], as tiles side by side of
// acc[kPanelRows][kTileN].
struct PanelTile {
  const int8_t* a;
  int rows;  // at most kPanelRows
  const int8_t* b;
  int64_t block_stride;
  int cols;                    // at most panel_cols of the kernels
  int64_t blocks;              // of K
  const int32_t* column_sums;  // sum_k b(k, n), or null where they are not known
  Fetch out;                   // what the output will be written to
  Run next;                    // a share of what the tiles after this one read
};

// acc[m][n] = sum_k a[m * stride_am + k] * w[n * stride_wn + k]
struct DotTile {
  const int8_t* a;
  int64_t stride_am;
  int rows;  // at most kTileM
  const int8_t* w;
  int64_t stride_wn;
  int cols;  // at most kTileN
  int64_t K;
};

// The same sums with the activation packed as if it were the weight: a(k, m) as packed blocks.
struct SwappedTile {
  const int8_t* a;
  int64_t block_stride;
  int rows;  // at most kPanelRows
  const int8_t* w;
  int64_t stride_wn;
  int cols;  // at most kTileN
  int64_t K;
  int64_t fetch_row;  // rows of w, counted from its first, to fetch into L2 meanwhile
  int fetch_rows;
  Fetch out;  // what the output will be written to
};

static inline void fetch_lines(const Fetch& fetch) {
  for (int64_t row = 0; row < fetch.rows; ++row) {
    const uintptr_t line = fetch.address + row * fetch.stride;
    for (int64_t i = 0; i < fetch.lines; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(line + i * 64), 1);
    }
  }
}

struct GemmKernels {
  // Set up and leave whatever state the tile functions need on a thread. May be null.
  void (*begin)();
  void (*end)();
  void (*packed_tile)(const PackedTile& tile, int32_t* acc);  // null where panel_tile is not
  void (*dot_tile)(const DotTile& tile, int32_t* acc);
  void (*panel_tile)(const PanelTile& tile, int32_t* acc);  // null without AVX-512
  int panel_cols;                                           // whole tiles, kMaxPanelCols at most
  int8_t panel_flip;                                        // xor-ed into the bytes of panels
  void (*swapped_tile)(const SwappedTile& tile, int32_t* acc);  // null but for AMX
  // One block from b[k * stride_bk + n * stride_bn], zero-padded past k and n.
  void (*pack_block)(const int8_t* b, int64_t stride_bk, int64_t stride_bn, int k, int n,
                     int8_t* block);
  // Scales, bias, rounding and the store of out[m0 : m0 + rows, n0 : n0 + cols].
  void (*write_tile)(const Int8GemmProblem& problem, int64_t m0, int rows, int64_t n0, int cols,
                     const int32_t* acc);
};

extern const GemmKernels kScalarGemmKernels;
void pack_block_strided(const int8_t* b, int64_t stride_bk, int64_t stride_bn, int k, int n,
                        int8_t* block);
#if defined(__x86_64__)
extern const GemmKernels kAvx2GemmKernels;
extern const GemmKernels kAvx512VnniGemmKernels;
extern const GemmKernels kAmxGemmKernels;
void dot_tile_avx512_vnni(const DotTile& tile, int32_t* acc);
#elif defined(__aarch64__)
extern const GemmKernels kNeonGemmKernels;
#endif

inline const GemmKernels& gemm_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx) return kAmxGemmKernels;
  if (isa == Isa::kAvx512Vnni) return kAvx512VnniGemmKernels;
  if (isa == Isa::kAvx2) return kAvx2GemmKernels;
#elif defined(__aarch64__)
  if (isa == Isa::kNeon) return kNeonGemmKernels;
#endif
  (void)isa;
  return kScalarGemmKernels;
}

}  // namespace fastq::cpu
