// int8_gemm with AVX512-VNNI.
//
// VPDPBUSD multiplies unsigned by signed bytes and adds four products to an int32 lane, without
// saturation. One operand is made unsigned by flipping its top bit (x + 128), so every sum comes
// out 128 times the sum of the other one too large, which is taken off. A packed activation is
// flipped where it is packed; in a dot product the weight is. All of it is exact modulo 2^32, and
// the true sum fits an int32.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/int8_gemm/epilogue.hpp"
#include "cpu/int8_gemm/fetch.hpp"
#include "cpu/int8_gemm/kernels.hpp"
#include "cpu/int8_gemm/pack_avx512.hpp"

namespace fastq::cpu {
namespace {

constexpr int64_t kBlocksInL1 = 2;      // K blocks of 64 columns: 8 KB
constexpr int64_t kStreamAhead = 2048;  // bytes of a column block fetched into L1 before their use

inline __m512i flip(__m512i b) { return _mm512_xor_si512(b, _mm512_set1_epi8(-128)); }

inline __m512i broadcast_group(const int8_t* a) {
  int32_t group;
  std::memcpy(&group, a, sizeof(group));
  return _mm512_set1_epi32(group);
}

// 128 * sum_k a[k], modulo 2^32
int32_t row_excess(const int8_t* a, int64_t K) {
  const __m512i u128 = _mm512_set1_epi8(-128);
  __m512i sum = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) sum = _mm512_dpbusd_epi32(sum, u128, _mm512_loadu_si512(a + k));
  if (k < K) {
    const __mmask64 mask = ~0ull >> (64 - (K - k));
    sum = _mm512_dpbusd_epi32(sum, u128, _mm512_maskz_loadu_epi8(mask, a + k));
  }
  return _mm512_reduce_add_epi32(sum);
}

// Sixteen columns of one row in the tiles side by side of a panel.
inline int32_t* sums_at(int32_t* acc, int row, int block) {
  constexpr int kBlocks = kTileN / kBlockN;  // of a tile
  return acc + (block / kBlocks * kPanelRows + row) * kTileN + block % kBlocks * kBlockN;
}

// acc[0:MR][0:16 * NR] += a times `blocks` K blocks. The rows of a are unsigned and lie 64 bytes
// apart, their next K block `a_step` bytes on. With kFetch, each line of b fetches the one
// kStreamAhead bytes on.
template <int MR, int NR, bool kFetch>
void multiply_blocks(const int8_t* a, int64_t a_step, const int8_t* b, int64_t block_stride,
                     int64_t blocks, int32_t* acc) {
  __m512i sum[MR][NR];
  FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
    FASTQ_UNROLL for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_load_si512(sums_at(acc, i, j));
  }
  for (int64_t block = 0; block < blocks; ++block, a += a_step) {
    for (int k = 0; k < kBlockK; k += 4, b += 64) {
      __m512i weight[NR];
      FASTQ_UNROLL for (int j = 0; j < NR; ++j) {
        weight[j] = _mm512_loadu_si512(b + j * block_stride);
        if (kFetch) fetch_run<_MM_HINT_T0>(address(b) + j * block_stride + kStreamAhead, 64);
      }
      FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
        const __m512i activation = broadcast_group(a + i * kBlockK + k);
        FASTQ_UNROLL for (int j = 0; j < NR; ++j) {
          sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], activation, weight[j]);
        }
      }
    }
  }
  FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
    FASTQ_UNROLL for (int j = 0; j < NR; ++j) _mm512_store_si512(sums_at(acc, i, j), sum[i][j]);
  }
}

// The first rows fetch b for the ones after them. 6 x 64 sums are 24 registers, which take ten
// loads for 24 products; 32 rows are four times six and two times four.
template <int NR>
void multiply_rows(const int8_t* a, int rows, const int8_t* b, int64_t block_stride, int64_t blocks,
                   int32_t* acc) {
  const int64_t a_step = rows * kBlockK;
  int r = 0;
  const auto step = [&](auto first, auto later, int count) {
    const auto kernel = r == 0 ? first : later;
    kernel(a + r * kBlockK, a_step, b, block_stride, blocks, acc + r * kTileN);
    r += count;
  };
  while (rows - r > 8) step(multiply_blocks<6, NR, true>, multiply_blocks<6, NR, false>, 6);
  while (rows - r >= 4) step(multiply_blocks<4, NR, true>, multiply_blocks<4, NR, false>, 4);
  if (rows - r >= 2) step(multiply_blocks<2, NR, true>, multiply_blocks<2, NR, false>, 2);
  if (rows - r >= 1) step(multiply_blocks<1, NR, true>, multiply_blocks<1, NR, false>, 1);
}

