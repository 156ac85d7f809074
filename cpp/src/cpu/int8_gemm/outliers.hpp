// The outliers' part of one tile of output, added to the scaled sums:
//
//   y[m,n] = fma(x[m,k], v[k,n], y[m,n])   for the outliers k of row m, in ascending order
//   v[k,n] = f32(kept[i,n]) where k = kept_columns[i], else f32(b[k,n]) * scale_b[n]
//
// Only the columns that hold an outlier in some row are looked at, a chunk at a time. Of those that
// are gathered, x and v are at hand, v in whole tiles; the others' v is made once for all rows of
// the tile.
//
// Compiled once per instruction set (see float_rows.hpp). The fused multiply-add is an instruction
// where the set has one, else the C library's function: never two roundings. Not left to the
// compiler's loops, which GCC jams before it could turn them into vector code.
#pragma once

#include <cstring>

#include "cpu/float_rows.hpp"
#include "cpu/int8_gemm/kernels.hpp"

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fastq::cpu {

static constexpr int kOutlierChunk = 64;

#if defined(__AVX512F__)
using OutlierLanes = __m512;
static inline OutlierLanes fused_multiply_add(OutlierLanes x, OutlierLanes w, OutlierLanes y) {
  return _mm512_fmadd_ps(x, w, y);
}
#elif defined(__FMA__)
using OutlierLanes = __m256;
static inline OutlierLanes fused_multiply_add(OutlierLanes x, OutlierLanes w, OutlierLanes y) {
  return _mm256_fmadd_ps(x, w, y);
}
#elif defined(__ARM_NEON)
using OutlierLanes = float32x4_t;
static inline OutlierLanes fused_multiply_add(OutlierLanes x, OutlierLanes w, OutlierLanes y) {
  return vfmaq_f32(y, x, w);
}
#else
using OutlierLanes = float;
static inline OutlierLanes fused_multiply_add(OutlierLanes x, OutlierLanes w, OutlierLanes y) {
  return __builtin_fmaf(x, w, y);
}
#endif
static constexpr int kLanesOfTile = kTileN * sizeof(float) / sizeof(OutlierLanes);

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

// v of a chunk of columns: v[i * stride_v + c], kTileN of each, zeros past the problem's edge. `b`
// is read a column of the product at a time: where K is contiguous, those are runs of memory.
static inline void outlier_weights(const Int8GemmProblem& p, const int32_t* columns, int count,
                                   int64_t n0, int cols, const float* scale_b, float* v,
                                   int64_t stride_v) {
  const MatrixView& kept = p.outliers->kept;
  int plain[kOutlierChunk], num_plain = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t row = find_kept(*p.outliers, columns[i]);
    plain[num_plain] = i;
    num_plain += row < 0;
    if (row < 0) continue;
    load_tile_row(kept.data, kept.dtype, row * kept.stride_m + n0 * kept.stride_n, kept.stride_n,
                  cols, v + i * stride_v);
  }
  for (int c = 0; c < kTileN; ++c) {
    const int8_t* b = p.b + (n0 + c) * p.stride_bn;
    for (int j = 0; j < num_plain; ++j) {
      const int i = plain[j];
      v[i * stride_v + c] =
          c < cols ? static_cast<float>(b[columns[i] * p.stride_bk]) * scale_b[c] : 0.0f;
    }
  }
}

// One row's outliers of a chunk of columns, and where their weights are.
struct RowOutliers {
  float x[kOutlierChunk];
  const float* weights[kOutlierChunk];
  int count = 0;

  void take(float value, bool is_outlier, const float* v) {
    x[count] = value, weights[count] = v;
    count += is_outlier;
  }

  void add_to(float* row) const {
    OutlierLanes y[kLanesOfTile];
    std::memcpy(y, row, sizeof(y));
    for (int i = 0; i < count; ++i) {
      const OutlierLanes factor = x[i] - OutlierLanes{};
      FASTQ_UNROLL for (int c = 0; c < kLanesOfTile; ++c) {
        OutlierLanes w;
        std::memcpy(&w, weights[i] + c * (kTileN / kLanesOfTile), sizeof(w));
        y[c] = fused_multiply_add(factor, w, y[c]);
      }
    }
    std::memcpy(row, y, sizeof(y));
  }
};

// tile: [rows][kTileN], the scaled sums.
static inline void add_outliers(const Int8GemmProblem& p, int64_t m0, int rows, int64_t n0,
                                int cols, const float* scale_b, float* tile) {
  alignas(64) float v[kOutlierChunk * kTileN];
  const OutlierSplit& split = *p.outliers;
  const int32_t all = *split.num_columns;
  const int32_t gathered = all < split.capacity ? all : split.capacity;
  for (int32_t first = 0; first < gathered; first += kOutlierChunk) {
    const int32_t last = gathered - first < kOutlierChunk ? gathered : first + kOutlierChunk;
    for (int r = 0; r < rows; ++r) {
      RowOutliers outliers;
      for (int32_t i = first; i < last; ++i) {
        const float x = split.gathered_x[i * split.stride_gx + m0 + r];
        outliers.take(x, x != 0.0f, split.gathered_b + i * split.stride_gb + n0);
      }
      outliers.add_to(tile + r * kTileN);
    }
  }
  for (int32_t first = gathered; first < all; first += kOutlierChunk) {
    const int32_t* columns = split.columns + first;
    const int count = all - first < kOutlierChunk ? all - first : kOutlierChunk;
    outlier_weights(p, columns, count, n0, cols, scale_b, v, kTileN);
    for (int r = 0; r < rows; ++r) {
      RowOutliers outliers;
      for (int i = 0; i < count; ++i) {
        const float x = load_float(split.x.data, split.x.dtype,
                                   (m0 + r) * split.x.stride_m + columns[i] * split.x.stride_n);
        outliers.take(x, __builtin_fabsf(x) >= split.threshold, v + i * kTileN);
      }
      outliers.add_to(tile + r * kTileN);
    }
  }
}

}  // namespace fastq::cpu
