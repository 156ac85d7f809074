// Rows [first, last) of a quantisation: a look at each row's y for its scale, unless that is given,
// and another that rounds. fastq.h has the formulas, row_values.hpp what y is.
//
// Compiled once per instruction set (see float_rows.hpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/problem.hpp"
#include "cpu/quantize/quantize_run.hpp"
#include "cpu/quantize/row_values.hpp"

namespace fastq::cpu {
namespace {

template <class Values>
inline RowScale find_scale(const QuantizeProblem& p, Values& y) {
  if (p.zero_point == nullptr) {
    uint32_t absmax = 0;
    for_each_run(p.cols, [&](int64_t c, int64_t count) {
      absmax = max_magnitude(y.first_look(c, count), count, absmax);
    });
    return symmetric_scale(absmax);
  }
  BitRange range;
  for_each_run(p.cols, [&](int64_t c, int64_t count) {
    extend_range(y.first_look(c, count), count, range);
  });
  return asymmetric_scale(range);
}

// Within -128..127 it must be; another must not overflow an int.
inline int32_t given_zero_point(const QuantizeProblem& p) {
  if (p.zero_point == nullptr) return 0;
  const int32_t given = *p.zero_point;
  return given < -128 ? -128 : given > 127 ? 127 : given;
}

template <class Values>
inline RowScale row_scale(const QuantizeProblem& p, int64_t row, Values& y) {
  if (p.is_static) return {*p.scale, given_zero_point(p), true};
  const RowScale result = find_scale(p, y);
  p.scale[row * p.stride_s] = result.scale;
  if (p.zero_point != nullptr) p.zero_point[row * p.stride_z] = result.zero_point;
  return result;
}

inline void round_run(const QuantizeProblem& p, const RowScale& by, const float* y, int64_t count,
                      int8_t* q) {
  if (p.is_static || p.zero_point != nullptr) {
    const int32_t least = p.zero_point != nullptr ? -128 : -127;
    round_to_int8_between(y, count, by.scale, by.zero_point, least, q);
  } else {
    round_to_int8(y, count, by.scale, q);
  }
}

template <class Values>
inline void quantize_row(const QuantizeProblem& p, int64_t row, Values& y) {
  alignas(64) int8_t rounded[kQuantizeRun];
  y.begin(row);
  const RowScale by = row_scale(p, row, y);
  for_each_run(p.cols, [&](int64_t c, int64_t count) {
    int8_t* q = p.q + row * p.stride_qr + c * p.stride_qc;
    int8_t* target = p.stride_qc == 1 ? q : rounded;
    if (by.is_finite) {
      const float* run = p.is_static ? y.first_look(c, count) : y.next_look(c, count);
      round_run(p, by, run, count, target);
    } else {
      std::memset(target, 0, static_cast<size_t>(count));
    }
    if (target == q) return;
    for (int64_t i = 0; i < count; ++i) q[i * p.stride_qc] = rounded[i];
  });
}

template <class Values>
[[gnu::noinline]] void quantize_rows_of(const QuantizeProblem& p, int64_t first, int64_t last) {
  Values y(p);
  for (int64_t row = first; row < last; ++row) quantize_row(p, row, y);
}

void quantize_rows(const QuantizeProblem& p, int64_t first, int64_t last) {
  const auto quantize = p.threshold > 0           ? quantize_rows_of<InlierValues>
                        : PlainValues::suffice(p) ? quantize_rows_of<PlainValues>
                                                  : quantize_rows_of<ComputedValues>;
  quantize(p, first, last);
}

}  // namespace
}  // namespace fastq::cpu
