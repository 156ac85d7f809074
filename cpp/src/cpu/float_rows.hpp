// Runs of float32, float16 or bfloat16 to and from float32, any stride.
//
// Included by files that are compiled once per instruction set, so everything here has internal
// linkage: the linker must not hand a function compiled for AVX-512 to a caller compiled without.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/float16.hpp"
#include "core/tensor.hpp"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastq::cpu {

static inline void widen_float16(const uint16_t* src, int64_t count, float* dst) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(half));
  }
#endif
  for (; i < count; ++i) dst[i] = float16_to_float(src[i]);
}

static inline void narrow_float16(const float* src, int64_t count, uint16_t* dst) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), half);
  }
#endif
  for (; i < count; ++i) dst[i] = float_to_float16(src[i]);
}

static inline float load_float(const void* src, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(src)[index]);
    case DType::kFloat16:
      return float16_to_float(static_cast<const uint16_t*>(src)[index]);
    default:
      return static_cast<const float*>(src)[index];
  }
}

static inline void store_float(float value, void* dst, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16:
      static_cast<uint16_t*>(dst)[index] = float_to_bfloat16(value);
      break;
    case DType::kFloat16:
      static_cast<uint16_t*>(dst)[index] = float_to_float16(value);
      break;
    default:
      static_cast<float*>(dst)[index] = value;
  }
}

// dst[i] = src[first + i * stride]
static inline void load_floats(const void* src, DType dtype, int64_t first, int64_t stride,
                               int64_t count, float* dst) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) dst[i] = load_float(src, dtype, first + i * stride);
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(src) + first;
    for (int64_t i = 0; i < count; ++i) dst[i] = bfloat16_to_float(from[i]);
  } else if (dtype == DType::kFloat16) {
    widen_float16(static_cast<const uint16_t*>(src) + first, count, dst);
  } else {
    std::memcpy(dst, static_cast<const float*>(src) + first, count * sizeof(float));
  }
}

// dst[first + i * stride] = src[i], rounded to nearest even
static inline void store_floats(const float* src, int64_t count, void* dst, DType dtype,
                                int64_t first, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; ++i) store_float(src[i], dst, dtype, first + i * stride);
  } else if (dtype == DType::kBFloat16) {
    uint16_t* to = static_cast<uint16_t*>(dst) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat16(src[i]);
  } else if (dtype == DType::kFloat16) {
    narrow_float16(src, count, static_cast<uint16_t*>(dst) + first);
  } else {
    std::memcpy(static_cast<float*>(dst) + first, src, count * sizeof(float));
  }
}

}  // namespace fastq::cpu
