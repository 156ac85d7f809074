// Rows [first, last) of scale = absmax / 127, q = clamp(round_half_even(x / scale), -127, 127), of
// x as it is or rotated (see rotate.hpp).
//
// Compiled once per instruction set (see float_rows.hpp); the loops are written so that the
// compiler turns them into vector code without relaxed floating point:
//  - absmax runs over the bits of |x| as integers, which order like the values, with Inf and then
//    NaN above every finite one: a NaN is never dropped.
//  - x / scale is at most 127.00002 in magnitude, so adding 1.5 * 2^23 rounds it half to even and
//    leaves the integer in the low bits.
#pragma once

#include "core/problem.hpp"
#include "cpu/float_rows.hpp"
#include "cpu/quantize/rotate.hpp"

namespace fastq::cpu {

static constexpr int64_t kQuantizeRun = 512;     // elements converted to float32 at a time
static constexpr int64_t kQuantizeHeld = 16384;  // a rotated row up to here is rotated once only
static_assert(kQuantizeRun % kRotateBlock == 0 && kQuantizeHeld % kQuantizeRun == 0);

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

template <bool kRotated>
static inline void quantize_row(const QuantizeProblem& p, int64_t row) {
  // One run, or a rotated row as a whole.
  alignas(64) float held[kRotated ? kQuantizeHeld : kQuantizeRun];
  alignas(64) int8_t rounded[kQuantizeRun];
  const bool direct = !kRotated && p.x_dtype == DType::kFloat32 && p.stride_xc == 1;
  const bool holds_row = kRotated && p.cols <= kQuantizeHeld;
  const auto floats = [&](int64_t column, int64_t count) -> const float* {
    const int64_t offset = row * p.stride_xr + column * p.stride_xc;
    if (direct) return static_cast<const float*>(p.x) + offset;
    float* run = holds_row ? held + column : held;
    load_floats(p.x, p.x_dtype, offset, p.stride_xc, count, run);
    if constexpr (kRotated) rotate(run, count, p.rotation);
    return run;
  };

  uint32_t absmax = 0;
  for (int64_t c = 0; c < p.cols; c += kQuantizeRun) {
    const int64_t count = p.cols - c < kQuantizeRun ? p.cols - c : kQuantizeRun;
    absmax = max_magnitude(floats(c, count), count, absmax);
  }
  const float scale = scale_of(absmax);
  p.scale[row * p.stride_s] = scale;

  const bool finite = absmax < 0x7f800000u;
  for (int64_t c = 0; c < p.cols; c += kQuantizeRun) {
    const int64_t count = p.cols - c < kQuantizeRun ? p.cols - c : kQuantizeRun;
    int8_t* q = p.q + row * p.stride_qr + c * p.stride_qc;
    int8_t* target = p.stride_qc == 1 ? q : rounded;
    if (finite) {
      round_to_int8(holds_row ? held + c : floats(c, count), count, scale, target);
    } else {
      std::memset(target, 0, static_cast<size_t>(count));
    }
    if (target == q) continue;
    for (int64_t i = 0; i < count; ++i) q[i * p.stride_qc] = rounded[i];
  }
}

static void quantize_rows(const QuantizeProblem& p, int64_t first, int64_t last) {
  const auto quantize = p.rotation != 0 ? quantize_row<true> : quantize_row<false>;
  for (int64_t row = first; row < last; ++row) quantize(p, row);
}

}  // namespace fastq::cpu
