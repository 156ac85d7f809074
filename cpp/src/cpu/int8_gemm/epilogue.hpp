// out = round(f32(acc) * scale_a, * scale_b, + bias), each operation rounded, for one tile.
//
// Compiled once per instruction set (see float_rows.hpp): the fixed-length loops over a tile row
// become vector code of that set, and -ffp-contract=off keeps every set at the same bits.
#pragma once

#include "cpu/float_rows.hpp"
#include "cpu/int8_gemm/kernels.hpp"

namespace fastq::cpu {

static inline void load_tile_vector(const VectorView& v, int64_t first, int count, float* dst) {
  load_floats(v.data, v.dtype, first * v.stride, v.stride, count, dst);
  for (int i = count; i < kTileN; ++i) dst[i] = 0.0f;
}

static inline void write_int32_tile(const Int8GemmProblem& p, int64_t m0, int rows, int64_t n0,
                                    int cols, const int32_t* acc) {
  for (int r = 0; r < rows; ++r, acc += kTileN) {
    int32_t* out = static_cast<int32_t*>(p.out) + (m0 + r) * p.stride_om + n0 * p.stride_on;
    for (int c = 0; c < cols; ++c) out[c * p.stride_on] = acc[c];
  }
}

// A tile row of constant length: the lanes past the problem's edge are computed for nothing.
static inline void scale_row(const int32_t* acc, float scale_a, const float* scale_b,
                             const float* bias, float* row) {
  for (int c = 0; c < kTileN; ++c) row[c] = static_cast<float>(acc[c]) * scale_a * scale_b[c];
  if (bias == nullptr) return;  // adding 0 would turn -0 into +0
  for (int c = 0; c < kTileN; ++c) row[c] += bias[c];
}

static inline void narrow_row(const float* row, uint16_t* dst, bool to_bfloat16) {
  if (!to_bfloat16) return narrow_float16(row, kTileN, dst);
  for (int c = 0; c < kTileN; ++c) dst[c] = float_to_bfloat16(row[c]);
}

// A template, so that each loop over rows holds the constants of one conversion in registers.
template <DType kOut>
static inline void write_rows(const Int8GemmProblem& p, int64_t m0, int rows, int64_t n0, int cols,
                              const int32_t* acc, const float* scale_b, const float* bias) {
  alignas(64) float row[kTileN];
  const bool whole = cols == kTileN && p.stride_on == 1;
  const VectorView scale_a = p.scale_a;
  for (int r = 0; r < rows; ++r, acc += kTileN) {
    const float scale = load_float(scale_a.data, scale_a.dtype, (m0 + r) * scale_a.stride);
    const int64_t first = (m0 + r) * p.stride_om + n0 * p.stride_on;
    if (!whole) {
      scale_row(acc, scale, scale_b, bias, row);
      store_floats(row, cols, p.out, kOut, first, p.stride_on);
    } else if constexpr (kOut == DType::kFloat32) {
      scale_row(acc, scale, scale_b, bias, static_cast<float*>(p.out) + first);
    } else {
      scale_row(acc, scale, scale_b, bias, row);
      narrow_row(row, static_cast<uint16_t*>(p.out) + first, kOut == DType::kBFloat16);
    }
  }
}

static void write_tile(const Int8GemmProblem& p, int64_t m0, int rows, int64_t n0, int cols,
                       const int32_t* acc) {
  if (p.out_dtype == DType::kInt32) return write_int32_tile(p, m0, rows, n0, cols, acc);
  alignas(64) float scale_b[kTileN], bias_row[kTileN];
  load_tile_vector(p.scale_b, n0, cols, scale_b);
  const float* bias = nullptr;
  if (p.bias.data != nullptr) {
    load_tile_vector(p.bias, n0, cols, bias_row);
    bias = bias_row;
  }
  if (p.out_dtype == DType::kBFloat16) {
    write_rows<DType::kBFloat16>(p, m0, rows, n0, cols, acc, scale_b, bias);
  } else if (p.out_dtype == DType::kFloat16) {
    write_rows<DType::kFloat16>(p, m0, rows, n0, cols, acc, scale_b, bias);
  } else {
    write_rows<DType::kFloat32>(p, m0, rows, n0, cols, acc, scale_b, bias);
  }
}

}  // namespace fastq::cpu
