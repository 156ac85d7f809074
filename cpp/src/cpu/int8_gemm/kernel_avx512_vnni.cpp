// int8_gemm with AVX512-VNNI.
//
// VPDPBUSD multiplies unsigned by signed bytes and adds four products to an int32 lane, without
// saturation. The weight is made unsigned by flipping its top bit (b + 128), so every sum comes out
// 128 * sum_k a[m, k] too large; the accumulators start at minus that. All of it is exact modulo
// 2^32, and the true sum fits an int32.
#include <immintrin.h>

#include <cstring>

#include "cpu/int8_gemm/epilogue.hpp"
#include "cpu/int8_gemm/kernels.hpp"
#include "cpu/int8_gemm/pack_avx512.hpp"

namespace fastq::cpu {
namespace {

constexpr int64_t kBlocksInL1 = 8;  // K blocks of 32 columns: 16 KB

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

// acc[0:MR][0:16 * NR] += a times `blocks` K blocks
template <int MR, int NR>
void multiply_blocks(const int8_t* a, int64_t stride_am, const int8_t* b, int64_t block_stride,
                     int64_t blocks, int32_t* acc) {
  __m512i sum[MR][NR];
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) sum[i][j] = _mm512_loadu_si512(acc + i * kTileN + j * kBlockN);
  }
  for (int64_t group = 0; group < blocks * 16; ++group, a += 4, b += 64) {
    __m512i weight[NR];
    for (int j = 0; j < NR; ++j) weight[j] = flip(_mm512_loadu_si512(b + j * block_stride));
    for (int i = 0; i < MR; ++i) {
      const __m512i activation = broadcast_group(a + i * stride_am);
      for (int j = 0; j < NR; ++j) {
        sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], weight[j], activation);
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int j = 0; j < NR; ++j) _mm512_storeu_si512(acc + i * kTileN + j * kBlockN, sum[i][j]);
  }
}

template <int NR>
void multiply_rows(const int8_t* a, int64_t stride_am, int rows, const int8_t* b,
                   int64_t block_stride, int64_t blocks, int32_t* acc) {
  int r = 0;
  const auto step = [&](auto kernel, int count) {
    for (; r + count <= rows; r += count) {
      kernel(a + r * stride_am, stride_am, b, block_stride, blocks, acc + r * kTileN);
    }
  };
  step(multiply_blocks<12, NR>, 12);
  step(multiply_blocks<6, NR>, 6);
  step(multiply_blocks<3, NR>, 3);
  step(multiply_blocks<1, NR>, 1);
}

void packed_tile(const PackedTile& t, int32_t* acc) {
  fetch_lines(t.out);
  for (int r = 0; r < t.rows; ++r) {
    const __m512i start = _mm512_set1_epi32(-row_excess(t.a + r * t.stride_am, t.K));
    _mm512_storeu_si512(acc + r * kTileN, start);
    _mm512_storeu_si512(acc + r * kTileN + kBlockN, start);
  }
  const auto multiply = t.cols > kBlockN ? multiply_rows<2> : multiply_rows<1>;
  const int64_t full_blocks = t.K / kBlockK;
  for (int64_t block = 0; block < full_blocks; block += kBlocksInL1) {
    const int64_t left = full_blocks - block;
    multiply(t.a + block * kBlockK, t.stride_am, t.rows, t.b + block * kBlockBytes, t.block_stride,
             left < kBlocksInL1 ? left : kBlocksInL1, acc);
  }
  if (const int64_t tail = t.K % kBlockK) {
    alignas(64) int8_t a_tail[kTileM * kBlockK];
    const __mmask64 mask = ~0ull >> (kBlockK - tail);
    for (int r = 0; r < t.rows; ++r) {
      const int8_t* a = t.a + r * t.stride_am + full_blocks * kBlockK;
      _mm512_store_si512(a_tail + r * kBlockK, _mm512_maskz_loadu_epi8(mask, a));
    }
    multiply(a_tail, kBlockK, t.rows, t.b + full_blocks * kBlockBytes, t.block_stride, 1, acc);
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
    nullptr, nullptr, packed_tile,       dot_tile_avx512_vnni,
    nullptr, nullptr, pack_block_avx512, write_tile};

}  // namespace fastq::cpu
