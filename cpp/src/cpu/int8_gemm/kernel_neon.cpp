// int8_gemm with NEON's dot products: SDOT adds four products of signed bytes to an int32 lane,
// exact.
//
// A packed block is [16 groups of k][16 n][4 k]: four vectors of four columns a group. The other
// operand of SDOT is one of the four groups that a vector of a row holds, chosen by its lane.
#include <arm_neon.h>

#include <cstring>

#include "cpu/int8_gemm/epilogue.hpp"
#include "cpu/int8_gemm/kernels.hpp"

namespace fastq::cpu {
namespace {

constexpr int kRows = 4;               // rows of a that share the loads of b
constexpr int64_t kBlocksInL1 = 8;     // K blocks of 16 columns: 8 KB
constexpr int kVectors = kBlockN / 4;  // of four columns in a packed block

// sum[0:MR][0:16] += one group of k, the one in `Lane` of the vectors of a
template <int Lane, int MR>
inline void multiply_group(const int8x16_t* a, const int8_t* b, int32x4_t sum[MR][kVectors]) {
  FASTQ_UNROLL for (int j = 0; j < kVectors; ++j) {
    const int8x16_t columns = vld1q_s8(b + j * 16);
    FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
      sum[i][j] = vdotq_laneq_s32(sum[i][j], columns, a[i], Lane);
    }
  }
}

// acc[0:MR][0:16] += a times `blocks` K blocks
template <int MR>
void multiply_blocks(const int8_t* a, int64_t stride_am, const int8_t* b, int64_t blocks,
                     int32_t* acc) {
  int32x4_t sum[MR][kVectors];
  FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
    FASTQ_UNROLL for (int j = 0; j < kVectors; ++j) sum[i][j] = vld1q_s32(acc + i * kTileN + j * 4);
  }
  for (int64_t k = 0; k < blocks * kBlockK; k += 16, b += 16 * kBlockN) {
    int8x16_t rows[MR];
    FASTQ_UNROLL for (int i = 0; i < MR; ++i) rows[i] = vld1q_s8(a + i * stride_am + k);
    multiply_group<0, MR>(rows, b, sum);
    multiply_group<1, MR>(rows, b + 64, sum);
    multiply_group<2, MR>(rows, b + 128, sum);
    multiply_group<3, MR>(rows, b + 192, sum);
  }
  FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
    FASTQ_UNROLL for (int j = 0; j < kVectors; ++j) vst1q_s32(acc + i * kTileN + j * 4, sum[i][j]);
  }
}

void multiply_rows(const int8_t* a, int64_t stride_am, int rows, const int8_t* b, int64_t blocks,
                   int32_t* acc) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply_blocks<kRows>(a + r * stride_am, stride_am, b, blocks, acc + r * kTileN);
  }
  for (; r < rows; ++r) {
    multiply_blocks<1>(a + r * stride_am, stride_am, b, blocks, acc + r * kTileN);
  }
}

void packed_tile(const PackedTile& t, int32_t* acc) {
  fetch_lines(t.out);
  std::memset(acc, 0, static_cast<size_t>(t.rows) * kTileN * sizeof(int32_t));
  const int64_t full_blocks = t.K / kBlockK;
  const int64_t tail = t.K % kBlockK;
  alignas(64) int8_t a_tail[kTileM * kBlockK];
  for (int r = 0; r < t.rows && tail != 0; ++r) {
    int8_t* row = a_tail + r * kBlockK;
    std::memset(row, 0, kBlockK);
    std::memcpy(row, t.a + r * t.stride_am + full_blocks * kBlockK, tail);
  }
  for (int n = 0; n < t.cols; n += kBlockN) {
    const int8_t* b = t.b + n / kBlockN * t.block_stride;
    for (int64_t block = 0; block < full_blocks; block += kBlocksInL1) {
      const int64_t left = full_blocks - block;
      multiply_rows(t.a + block * kBlockK, t.stride_am, t.rows, b + block * kBlockBytes,
                    left < kBlocksInL1 ? left : kBlocksInL1, acc + n);
    }
    if (tail != 0) {
      multiply_rows(a_tail, kBlockK, t.rows, b + full_blocks * kBlockBytes, 1, acc + n);
    }
  }
}

// acc[0:MR][0:4] of four rows of w
template <int MR>
void dot_rows(const int8_t* a, int64_t stride_am, const int8_t* const w[4], int64_t K,
              int32_t* acc) {
  int32x4_t sum[MR][4];
  FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
    FASTQ_UNROLL for (int j = 0; j < 4; ++j) sum[i][j] = vdupq_n_s32(0);
  }
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    int8x16_t weight[4];
    FASTQ_UNROLL for (int j = 0; j < 4; ++j) weight[j] = vld1q_s8(w[j] + k);
    FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
      const int8x16_t activation = vld1q_s8(a + i * stride_am + k);
      FASTQ_UNROLL for (int j = 0; j < 4; ++j) {
        sum[i][j] = vdotq_s32(sum[i][j], weight[j], activation);
      }
    }
  }
  FASTQ_UNROLL for (int i = 0; i < MR; ++i) {
    FASTQ_UNROLL for (int j = 0; j < 4; ++j) {
      int32_t total = vaddvq_s32(sum[i][j]);
      for (int64_t tail = k; tail < K; ++tail) total += a[i * stride_am + tail] * w[j][tail];
      acc[i * kTileN + j] = total;
    }
  }
}

void dot_tile(const DotTile& t, int32_t* acc) {
  for (int n = 0; n < t.cols; n += 4) {
    const int8_t* w[4];  // rows past the last repeat it
    for (int j = 0; j < 4; ++j) {
      w[j] = t.w + (n + j < t.cols ? n + j : t.cols - 1) * t.stride_wn;
    }
    int r = 0;
    for (; r + kRows <= t.rows; r += kRows) {
      dot_rows<kRows>(t.a + r * t.stride_am, t.stride_am, w, t.K, acc + r * kTileN + n);
    }
    for (; r < t.rows; ++r) {
      dot_rows<1>(t.a + r * t.stride_am, t.stride_am, w, t.K, acc + r * kTileN + n);
    }
  }
}

}  // namespace

const GemmKernels kNeonGemmKernels = {nullptr, nullptr, packed_tile,        dot_tile,  nullptr, 0,
                                      0,       nullptr, pack_block_strided, write_tile};

}  // namespace fastq::cpu
