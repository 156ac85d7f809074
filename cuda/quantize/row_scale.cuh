// The scale of a row, and its elements by that scale.
//
// Extremes are taken over the bits of |x|, as unsigned integers: their order is that of the
// numbers, with Inf above all and NaN above Inf, so neither is lost as fmaxf would lose a NaN.
//
// q = round_half_even(x / scale) takes the quotient correctly rounded to float32, as IEEE's
// division gives it. A reciprocal of two floats gives a quotient y within one unit in the last
// place, and y + (x - y scale) / scale is then the correctly rounded one (Markstein, 1990): five
// instructions with the first rounding of q, where a division takes ten and a branch. Scales near
// the ends of the exponents' range are brought to its middle first, and the elements with them.
// Elements that have just been computed, with last bits of their own, are spared that: of them q is
// the product with the reciprocal, rounded.
#pragma once

#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "runtime/float_io.cuh"

namespace fastq::cuda {

constexpr float kRounder = 0x1.8p23f;  // whose last bit is 1: a sum with it is a whole number

__device__ inline uint32_t abs_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

struct RowScale {
  float scale;
  float lift;                            // a power of two, by which elements are multiplied first
  float divisor, inverse, inverse_rest;  // scale * lift, and 1 / (scale * lift) in two parts
  uint32_t kept;                         // no bits of q, where the scale is not finite
  int zero_point;
  float low, high;  // of lifted elements in a static row: what is beyond is clamped
};

__device__ inline float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Rounded to nearest, of normal numbers up to 2^125.
__device__ inline float reciprocal(float x) {
  const float near = approximate_reciprocal(x);
  return __fmaf_rn(near, __fmaf_rn(-x, near, 1.0f), near);
}

// absmax / 127, correctly rounded.
__device__ inline float over_127(float absmax) {
  constexpr float kInverse = 1 / 127.0f;
  if (absmax < 0x1p-80f) return __fdiv_rn(absmax, 127.0f);
  const float near = __fmul_rn(absmax, kInverse);
  return __fmaf_rn(__fmaf_rn(-near, 127.0f, absmax), kInverse, near);
}

__device__ inline RowScale row_with_scale(float scale) {
  RowScale row{};
  row.scale = scale;
  row.kept = abs_bits(scale) < 0x7f800000u ? 0xffffffffu : 0u;
  row.lift = scale < 0x1p-60f ? 0x1p64f : scale > 0x1p60f ? 0x1p-64f : 1.0f;
  row.divisor = scale * row.lift;
  row.inverse = reciprocal(row.divisor);
  row.inverse_rest = row.inverse * __fmaf_rn(-row.divisor, row.inverse, 1.0f);
  return row;
}

// The same of any scale, for quotients up to 255.5 in magnitude. What can go wrong lies next to a
// number half-way between two whole ones: there is at most one of T for each, and the threads of a
// block try them all, together. Factor and quotient are off by 2^-24 of themselves at the most;
// where that matters, as half the largest element does in a row without negative ones, a factor
// 2^-21 larger or smaller may do. Powers of two have exact factors.
template <class T>
__device__ inline float factor_of_any(float scale) {
  const float factor = reciprocal(scale);
  if ((__float_as_uint(scale) & 0x7fffffu) == 0) return factor;
  const float tried[3] = {factor, __fmaf_rn(factor, 0x1p-21f, factor),
                          __fmaf_rn(factor, -0x1p-21f, factor)};
  uint32_t wrong = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    const float half_way = static_cast<float>(i) + 0.5f;
    const float x = to_float(from_float<T>(half_way * scale));
    if (!(fabsf(__fmaf_rn(x, factor, -half_way)) <= half_way * 0x1p-20f)) continue;
    const float right = __fadd_rn(__fdiv_rn(x, scale), kRounder);
#pragma unroll
    for (int k = 0; k < 3; ++k) wrong |= (__fmaf_rn(x, tried[k], kRounder) != right) << k;
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    if (__syncthreads_or(wrong >> k & 1) == 0) return tried[k];
  }
  return 0;
}

