// The columns of x that hold outliers, found from the masks that the quantisation has left, and
// what belongs to them of x and of the weight (see epilogue/outliers.cuh).
//
// Two warps of a block do it: those of a Hopper product that would be idle, for the block's own
// tiles, while the others multiply; elsewhere a kernel of its own has them.
#pragma once

#include "core/integers.hpp"
#include "epilogue/outliers.cuh"
#include "int8_gemm/gather_outliers.hpp"

namespace fastq::cuda {

// The first kOutlierCapacity columns, some found by each warp.
struct FoundOutliers {
  int count[2];  // of all that it found
  int columns[2][kOutlierCapacity];
  int kept[2][kOutlierCapacity];  // which of the kept columns it is; -1: none

  __device__ int total() const { return count[0] + count[1]; }
  __device__ int column(int i) const {
    return i < count[0] ? columns[0][i] : columns[1][i - count[0]];
  }
  __device__ int kept_column(int i) const {
    return i < count[0] ? kept[0][i] : kept[1][i - count[0]];
  }
};

// Finds the flagged columns of the words from `begin` to before `end` for a warp, and returns how
// many there are. All blocks write the same to split.columns: each for itself.
__device__ inline int find_outliers(const OutlierParams& p, int begin, int end,
                                    int (&columns)[kOutlierCapacity]) {
  const OutlierSplit& split = p.split;
  const int lane = threadIdx.x % 32;
  int found = 0;
#pragma unroll 1
  for (int word = begin + lane; word - lane < end; word += 32) {
    uint32_t flags = 0;
    if (word < end) {
      const uint32_t* from = split.masks + word;
#pragma unroll 8
      for (int row = 0; row < split.mask_rows; ++row, from += split.stride_mask) flags |= *from;
      const int left = p.K - 32 * word;
      if (left < 32) flags &= (1u << left) - 1;  // what lies behind the columns is not theirs
    }
    const int count = __popc(flags);
    int up_to = count;  // this lane
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, up_to, lanes);
      if (lane >= lanes) up_to += other;
    }
    int at = found + up_to - count;
    for (; flags != 0; flags &= flags - 1, ++at) {
      const int column = 32 * word + __ffs(flags) - 1;
      if (at < kOutlierCapacity) columns[at] = column;
      split.columns[32 * begin + at] = column;
    }
    found += __shfl_sync(0xffffffffu, up_to, 31);
  }
  return found;
}

// Finds all columns, by warps 0 and 1; meet() lets both see what either has written before.
template <class Meet>
__device__ inline void find_outliers(const OutlierParams& p, FoundOutliers& found, int warp,
                                     const Meet& meet) {
  const OutlierSplit& split = p.split;
  const int lane = threadIdx.x % 32;
  const int words = static_cast<int>(ceil_div(p.K, 32)), half = outlier_half(p.K);
  const int its =
      find_outliers(p, warp == 0 ? 0 : half, warp == 0 ? half : words, found.columns[warp]);
  if (lane == 0) split.num_columns[warp] = found.count[warp] = its;
  __syncwarp();
  for (int i = lane; i < min(its, kOutlierCapacity); i += 32) {
    found.kept[warp][i] = static_cast<int>(kept_column(split, found.columns[warp][i]));
  }
  __syncwarp();
  meet();
  if (split.outlier_count != nullptr && blockIdx.x == 0 && lane == 0) {
    *split.outlier_count = found.total();
  }
}

__device__ inline int float_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Where an element of a row of x (kIsX) or of the weight lies, that of the i-th column.
template <bool kIsX>
__device__ inline uintptr_t outlier_address(const OutlierParams& p, const FoundOutliers& found,
                                            int i, int64_t row) {
  const OutlierSplit& split = p.split;
  if constexpr (kIsX) {
    const int64_t at = row * split.x.stride_m + found.column(i) * split.x.stride_n;
    return reinterpret_cast<uintptr_t>(split.x.data) + at * float_bytes(split.x.dtype);
  }
  const int kept = found.kept_column(i);
  if (kept < 0) {
    return reinterpret_cast<uintptr_t>(p.b) + found.column(i) * p.stride_bk + row * p.stride_bn;
  }
  const int64_t at = kept * split.kept.stride_m + row * split.kept.stride_n;
  return reinterpret_cast<uintptr_t>(split.kept.data) + at * float_bytes(split.kept.dtype);
}
// The word that holds it.
__device__ inline const uint32_t* word_of(uintptr_t address) {
  return reinterpret_cast<const uint32_t*>(address & ~uintptr_t{3});
}
// What it is, of that word. `scale` is the weight's row's.
template <bool kIsX>
__device__ inline float outlier_value(const OutlierParams& p, const FoundOutliers& found, int i,
                                      uint32_t address, uint32_t word, float scale) {
  const uint32_t bits = word >> (address % 4 * 8);
  if (!kIsX && found.kept_column(i) < 0) return __fmul_rn(static_cast<int8_t>(bits), scale);
  const DType dtype = kIsX ? p.split.x.dtype : p.split.kept.dtype;
  const float value = dtype == DType::kFloat16    ? __half2float(__ushort_as_half(bits))
                      : dtype == DType::kBFloat16 ? __uint_as_float(bits << 16)
                                                  : __uint_as_float(bits);
  return kIsX && !(fabsf(value) >= p.split.threshold) ? 0.0f : value;
}

__device__ inline float weight_scale(const OutlierParams& p, int64_t row) {
  return static_cast<const float*>(p.scale_b.data)[row * p.scale_b.stride];
}

}  // namespace fastq::cuda
