// The scale of a row, and its elements by that scale.
//
// The absmax is taken over the bits of |x|, as unsigned integers: their order is that of the
// numbers, with Inf above all and NaN above Inf, so neither is lost as fmaxf would lose a NaN.
#pragma once

#include <cfloat>
#include <cstdint>

namespace fastq::cuda {

__device__ inline uint32_t abs_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

struct RowScale {
  float scale;
  bool finite;
};

__device__ inline RowScale row_scale(uint32_t absmax_bits) {
  const float absmax = __uint_as_float(absmax_bits);
  if (absmax_bits >= 0x7f800000u) return {absmax, false};
  if (absmax_bits == 0) return {1.0f, true};
  return {fmaxf(__fdiv_rn(absmax, 127.0f), FLT_MIN), true};
}

__device__ inline int8_t quantize_element(float x, RowScale row) {
  if (!row.finite) return 0;
  return static_cast<int8_t>(max(-127, min(127, __float2int_rn(__fdiv_rn(x, row.scale)))));
}

}  // namespace fastq::cuda