// Symmetric. fmaxf would turn a NaN into FLT_MIN.
__device__ inline float symmetric_scale(uint32_t absmax_bits) {
  const float absmax = __uint_as_float(absmax_bits);
  const bool is_finite = absmax_bits < 0x7f800000u;
  return absmax_bits == 0 ? 1.0f : is_finite ? fmaxf(over_127(absmax), FLT_MIN) : absmax;
}
__device__ inline RowScale row_scale(uint32_t absmax_bits) {
  return row_with_scale(symmetric_scale(absmax_bits));
}

// A factor with which q = round_half_even(x * factor), in one rounding, is the q that the division
// gives, for each x of a row of 16-bit floats and the row's largest magnitude absmax; or 0 where
// there is none.
//
// x and absmax have p significant bits, 8 or 11. x / absmax * 127 is half-way between whole numbers
// where 254 x = (2n + 1) absmax, and else at least 2^-(8 + p) of itself away from that, which a
// factor within 2^-20 of 1 / scale does not bridge. 127 is prime. So either 2n + 1 is 127: x is
// absmax / 2, the one element of its row to which the roundings of scale and quotient matter; the
// factor is made 2^-21 larger or smaller to bring it where they do. Or absmax is 127 times a number
// that is then the scale, exactly; if a power of two (always, with 8 bits), the factor is exact as
// well. (Tried out on every pair of x and absmax of both dtypes.)
template <class T>
__device__ inline float factor_of_halves(float absmax, float scale) {
  static_assert(sizeof(T) == 2);
  const float inverse = reciprocal(scale);
  if ((__float_as_uint(scale) & 0x7fffffu) == 0) return inverse;
  const float rest = __fmaf_rn(-127.0f, scale, absmax);
  if (std::is_same_v<T, __half> && rest == 0) return 0;
  // Whether absmax / 2 / scale, rounded, is below 63.5: by more than half a unit in the last place.
  const bool is_less = rest * 0x1p18f < -scale;
  return __fmaf_rn(inverse, is_less ? -0x1p-21f : 0x1p-21f, inverse);
}

__device__ inline RowScale static_scale(float scale, const int* zero_point) {
  RowScale row = row_with_scale(scale);
  if (zero_point != nullptr) row.zero_point = *zero_point;
  const int low = zero_point != nullptr ? -128 : -127;
  row.low = row.divisor * static_cast<float>(low - row.zero_point);
  row.high = row.divisor * static_cast<float>(127 - row.zero_point);
  return row;
}

// Asymmetric, of the magnitudes of the largest and of the smallest element, each 0 where all are on
// the other side.
__device__ inline RowScale row_scale(uint32_t high_bits, uint32_t low_bits) {
  const uint32_t most = max(high_bits, low_bits);
  if (most == 0 || most >= 0x7f800000u) {
    RowScale row = row_with_scale(most == 0 ? 1.0f : __uint_as_float(most));
    row.zero_point = most == 0 ? -128 : 0;
    return row;
  }
  const float high = __uint_as_float(high_bits), low = -__uint_as_float(low_bits);
  const float range = __fsub_rn(__fdiv_rn(high, 255.0f), __fdiv_rn(low, 255.0f));
  RowScale row = row_with_scale(fmaxf(range, FLT_MIN));
  const int first = __float2int_rn(__fsub_rn(-128.0f, __fdiv_rn(low, row.scale)));
  row.zero_point = min(max(first, -128), 127);
  return row;
}

__device__ inline float quotient(float lifted, const RowScale& row) {
  const float near = __fmaf_rn(lifted, row.inverse, __fmul_rn(lifted, row.inverse_rest));
  return __fmaf_rn(__fmaf_rn(-near, row.divisor, lifted), row.inverse, near);
}

// How a row is rounded: by a symmetric scale of its own, by an asymmetric one of its own, or by a
// static one of either kind, out of whose range elements may be.
enum class RowRounding { kSymmetric, kAsymmetric, kStatic };

