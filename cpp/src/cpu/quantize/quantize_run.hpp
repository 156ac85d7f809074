// Quantisation of a run of floats: its range, what scale and zero point that gives, and q.
//
// Compiled once per instruction set (see float_rows.hpp); the loops are written so that the
// compiler turns them into vector code without relaxed floating point:
//  - ranges run over the bits of x as integers that order like the values, with Inf and then NaN
//    beyond every finite one: a NaN is never dropped.
//  - adding 1.5 * 2^23 to a quotient rounds it half to even and leaves the integer in the low bits,
//    up to 2^22 in magnitude. Dynamic quotients are below 256, others are clamped first.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/float16.hpp"

namespace fastq::cpu {

static constexpr uint32_t kInfBits = 0x7f800000u;
static constexpr float kIntRounder = 12582912.0f;  // 1.5 * 2^23
static constexpr int32_t kIntRounderBits = 0x4b400000;

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

static inline float at_least_normal(float scale) {
  constexpr float kSmallestNormal = 0x1p-126f;
  return scale < kSmallestNormal ? kSmallestNormal : scale;  // a NaN stays
}

static inline float scale_of(uint32_t absmax_bits) {
  if (absmax_bits == 0) return 1.0f;
  return at_least_normal(float_from_bits(absmax_bits) / 127.0f);
}

// q = clamp(round_half_even(x / scale), -127, 127) where scale is that of absmax.
static inline void round_to_int8(const float* x, int64_t count, float scale, int8_t* q) {
  for (int64_t i = 0; i < count; ++i) {
    const float shifted = x[i] / scale + kIntRounder;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    int32_t value = bits - kIntRounderBits;
    value = value > 127 ? 127 : value;
    value = value < -127 ? -127 : value;
    q[i] = static_cast<int8_t>(value);
  }
}

// The smallest and the largest of some floats and 0, as ordered_bits.
struct BitRange {
  int32_t low = 0, high = 0;
};

// Integers that order like the floats do, -0 just below 0. Its own inverse.
static inline int32_t ordered_bits(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

static inline void extend_range(const float* x, int64_t count, BitRange& range) {
  int32_t low = range.low, high = range.high;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bits = ordered_bits(bits);
    low = bits < low ? bits : low;
    high = bits > high ? bits : high;
  }
  range.low = low;
  range.high = high;
}

// How a row is quantised.
struct RowScale {
  float scale;
  int32_t zero_point;
  bool is_finite;  // else q = 0
};

static inline RowScale symmetric_scale(uint32_t absmax_bits) {
  return {scale_of(absmax_bits), 0, absmax_bits < kInfBits};
}

static inline RowScale asymmetric_scale(const BitRange& range) {
  const float low = float_from_bits(static_cast<uint32_t>(ordered_bits(range.low)));
  const float high = float_from_bits(static_cast<uint32_t>(range.high));
  if (low == 0 && high == 0) return {1.0f, -128, true};
  const float scale = at_least_normal(high / 255.0f - low / 255.0f);
  // Which sign a NaN has depends on the compiler.
  const uint32_t bits = float_bits(scale) & 0x7fffffffu;
  if (bits >= kInfBits) return {float_from_bits(bits), 0, false};
  // Within -128 and 127.0001.
  const float shifted = (-128.0f - low / scale) + kIntRounder;
  const int32_t rounded = static_cast<int32_t>(float_bits(shifted)) - kIntRounderBits;
  return {scale, rounded > 127 ? 127 : rounded, true};
}

// q = clamp(round_half_even(x / scale) + zero_point, least, 127) for any x, -128 for NaN. Clamping
// at whole numbers before the rounding is the same as after it. zero_point is within -128..127.
static inline void round_to_int8_between(const float* x, int64_t count, float scale,
                                         int32_t zero_point, int32_t least, int8_t* q) {
  const float low = static_cast<float>(least - zero_point);
  const float high = static_cast<float>(127 - zero_point);
  const float nan = static_cast<float>(-128 - zero_point);
  for (int64_t i = 0; i < count; ++i) {
    float ratio = x[i] / scale;
    ratio = ratio > high ? high : ratio;
    ratio = ratio < low ? low : ratio;
    ratio = ratio >= low ? ratio : nan;
    const float shifted = ratio + kIntRounder;
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    q[i] = static_cast<int8_t>(bits - kIntRounderBits + zero_point);
  }
}

}  // namespace fastq::cpu
