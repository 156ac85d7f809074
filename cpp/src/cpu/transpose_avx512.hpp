// A 16 x 16 transposition in registers. For files that are compiled for AVX-512, so it has internal
// linkage.
#pragma once

#include <immintrin.h>

namespace fastq::cpu {

// rows[i] dword j <-> rows[j] dword i
static inline void transpose_16x16(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // rows[i + j]: column j of each 4 x 4 block of rows i..i+3
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {  // then the 4 x 4 blocks themselves
    const __m512i even01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

}  // namespace fastq::cpu
