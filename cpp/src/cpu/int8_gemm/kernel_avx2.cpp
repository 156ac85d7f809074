// int8_gemm with AVX2.
//
// Bytes are widened to int16, multiplied and added in pairs (VPMADDWD, exact), and summed in int32.
// VPMADDUBSW would be shorter, but it saturates at 16 bits and is wrong for large values.
#include <immintrin.h>

#include <cstring>

#include "cpu/int8_gemm/epilogue.hpp"
#include "cpu/int8_gemm/kernels.hpp"

namespace fastq::cpu {
namespace {

constexpr int kRows = 4;        // rows of a that share the widening of b
constexpr int kBlocksInL1 = 4;  // K blocks widened at a time: 2 KB of int16 for four rows

inline __m256i widen(const int8_t* src) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}

inline __m256i broadcast_group(const int16_t* a) {
  int64_t group;
  std::memcpy(&group, a, sizeof(group));
  return _mm256_set1_epi64x(group);
}

// acc[0:MR][0:8] += a times eight columns of `groups` k-groups. A lane of `sum` holds one pair of
// products of one column, so that two lanes a column are added at the end.
template <int MR>
void multiply_columns(const int16_t* a, int64_t stride_a, const int8_t* b, int groups,
                      int32_t* acc) {
  __m256i sum[MR][2];
  for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
  for (int g = 0; g < groups; ++g, a += 4, b += 64) {
    const __m256i columns0 = widen(b), columns4 = widen(b + 16);
    for (int i = 0; i < MR; ++i) {
      const __m256i group = broadcast_group(a + i * stride_a);
      sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(columns0, group));
      sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(columns4, group));
    }
  }
  for (int i = 0; i < MR; ++i) {
    const __m256i pairs = _mm256_hadd_epi32(sum[i][0], sum[i][1]);  // 0 1 4 5 2 3 6 7
    __m256i* target = reinterpret_cast<__m256i*>(acc + i * kTileN);
    const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
    _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), ordered));
  }
}

void widen_rows(const int8_t* a, int64_t stride_am, int rows, int count, int16_t* wide) {
  constexpr int kWidth = kBlocksInL1 * kBlockK;
  for (int r = 0; r < rows; ++r) {
    int k = 0;
    for (; k < count; ++k) wide[r * kWidth + k] = a[r * stride_am + k];
    for (; k % kBlockK != 0; ++k) wide[r * kWidth + k] = 0;
  }
}

void packed_tile(const PackedTile& t, int32_t* acc) {
  fetch_lines(t.out);
  constexpr int kWidth = kBlocksInL1 * kBlockK;
  alignas(32) int16_t wide[kRows * kWidth];
  std::memset(acc, 0, static_cast<size_t>(t.rows) * kTileN * sizeof(int32_t));
  for (int64_t k = 0; k < t.K; k += kWidth) {
    const int count = static_cast<int>(t.K - k < kWidth ? t.K - k : kWidth);
    const int groups = (count + kBlockK - 1) / kBlockK * (kBlockK / 4);
    for (int r = 0; r < t.rows; r += kRows) {
      const int rows = t.rows - r < kRows ? t.rows - r : kRows;
      widen_rows(t.a + r * t.stride_am + k, t.stride_am, rows, count, wide);
      for (int n = 0; n < t.cols; n += 8) {
        const int8_t* b = t.b + n / kBlockN * t.block_stride + k * kBlockN + n % kBlockN * 4;
        int32_t* target = acc + r * kTileN + n;
        if (rows == kRows) {
          multiply_columns<kRows>(wide, kWidth, b, groups, target);
        } else {
          for (int i = 0; i < rows; ++i) {
            multiply_columns<1>(wide + i * kWidth, kWidth, b, groups, target + i * kTileN);
          }
        }
      }
    }
  }
}

inline int32_t sum_lanes(__m256i v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_hadd_epi32(half, half);
  half = _mm_hadd_epi32(half, half);
  return _mm_cvtsi128_si32(half);
}

template <int MR>
void dot_rows(const int8_t* a, int64_t stride_am, const int8_t* w0, const int8_t* w1, int64_t K,
              int32_t* acc) {
  __m256i sum[MR][2];
  for (int i = 0; i < MR; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    const __m256i weight0 = widen(w0 + k), weight1 = widen(w1 + k);
    for (int i = 0; i < MR; ++i) {
      const __m256i activation = widen(a + i * stride_am + k);
      sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(weight0, activation));
      sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(weight1, activation));
    }
  }
  for (int i = 0; i < MR; ++i) {
    int32_t sum0 = sum_lanes(sum[i][0]), sum1 = sum_lanes(sum[i][1]);
    for (int64_t tail = k; tail < K; ++tail) {
      sum0 += a[i * stride_am + tail] * w0[tail];
      sum1 += a[i * stride_am + tail] * w1[tail];
    }
    acc[i * kTileN] = sum0;
    acc[i * kTileN + 1] = sum1;
  }
}

void dot_tile(const DotTile& t, int32_t* acc) {
  for (int n = 0; n < t.cols; n += 2) {
    const int8_t* w0 = t.w + n * t.stride_wn;
    const int8_t* w1 = n + 1 < t.cols ? w0 + t.stride_wn : w0;
    int r = 0;
    for (; r + 4 <= t.rows; r += 4) {
      dot_rows<4>(t.a + r * t.stride_am, t.stride_am, w0, w1, t.K, acc + r * kTileN + n);
    }
    for (; r < t.rows; ++r) {
      dot_rows<1>(t.a + r * t.stride_am, t.stride_am, w0, w1, t.K, acc + r * kTileN + n);
    }
  }
}

}  // namespace

const GemmKernels kAvx2GemmKernels = {nullptr, nullptr, packed_tile,        dot_tile,  nullptr, 0,
                                      0,       nullptr, pack_block_strided, write_tile};

}  // namespace fastq::cpu
