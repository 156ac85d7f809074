// Packing with AVX-512: 16 x 16 transposes of 4-byte groups. Internal linkage: see float_rows.hpp.
#pragma once

#include <immintrin.h>

#include "cpu/int8_gemm/kernels.hpp"
#include "cpu/transpose_avx512.hpp"

namespace fastq::cpu {

static inline void pack_rows_avx512(const int8_t* b, int64_t stride_bn, int k_count, int n_count,
                                    int8_t* block) {
  const __mmask64 mask = ~0ull >> (kBlockK - k_count);
  __m512i rows[16];
  for (int n = 0; n < 16; ++n) {
    rows[n] =
        n < n_count ? _mm512_maskz_loadu_epi8(mask, b + n * stride_bn) : _mm512_setzero_si512();
  }
  transpose_16x16(rows);
  for (int g = 0; g < 16; ++g) _mm512_storeu_si512(block + g * 64, rows[g]);
}

static inline void interleave_columns_avx512(const int8_t* b, int64_t stride_bk, int k_count,
                                             int n_count, int8_t* block) {
  const __mmask16 mask = static_cast<__mmask16>(0xffffu >> (kBlockN - n_count));
  for (int k = 0; k < kBlockK; k += 4) {
    __m128i row[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = k + i < k_count ? _mm_maskz_loadu_epi8(mask, b + (k + i) * stride_bk)
                               : _mm_setzero_si128();
    }
    const __m128i low01 = _mm_unpacklo_epi8(row[0], row[1]);
    const __m128i high01 = _mm_unpackhi_epi8(row[0], row[1]);
    const __m128i low23 = _mm_unpacklo_epi8(row[2], row[3]);
    const __m128i high23 = _mm_unpackhi_epi8(row[2], row[3]);
    __m128i* group = reinterpret_cast<__m128i*>(block + k * kBlockN);
    _mm_storeu_si128(group, _mm_unpacklo_epi16(low01, low23));
    _mm_storeu_si128(group + 1, _mm_unpackhi_epi16(low01, low23));
    _mm_storeu_si128(group + 2, _mm_unpacklo_epi16(high01, high23));
    _mm_storeu_si128(group + 3, _mm_unpackhi_epi16(high01, high23));
  }
}

static void pack_block_avx512(const int8_t* b, int64_t stride_bk, int64_t stride_bn, int k, int n,
                              int8_t* block) {
  if (stride_bk == 1) return pack_rows_avx512(b, stride_bn, k, n, block);
  if (stride_bn == 1) return interleave_columns_avx512(b, stride_bk, k, n, block);
  pack_block_strided(b, stride_bk, stride_bn, k, n, block);
}

}  // namespace fastq::cpu
