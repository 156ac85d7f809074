// From one tile of int32 sums to output:
//
//   y = f32(acc - zero_point * column_sum) * scale_a * scale_b, + outliers (see outliers.hpp),
//       + bias, activation, + residual
//
// each operation rounded, then round_to(out dtype, y), or y / out_scale rounded to int8.
//
// Compiled once per instruction set (see float_rows.hpp): the fixed-length loops over a tile row
// become vector code of that set, and -ffp-contract=off keeps every set at the same bits.
#pragma once

#include "cpu/activation.hpp"
#include "cpu/float_rows.hpp"
#include "cpu/int8_gemm/kernels.hpp"
#include "cpu/int8_gemm/outliers.hpp"

namespace fastq::cpu {

static inline void load_tile_vector(const VectorView& v, int64_t first, int count, float* dst) {
  load_tile_row(v.data, v.dtype, first * v.stride, v.stride, count, dst);
}

static inline void write_int32_row(const Int8GemmProblem& p, int64_t m, int64_t n0, int cols,
                                   const int32_t* acc) {
  int32_t* out = static_cast<int32_t*>(p.out) + m * p.stride_om + n0 * p.stride_on;
  for (int c = 0; c < cols; ++c) out[c * p.stride_on] = acc[c];
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

// The column sums of a tile and the zero points of its rows; wraps around, as the sums do.
struct ZeroPoints {
  const Int8GemmProblem& p;
  int32_t sums[kTileN] = {};

  ZeroPoints(const Int8GemmProblem& problem, int64_t n0, int cols) : p(problem) {
    const auto* from = static_cast<const int32_t*>(p.column_sums.data);
    for (int c = 0; c < cols; ++c) sums[c] = from[(n0 + c) * p.column_sums.stride];
  }

  void subtract(int64_t m, const int32_t* acc, int32_t* result) const {
    const auto* points = static_cast<const int32_t*>(p.zero_point.data);
    const auto point = static_cast<uint32_t>(points[m * p.zero_point.stride]);
    for (int c = 0; c < kTileN; ++c) {
      const uint32_t excess = point * static_cast<uint32_t>(sums[c]);
      result[c] = static_cast<int32_t>(static_cast<uint32_t>(acc[c]) - excess);
    }
  }
};

static inline void add_residual(const Int8GemmProblem& p, int64_t m, int64_t n0, int cols,
                                float* row) {
  alignas(64) float residual[kTileN];
  const MatrixView& from = p.residual;
  load_tile_row(from.data, from.dtype, m * from.stride_m + n0 * from.stride_n, from.stride_n, cols,
                residual);
  for (int c = 0; c < kTileN; ++c) row[c] += residual[c];
}

// clamp(round_half_even(row / scale), -127, 127), and -128 for NaN. A ratio within +-127 plus
// 1.5 * 2^23 has the rounded ratio in its low bits.
static inline void quantize_tile_row(const float* row, float scale, int8_t* q) {
  for (int c = 0; c < kTileN; ++c) {
    float ratio = row[c] / scale;
    ratio = ratio > 127.0f ? 127.0f : ratio;
    ratio = ratio < -127.0f ? -127.0f : ratio;
    const int32_t rounded = static_cast<int32_t>(float_bits(ratio + 12582912.0f)) - 0x4b400000;
    q[c] = static_cast<int8_t>(ratio == ratio ? rounded : -128);
  }
}

static inline void store_tile_row(const Int8GemmProblem& p, int64_t m, int64_t n0, int cols,
                                  const float* row) {
  const int64_t first = m * p.stride_om + n0 * p.stride_on;
  if (p.out_dtype != DType::kInt8) {
    return store_floats(row, cols, p.out, p.out_dtype, first, p.stride_on);
  }
  alignas(64) int8_t q[kTileN];
  quantize_tile_row(row, *p.out_scale, q);
  int8_t* out = static_cast<int8_t*>(p.out) + first;
  for (int c = 0; c < cols; ++c) out[c * p.stride_on] = q[c];
}

// What follows the bias.
static inline void finish_row(const Int8GemmProblem& p, int64_t m, int64_t n0, int cols,
                              float* row) {
  activate<kTileN>(p.activation, row);
  if (p.residual.data != nullptr) add_residual(p, m, n0, cols, row);
  store_tile_row(p, m, n0, cols, row);
}

// With any option besides scales and bias. Apart from the plain path, which it must not slow down.
[[gnu::noinline]] static void write_tile_with_options(const Int8GemmProblem& p, int64_t m0,
                                                      int rows, int64_t n0, int cols,
                                                      const int32_t* acc) {
  alignas(64) float scale_b[kTileN], bias[kTileN], row[kTileN];
  alignas(64) int32_t shifted[kTileN];
  const bool raw = p.out_dtype == DType::kInt32;
  if (!raw) load_tile_vector(p.scale_b, n0, cols, scale_b);
  if (p.bias.data != nullptr) load_tile_vector(p.bias, n0, cols, bias);
  const bool has_zero_point = p.zero_point.data != nullptr;
  const ZeroPoints zero_points(p, n0, has_zero_point ? cols : 0);
  for (int64_t m = m0; m < m0 + rows; ++m, acc += kTileN) {
    if (has_zero_point) zero_points.subtract(m, acc, shifted);
    const int32_t* sums = has_zero_point ? shifted : acc;
    if (raw) {
      write_int32_row(p, m, n0, cols, sums);
      continue;
    }
    const float scale_a = load_float(p.scale_a.data, p.scale_a.dtype, m * p.scale_a.stride);
    scale_row(sums, scale_a, scale_b, p.bias.data != nullptr ? bias : nullptr, row);
    finish_row(p, m, n0, cols, row);
  }
}

// The same with outliers, whose weights all rows of the tile share. They come with no zero point,
// and with a float out.
[[gnu::noinline]] static void write_tile_with_outliers(const Int8GemmProblem& p, int64_t m0,
                                                       int rows, int64_t n0, int cols,
                                                       const int32_t* acc) {
  alignas(64) float scale_b[kTileN], bias[kTileN], tile[kTileM * kTileN];
  load_tile_vector(p.scale_b, n0, cols, scale_b);
  for (int r = 0; r < rows; ++r) {
    const float scale_a = load_float(p.scale_a.data, p.scale_a.dtype, (m0 + r) * p.scale_a.stride);
    scale_row(acc + r * kTileN, scale_a, scale_b, nullptr, tile + r * kTileN);
  }
  add_outliers(p, m0, rows, n0, cols, scale_b, tile);
  if (p.bias.data != nullptr) load_tile_vector(p.bias, n0, cols, bias);
  for (int r = 0; r < rows; ++r) {
    float* const row = tile + r * kTileN;
    if (p.bias.data != nullptr) {
      for (int c = 0; c < kTileN; ++c) row[c] += bias[c];
    }
    finish_row(p, m0 + r, n0, cols, row);
  }
}

static inline bool has_options(const Int8GemmProblem& p) {
  return p.zero_point.data != nullptr || p.activation != Activation::kNone ||
         p.residual.data != nullptr || p.out_dtype == DType::kInt8;
}

static void write_tile(const Int8GemmProblem& p, int64_t m0, int rows, int64_t n0, int cols,
                       const int32_t* acc) {
  if (has_outliers(p)) return write_tile_with_outliers(p, m0, rows, n0, cols, acc);
  if (has_options(p)) return write_tile_with_options(p, m0, rows, n0, cols, acc);
  if (p.out_dtype == DType::kInt32) {
    for (int r = 0; r < rows; ++r) write_int32_row(p, m0 + r, n0, cols, acc + r * kTileN);
    return;
  }
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