// What q is in the last bits of, of an element that has been lifted; a zero point comes after.
template <RowRounding kRounding, bool kExact>
__device__ inline uint32_t quantized_bits(float x, const RowScale& row) {
  if (kRounding == RowRounding::kStatic) x = fminf(fmaxf(x, row.low), row.high);
  return __float_as_uint(kExact ? __fadd_rn(quotient(x, row), kRounder)
                                : __fmaf_rn(x, row.inverse, kRounder));
}
// The largest element of a row may be 128: zero_point and its quotient may both be rounded up.
template <RowRounding kRounding>
__device__ inline int shifted(float x, uint32_t bits, const RowScale& row) {
  if (kRounding == RowRounding::kStatic && x != x) return -128;
  return static_cast<int>(bits - __float_as_uint(kRounder)) + row.zero_point;
}

// The lowest bytes of four.
__device__ inline uint32_t lowest_bytes(const uint32_t (&bits)[4]) {
  const uint32_t low = __byte_perm(bits[0], bits[1], 0x0040);
  return __byte_perm(low, __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

// Four numbers clamped to -128..127.
__device__ inline uint32_t saturated_bytes(const int (&x)[4]) {
  uint32_t high, all;
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(high) : "r"(x[3]), "r"(x[2]));
  asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;" : "=r"(all) : "r"(x[1]), "r"(x[0]), "r"(high));
  return all;
}

// A vector of q as it is stored at once.
template <int kCount>
struct alignas(kCount) PackedBytes {
  uint32_t words[kCount / 4];
};

// Each element's product with a factor, rounded.
template <int kCount>
__device__ inline PackedBytes<kCount> rounded_products(const float (&x)[kCount], float factor) {
  PackedBytes<kCount> q;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    uint32_t bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) bits[j] = __float_as_uint(__fmaf_rn(x[i + j], factor, kRounder));
    q.words[i / 4] = lowest_bytes(bits);
  }
  return q;
}

// The same plus a zero point, clamped to -128..127. Products are below 2^22 in magnitude.
template <int kCount>
__device__ inline PackedBytes<kCount> shifted_products(const float (&x)[kCount], float factor,
                                                       int zero_point) {
  PackedBytes<kCount> q;
  const int shift = zero_point - __float_as_int(kRounder);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    int its[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      its[j] = __float_as_int(__fmaf_rn(x[i + j], factor, kRounder)) + shift;
    }
    q.words[i / 4] = saturated_bytes(its);
  }
  return q;
}

// Elements to q; quantized_bytes of a row with a finite scale, and lifted.
template <RowRounding kRounding, bool kExact, int kCount>
__device__ inline PackedBytes<kCount> quantized_bytes(const float (&x)[kCount],
                                                      const RowScale& row) {
  static_assert(kCount % 4 == 0);
  PackedBytes<kCount> q;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    uint32_t bits[4];
    int its[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bits[j] = quantized_bits<kRounding, kExact>(x[i + j], row);
      its[j] = shifted<kRounding>(x[i + j], bits[j], row);
    }
    q.words[i / 4] =
        kRounding == RowRounding::kSymmetric ? lowest_bytes(bits) : saturated_bytes(its);
  }
  return q;
}
template <RowRounding kRounding, bool kExact, int kCount>
__device__ inline void quantize_elements(const float (&elements)[kCount], const RowScale& row,
                                         uint32_t (&q)[kCount / 4]) {
  float x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = elements[i];
  if (row.lift != 1) {
#pragma unroll
    for (float& y : x) y *= row.lift;
  }
  const PackedBytes<kCount> bytes = quantized_bytes<kRounding, kExact>(x, row);
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) q[i] = bytes.words[i] & row.kept;
}

template <RowRounding kRounding, bool kExact>
__device__ inline int8_t quantize_element(float x, const RowScale& row) {
  x *= row.lift;
  const uint32_t bits = quantized_bits<kRounding, kExact>(x, row);
  const int q = kRounding == RowRounding::kSymmetric ? static_cast<int>(bits)
                                                     : min(shifted<kRounding>(x, bits, row), 127);
  return static_cast<int8_t>(q & row.kept);
}

}  // namespace fastq::cuda