// Every sum is 128 * sum_k b[k, n] too large: where the accumulators start.
inline __m512i column_start(const int8_t* b, int64_t blocks) {
  const __m512i u128 = _mm512_set1_epi8(-128);
  __m512i sum[2] = {};
  for (int64_t group = 0; group < blocks * 16; group += 2, b += 128) {
    sum[0] = _mm512_dpbusd_epi32(sum[0], u128, _mm512_loadu_si512(b));
    sum[1] = _mm512_dpbusd_epi32(sum[1], u128, _mm512_loadu_si512(b + 64));
  }
  return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_add_epi32(sum[0], sum[1]));
}

inline __m512i column_start(const int32_t* sums) {
  return _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(sums)), 7);
}

void panel_tile(const PanelTile& t, int32_t* acc) {
  const int columns = (t.cols + kBlockN - 1) / kBlockN;
  for (int j = 0; j < columns; ++j) {
    const __m512i start = t.column_sums != nullptr
                              ? column_start(t.column_sums + j * kBlockN)
                              : column_start(t.b + j * t.block_stride, t.blocks);
    for (int r = 0; r < t.rows; ++r) _mm512_store_si512(sums_at(acc, r, j), start);
  }
  const int64_t chunks = (t.blocks + kBlocksInL1 - 1) / kBlocksInL1;
  RowFetcher out(t.out, chunks);
  RunFetcher next(t.next, chunks);
  constexpr decltype(&multiply_rows<1>) kMultiply[] = {multiply_rows<1>, multiply_rows<2>,
                                                       multiply_rows<3>, multiply_rows<4>};
  const auto multiply = kMultiply[columns - 1];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t block = chunk * kBlocksInL1;
    out.step();
    next.step(chunk);
    multiply(t.a + block * t.rows * kBlockK, t.rows, t.b + block * kBlockBytes, t.block_stride,
             std::min(t.blocks - block, kBlocksInL1), acc);
  }
}

// The four sums of the lanes of v0..v3.
inline __m128i sum_lanes(const __m512i v[4]) {
  __m256i half[4];
  for (int j = 0; j < 4; ++j) {
    half[j] = _mm256_add_epi32(_mm512_castsi512_si256(v[j]), _mm512_extracti64x4_epi64(v[j], 1));
  }
  const __m256i pairs =
      _mm256_hadd_epi32(_mm256_hadd_epi32(half[0], half[1]), _mm256_hadd_epi32(half[2], half[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

// acc[0:MR][0:4] of four rows of w; rows past the last repeat it
template <int MR>
void dot_rows(const int8_t* a, int64_t stride_am, const int8_t* const w[4], int64_t K,
              int64_t fetch_ahead, const int32_t* excess, int32_t* acc) {
  __m512i sum[MR][4];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_si512();
  }
  const auto step = [&](int64_t k, __mmask64 mask) {
    __m512i weight[4];
    for (int j = 0; j < 4; ++j) {
      weight[j] = flip(_mm512_maskz_loadu_epi8(mask, w[j] + k));
      // A short row ends before the hardware's prefetcher has caught up with it.
      // An address, not a pointer: past the end of the weight the fetch does nothing.
      const auto ahead = reinterpret_cast<uintptr_t>(w[j]) + k + fetch_ahead;
      if (fetch_ahead != 0) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    for (int i = 0; i < MR; ++i) {
      const __m512i activation = _mm512_maskz_loadu_epi8(mask, a + i * stride_am + k);
      for (int j = 0; j < 4; ++j) {
        sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], weight[j], activation);
      }
    }
  };
  int64_t k = 0;
  for (; k + 64 <= K; k += 64) step(k, ~0ull);
  if (k < K) step(k, ~0ull >> (64 - (K - k)));
  for (int i = 0; i < MR; ++i) {
    const __m128i result = _mm_sub_epi32(sum_lanes(sum[i]), _mm_set1_epi32(excess[i]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(acc + i * kTileN), result);
  }
}

}  // namespace

void dot_tile_avx512_vnni(const DotTile& t, int32_t* acc) {
  int32_t excess[kTileM];
  for (int r = 0; r < t.rows; ++r) excess[r] = row_excess(t.a + r * t.stride_am, t.K);
  for (int n = 0; n < t.cols; n += 4) {
    const int8_t* w[4];
    for (int j = 0; j < 4; ++j) {
      w[j] = t.w + (n + j < t.cols ? n + j : t.cols - 1) * t.stride_wn;
    }
    int r = 0;
    const auto step = [&](auto kernel, int count) {
      for (; r + count <= t.rows; r += count) {
        // The first pass over these rows of the weight fetches those of the next four.
        const int64_t fetch_ahead = r == 0 ? 4 * t.stride_wn : 0;
        kernel(t.a + r * t.stride_am, t.stride_am, w, t.K, fetch_ahead, excess + r,
               acc + r * kTileN + n);
      }
    };
    step(dot_rows<4>, 4);
    step(dot_rows<2>, 2);
    step(dot_rows<1>, 1);
  }
}

const GemmKernels kAvx512VnniGemmKernels = {
    nullptr,       nullptr, nullptr, dot_tile_avx512_vnni, panel_tile,
    kMaxPanelCols, -128,    nullptr, pack_block_avx512,    write_tile};

}  // namespace fastq::cpu
