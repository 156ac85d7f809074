// Rows [first, last) of scale = absmax / 127, q = clamp(round_half_even(x / scale), -127, 127), of
// x as it is or rotated (see rotate.hpp).
//
// Compiled once per instruction set (see float_rows.hpp).
#pragma once

#include "core/problem.hpp"
#include "cpu/float_rows.hpp"
#include "cpu/quantize/quantize_run.hpp"
#include "cpu/quantize/rotate.hpp"

namespace fastq::cpu {

static constexpr int64_t kQuantizeRun = 512;     // elements converted to float32 at a time
static constexpr int64_t kQuantizeHeld = 16384;  // a rotated row up to here is rotated once only
static_assert(kQuantizeRun % kRotateBlock == 0 && kQuantizeHeld % kQuantizeRun == 0);

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
