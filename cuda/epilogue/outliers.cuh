// The outliers' part of a product (see fastq.h, llm_int8_matmul), in a thread's eight columns:
//
//   y = fma(x[m, k], v[k, n], y)   for the outliers k of row m, in ascending order
//
// Elements of a flagged column that are no outliers are zeros here, and left out: a product with
// one would turn a y of -0 into 0, or with an infinite weight into NaN. So the bits do not depend
// on which columns other rows have flagged. The first columns have been gathered, their weights
// scaled; those past the capacity are read where they lie.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/problem.hpp"

namespace fastq::cuda {

struct OutlierParams {
  int M, N, K;
  OutlierSplit split;
  const int8_t* b;
  int64_t stride_bk, stride_bn;
  VectorView scale_b;
};

// Of a product with outliers.
inline OutlierParams outlier_params(const Int8GemmProblem& p) {
  return {static_cast<int>(p.M),
          static_cast<int>(p.N),
          static_cast<int>(p.K),
          *p.outliers,
          p.b,
          p.stride_bk,
          p.stride_bn,
          p.scale_b};
}

__device__ inline float load_float(const void* data, DType dtype, int64_t offset) {
  if (dtype == DType::kBFloat16) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]);
  }
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[offset]);
  return static_cast<const float*>(data)[offset];
}

// x[m, k] where it is an outlier, else 0.
__device__ inline float outlier(const OutlierSplit& split, int64_t m, int64_t k) {
  const float x =
      load_float(split.x.data, split.x.dtype, m * split.x.stride_m + k * split.x.stride_n);
  return fabsf(x) >= split.threshold ? x : 0.0f;
}

// Which of the kept columns k is; -1: none.
__device__ inline int64_t kept_column(const OutlierSplit& split, int64_t k) {
  int64_t low = 0, high = split.num_kept;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (split.kept_columns[middle * split.stride_columns] < k) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const bool found = low < split.num_kept && split.kept_columns[low * split.stride_columns] == k;
  return found ? low : -1;
}

// v[k, n]; `kept` is kept_column(k).
__device__ inline float outlier_weight(const OutlierParams& p, int64_t k, int64_t kept, int64_t n) {
  if (kept >= 0) {
    const MatrixView& from = p.split.kept;
    return load_float(from.data, from.dtype, kept * from.stride_m + n * from.stride_n);
  }
  const float scale = static_cast<const float*>(p.scale_b.data)[n * p.scale_b.stride];
  return __fmul_rn(static_cast<float>(p.b[k * p.stride_bk + n * p.stride_bn]), scale);
}

// Columns are found in two halves: here the second begins, in words of 32. The halves' numbers are
// num_columns[0] and [1], and each half's columns lie where it begins.
__host__ __device__ inline int outlier_half(int K) { return (K / 32 + 1) / 2; }

__device__ inline int outlier_column(const OutlierParams& p, int c) {
  const int first = p.split.num_columns[0];
  return p.split.columns[c < first ? c : 32 * outlier_half(p.K) + c - first];
}

// How far the outliers of a tile have been dealt with.
struct AddedOutliers {
  int count = 0;           // columns that hold any
  bool are_added = false;  // the sums are floats, to which the gathered columns' have been added
};

// In row m and columns n0 to n0 + 7, what has not been added: columns c and on. A call, as few
// products come here, and the others need the registers.
static __device__ __noinline__ void add_outliers(const OutlierParams& p, int c, int count,
                                                 int64_t m, int n0, float (&y)[8]) {
  const OutlierSplit& split = p.split;
#pragma unroll 1
  for (; c < count; ++c) {
    if (c < split.capacity) {
      const float x = split.gathered_x[c * split.stride_gx + m];
      if (x == 0) continue;
      const float* v = split.gathered_b + c * split.stride_gb + n0;  // rows are longer than N
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = __fmaf_rn(x, v[i], y[i]);
      continue;
    }
    const int64_t k = outlier_column(p, c);
    const float x = outlier(split, m, k);
    if (x == 0) continue;
    const int64_t kept = kept_column(split, k);
#pragma unroll 1
    for (int i = 0; i < 8 && n0 + i < p.N; ++i) {
      y[i] = __fmaf_rn(x, outlier_weight(p, k, kept, n0 + i), y[i]);
    }
  }
}

}  // namespace fastq::cuda
