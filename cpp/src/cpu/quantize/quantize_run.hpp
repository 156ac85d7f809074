// Quantisation of a run of floats: absmax, scale = absmax / 127, q = clamp(round_half_even(x /
// scale), -127, 127).
//
// Compiled once per instruction set (see float_rows.hpp); the loops are written so that the
// compiler turns them into vector code without relaxed floating point:
//  - absmax runs over the bits of |x| as integers, which order like the values, with Inf and then
//    NaN above every finite one: a NaN is never dropped.
//  - x / scale is at most 127.00002 in magnitude, so adding 1.5 * 2^23 rounds it half to even and
//    leaves the integer in the low bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/float16.hpp"

namespace fastq::cpu {

static inline uint32_t max_magnitude(const float* x, int64_t count, uint32_t start) {
  int32_t result = static_cast<int32_t>(start);
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits &= 0x7fffffff;
    result = bits > result ? bits : result;
  }
  return static_cast<uint32_t>(result);
}

static inline void round_to_int8(const float* x, int64_t count, float scale, int8_t* q) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] / scale + kRounder;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    int32_t value = bits - 0x4b400000;
    value = value > 127 ? 127 : value;
    value = value < -127 ? -127 : value;
    q[i] = static_cast<int8_t>(value);
  }
}

static inline float scale_of(uint32_t absmax_bits) {
  constexpr float kSmallestNormal = 0x1p-126f;
  if (absmax_bits == 0) return 1.0f;
  const float scale = float_from_bits(absmax_bits) / 127.0f;
  return scale < kSmallestNormal ? kSmallestNormal : scale;  // a NaN stays
}

}  // namespace fastq::cpu
