// Rows [first, last) of out = round(f32(q) * scale).
//
// Compiled once per instruction set (see float_rows.hpp).
#pragma once

#include "core/problem.hpp"
#include "cpu/float_rows.hpp"

namespace fastq::cpu {

static constexpr int64_t kDequantizeRun = 512;  // elements held as float32 at a time

static inline void dequantize_row(const DequantizeProblem& p, int64_t row) {
  alignas(64) float run[kDequantizeRun];
  const float scale = p.scale[row * p.stride_s];
  const bool direct = p.out_dtype == DType::kFloat32 && p.stride_oc == 1;
  for (int64_t c = 0; c < p.cols; c += kDequantizeRun) {
    const int64_t count = p.cols - c < kDequantizeRun ? p.cols - c : kDequantizeRun;
    const int8_t* q = p.q + row * p.stride_qr + c * p.stride_qc;
    const int64_t offset = row * p.stride_or + c * p.stride_oc;
    float* target = direct ? static_cast<float*>(p.out) + offset : run;
    if (p.stride_qc == 1) {
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(q[i]) * scale;
    } else {
      for (int64_t i = 0; i < count; ++i)
        target[i] = static_cast<float>(q[i * p.stride_qc]) * scale;
    }
    if (!direct) store_floats(run, count, p.out, p.out_dtype, offset, p.stride_oc);
  }
}

static void dequantize_rows(const DequantizeProblem& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) dequantize_row(p, row);
}

}  // namespace fastq::cpu
