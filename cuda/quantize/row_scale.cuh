// The scale of a row, and its elements by that scale.
//
// The absmax is taken over the bits of |x|, as unsigned integers: their order is that of the
// numbers, with Inf above all and NaN above Inf, so neither is lost as fmaxf would lose a NaN.
//
// q = round_half_even(x / scale) takes the quotient correctly rounded to float32, as IEEE's
// division gives it. A reciprocal of two floats gives a quotient y within one unit in the last
// place, and y + (x - y scale) / scale is then the correctly rounded one (Markstein, 1990): five
// instructions with the first rounding of q, where a division takes ten and a branch. Scales near
// the ends of the exponents' range are brought to its middle first, and the elements with them.
#pragma once

#include <cfloat>
#include <cstdint>

namespace fastq::cuda {

__device__ inline uint32_t abs_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

struct RowScale {
  float scale;
  float lift;                            // a power of two, by which elements are multiplied first
  float divisor, inverse, inverse_rest;  // scale * lift, and 1 / (scale * lift) in two parts
  uint32_t kept;                         // no bits of q, where the scale is not finite
};

__device__ inline RowScale row_scale(uint32_t absmax_bits) {
  const float absmax = __uint_as_float(absmax_bits);
  RowScale row;
  row.scale = absmax_bits == 0 ? 1.0f : fmaxf(__fdiv_rn(absmax, 127.0f), FLT_MIN);
  row.kept = absmax_bits < 0x7f800000u ? 0xffffffffu : 0u;
  if (row.kept == 0) row.scale = absmax;
  row.lift = row.scale < 0x1p-60f ? 0x1p64f : row.scale > 0x1p60f ? 0x1p-64f : 1.0f;
  row.divisor = row.scale * row.lift;
  row.inverse = __frcp_rn(row.divisor);
  row.inverse_rest = row.inverse * __fmaf_rn(-row.divisor, row.inverse, 1.0f);
  return row;
}

// q in the lowest byte, of an element that has been lifted and is no larger than the row's absmax.
__device__ inline uint32_t quantized_bits(float x, const RowScale& row) {
  const float near = __fmaf_rn(x, row.inverse, __fmul_rn(x, row.inverse_rest));
  const float quotient = __fmaf_rn(__fmaf_rn(-near, row.divisor, x), row.inverse, near);
  return __float_as_uint(__fadd_rn(quotient, 0x1.8p23f));  // whose last bit is 1
}

// Elements to q, four in a word.
template <int kCount>
__device__ inline void quantize_elements(const float (&elements)[kCount], const RowScale& row,
                                         uint32_t (&q)[kCount / 4]) {
  static_assert(kCount % 4 == 0);
  float x[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = elements[i];
  if (row.lift != 1) {
#pragma unroll
    for (float& y : x) y *= row.lift;
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    uint32_t bits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) bits[j] = quantized_bits(x[i + j], row);
    const uint32_t low = __byte_perm(bits[0], bits[1], 0x0040);
    const uint32_t high = __byte_perm(bits[2], bits[3], 0x0040);
    q[i / 4] = __byte_perm(low, high, 0x5410) & row.kept;
  }
}

__device__ inline int8_t quantize_element(float x, const RowScale& row) {
  return static_cast<int8_t>(quantized_bits(x * row.lift, row) & row.kept);
}

}  // namespace fastq::cuda
