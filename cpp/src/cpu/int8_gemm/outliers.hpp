// The outliers' part of one tile of output, added to the scaled sums:
//
//   y[m,n] = fma(x[m,k], v[k,n], y[m,n])   for the outliers k of row m, in ascending order
//   v[k,n] = f32(kept[i,n]) where k = kept_columns[i], else f32(b[k,n]) * scale_b[n]
//
// Only the columns that hold an outlier in some row are looked at, a chunk at a time: its v is made
// once and serves all rows of the tile.
//
// Compiled once per instruction set (see float_rows.hpp). The fused multiply-add is an instruction
// where the set has one, else the C library's function: never two roundings.
#pragma once

#include "cpu/float_rows.hpp"
#include "cpu/int8_gemm/kernels.hpp"

namespace fastq::cpu {

static constexpr int kOutlierChunk = 64;

static inline bool has_outliers(const Int8GemmProblem& p) {
  return p.outliers != nullptr && *p.outliers->num_columns > 0;
}

static inline void load_tile_row(const void* data, DType dtype, int64_t first, int64_t stride,
                                 int count, float* dst) {
  load_floats(data, dtype, first, stride, count, dst);
  for (int i = count; i < kTileN; ++i) dst[i] = 0.0f;
}

// The row of `kept` that belongs to column k of x, or -1.
static inline int64_t find_kept(const OutlierSplit& split, int32_t k) {
  int64_t first = 0, last = split.num_kept;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (split.kept_columns[middle * split.stride_columns] < k) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  const bool is_kept =
      first < split.num_kept && split.kept_columns[first * split.stride_columns] == k;
  return is_kept ? first : -1;
}

// v of a chunk of columns, [count][kTileN].
static inline void outlier_weights(const Int8GemmProblem& p, const int32_t* columns, int count,
                                   int64_t n0, int cols, const float* scale_b, float* v) {
  const MatrixView& kept = p.outliers->kept;
  for (int i = 0; i < count; ++i, v += kTileN) {
    const int64_t row = find_kept(*p.outliers, columns[i]);
    if (row >= 0) {
      load_tile_row(kept.data, kept.dtype, row * kept.stride_m + n0 * kept.stride_n, kept.stride_n,
                    cols, v);
      continue;
    }
    const int8_t* b = p.b + columns[i] * p.stride_bk + n0 * p.stride_bn;
    for (int c = 0; c < cols; ++c) v[c] = static_cast<float>(b[c * p.stride_bn]) * scale_b[c];
    for (int c = cols; c < kTileN; ++c) v[c] = 0.0f;
  }
}

// One row's outliers of a chunk of columns.
static inline void add_row_outliers(const OutlierSplit& split, const int32_t* columns, int count,
                                    int64_t m, const float* v, float* row) {
  float values[kOutlierChunk];
  const float* weights[kOutlierChunk];
  int found = 0;
  for (int i = 0; i < count; ++i, v += kTileN) {
    const float x = load_float(split.x.data, split.x.dtype,
                               m * split.x.stride_m + columns[i] * split.x.stride_n);
    values[found] = x, weights[found] = v;
    found += __builtin_fabsf(x) >= split.threshold;
  }
  alignas(64) float y[kTileN];
  for (int c = 0; c < kTileN; ++c) y[c] = row[c];
  for (int i = 0; i < found; ++i) {
    const float x = values[i];
    const float* w = weights[i];
    for (int c = 0; c < kTileN; ++c) y[c] = __builtin_fmaf(x, w[c], y[c]);
  }
  for (int c = 0; c < kTileN; ++c) row[c] = y[c];
}

// tile: [rows][kTileN], the scaled sums.
static inline void add_outliers(const Int8GemmProblem& p, int64_t m0, int rows, int64_t n0,
                                int cols, const float* scale_b, float* tile) {
  alignas(64) float v[kOutlierChunk * kTileN];
  const OutlierSplit& split = *p.outliers;
  const int32_t all = *split.num_columns;
  for (int32_t first = 0; first < all; first += kOutlierChunk) {
    const int32_t* columns = split.columns + first;
    const int count = all - first < kOutlierChunk ? all - first : kOutlierChunk;
    outlier_weights(p, columns, count, n0, cols, scale_b, v);
    for (int r = 0; r < rows; ++r) {
      add_row_outliers(split, columns, count, m0 + r, v, tile + r * kTileN);
    }
  }
}

}  // namespace fastq::cpu
