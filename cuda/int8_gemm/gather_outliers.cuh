// The columns of x that hold outliers, found from the masks that the quantisation has left, and
// what belongs to them of x and of the weight (see epilogue/outliers.cuh).
//
// Two warps of a block do it. Of a Hopper product it is those that would be idle while the others
// multiply. A tile's elements lie far apart, each in a sector of its own: with few tokens a block
// reads those of its own tiles, with more all blocks gather together, each element once. There a
// warp takes 32 rows of x or of the weight at a time, whichever nobody has taken yet: so nothing
// waits for a block that is not running. Elsewhere a kernel of its own has these warps.
#pragma once

#include "core/integers.hpp"
#include "epilogue/outliers.cuh"
#include "int8_gemm/gather_outliers.hpp"

namespace fastq::cuda {

// The first kOutlierCapacity columns: where their elements lie, from the beginning of a row on.
struct FoundOutliers {
  int count[2];  // of all that each warp found
  int columns[2][kOutlierCapacity];
  int64_t x[kOutlierCapacity];     // bytes behind the row's first
  uintptr_t b[kOutlierCapacity];   // the address of row 0's
  bool is_kept[kOutlierCapacity];  // b is one of the columns with weights of their own

  __device__ int total() const { return count[0] + count[1]; }
  __device__ int gathered() const { return min(total(), kOutlierCapacity); }
};

// Finds the flagged columns of the words from `begin` to before `end` for a warp, and returns how
// many there are. All blocks write the same to split.columns: each for itself.
__device__ inline int find_outliers(const OutlierParams& p, int begin, int end,
                                    int (&columns)[kOutlierCapacity]) {
  const OutlierSplit& split = p.split;
  const int lane = threadIdx.x % 32;
  int found = 0;
  constexpr int kAtATime = 4;  // words of a lane, to have as many loads under way
#pragma unroll 1
  for (int first = begin; first < end; first += 32 * kAtATime) {
    uint32_t flags[kAtATime] = {};
    const uint32_t* from = split.masks + first + lane;
#pragma unroll 2
    for (int row = 0; row < split.mask_rows; ++row, from += split.stride_mask) {
#pragma unroll
      for (int i = 0; i < kAtATime; ++i) {
        if (first + 32 * i + lane < end) flags[i] |= from[32 * i];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const int word = first + 32 * i + lane, left = p.K - 32 * word;
      // What lies behind the columns is not theirs.
      uint32_t bits = left >= 32 ? flags[i] : left > 0 ? flags[i] & ((1u << left) - 1) : 0;
      if (!__any_sync(0xffffffffu, bits)) continue;
      const int count = __popc(bits);
      int up_to = count;  // this lane
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, up_to, lanes);
        if (lane >= lanes) up_to += other;
      }
      int at = found + up_to - count;
      for (; bits != 0; bits &= bits - 1, ++at) {
        const int column = 32 * word + __ffs(bits) - 1;
        if (at < kOutlierCapacity) columns[at] = column;
        split.columns[32 * begin + at] = column;
      }
      found += __shfl_sync(0xffffffffu, up_to, 31);
    }
  }
  return found;
}

__device__ inline int float_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Finds all columns. By 64 threads; meet() lets all see what any has written before.
template <class Meet>
__device__ inline void find_outliers(const OutlierParams& p, FoundOutliers& found,
                                     const Meet& meet) {
  const OutlierSplit& split = p.split;
  const int warp = threadIdx.x / 32 % 2;
  const int words = static_cast<int>(ceil_div(p.K, 32)), half = outlier_half(p.K);
  const int its =
      find_outliers(p, warp == 0 ? 0 : half, warp == 0 ? half : words, found.columns[warp]);
  if (threadIdx.x % 32 == 0) split.num_columns[warp] = found.count[warp] = its;
  meet();
  if (split.outlier_count != nullptr && blockIdx.x == 0 && threadIdx.x % 64 == 0) {
    *split.outlier_count = found.total();
  }
  static_assert(kOutlierCapacity <= 64);
  if (const int i = threadIdx.x % 64; i < found.gathered()) {
    const int of_first = found.count[0];
    const int64_t column = i < of_first ? found.columns[0][i] : found.columns[1][i - of_first];
    const int64_t kept = kept_column(split, column);
    found.x[i] = column * split.x.stride_n * float_bytes(split.x.dtype);
    found.is_kept[i] = kept >= 0;
    found.b[i] = kept < 0 ? reinterpret_cast<uintptr_t>(p.b) + column * p.stride_bk
                          : reinterpret_cast<uintptr_t>(split.kept.data) +
                                kept * split.kept.stride_m * float_bytes(split.kept.dtype);
  }
  meet();
}

// Where the elements of a column lie, in every `step`-th row of x (kIsX) or of the weight.
template <bool kIsX>
struct OutlierColumn {
  __device__ OutlierColumn(const OutlierParams& p, const FoundOutliers& found, int i, int row,
                           int step) {
    const MatrixView& x = p.split.x;
    const MatrixView& kept = p.split.kept;
    is_kept = !kIsX && found.is_kept[i];
    const int64_t stride = kIsX      ? x.stride_m * float_bytes(x.dtype)
                           : is_kept ? kept.stride_n * float_bytes(kept.dtype)
                                     : p.stride_bn;
    address = kIsX ? reinterpret_cast<uintptr_t>(x.data) + found.x[i] : found.b[i];
    address += row * stride;
    bytes = step * stride;
  }
  __device__ void next() { address += bytes; }

  bool is_kept;
  uintptr_t address;
  int64_t bytes;
};

// The word that holds an element: an aligned one, so it is in the memory that holds the element.
__device__ inline const uint32_t* word_of(uintptr_t address) {
  return reinterpret_cast<const uint32_t*>(address & ~uintptr_t{3});
}
// The element in it.
__device__ inline float outlier_in(uint32_t word, uint32_t address, DType dtype) {
  const uint32_t bits = word >> (address % 4 * 8);
  if (dtype == DType::kFloat16) return __half2float(__ushort_as_half(bits));
  return __uint_as_float(dtype == DType::kBFloat16 ? bits << 16 : bits);
}
// `scale` is that of the weight's row.
template <bool kIsX>
__device__ inline float outlier_value(const OutlierParams& p, bool is_kept, uint32_t word,
                                      uint32_t address, float scale) {
  if constexpr (kIsX) {
    const float x = outlier_in(word, address, p.split.x.dtype);
    return fabsf(x) >= p.split.threshold ? x : 0.0f;
  }
  return is_kept ? outlier_in(word, address, p.split.kept.dtype)
                 : __fmul_rn(static_cast<int8_t>(word >> (address % 4 * 8)), scale);
}
template <bool kIsX>
__device__ inline float outlier_scale(const OutlierParams& p, int64_t row) {
  return kIsX ? 0 : static_cast<const float*>(p.scale_b.data)[row * p.scale_b.stride];
}

// Rows of x (kIsX) or of the weight, one a lane from `row0` on, of all gathered columns.
template <bool kIsX>
__device__ inline void gather_rows(const OutlierParams& p, const FoundOutliers& found, int row0) {
  constexpr int kAtATime = 2;  // all of them read before one is written
  const int row = row0 + threadIdx.x % 32, count = found.gathered();
  if (row >= (kIsX ? p.M : p.N)) return;
  float* to = (kIsX ? p.split.gathered_x : p.split.gathered_b) + row;
  const int64_t stride = kIsX ? p.split.stride_gx : p.split.stride_gb;
  const float scale = outlier_scale<kIsX>(p, row);
#pragma unroll 1
  for (int first = 0; first < count; first += kAtATime) {
    uint32_t words[kAtATime], addresses[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      const OutlierColumn<kIsX> column(p, found, min(first + i, count - 1), row, 0);
      addresses[i] = static_cast<uint32_t>(column.address);
      words[i] = *word_of(column.address);
    }
#pragma unroll
    for (int i = 0; i < kAtATime; ++i, to += stride) {
      if (first + i >= count) break;
      const bool is_kept = !kIsX && found.is_kept[first + i];
      *to = outlier_value<kIsX>(p, is_kept, words[i], addresses[i], scale);
    }
  }
}

// What nobody has gathered yet. By a warp of any block; then waits for what others have begun.
__device__ inline void gather_together(const OutlierParams& p, const FoundOutliers& found) {
  const int lane = threadIdx.x % 32, of_x = static_cast<int>(ceil_div(p.M, 32));
  const int chunks = of_x + static_cast<int>(ceil_div(p.N, 32));
  int done = 0;
#pragma unroll 1
  for (;; ++done) {
    int chunk = lane == 0 ? atomicAdd(p.split.counters, 1) : 0;
    chunk = __shfl_sync(0xffffffffu, chunk, 0);
    if (chunk >= chunks) break;
    if (chunk < of_x) {
      gather_rows<true>(p, found, 32 * chunk);
    } else {
      gather_rows<false>(p, found, 32 * (chunk - of_x));
    }
  }
  __threadfence();
  __syncwarp();
  if (lane == 0) {
    atomicAdd(p.split.counters + 1, done);
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                   : "=r"(done)
                   : "l"(p.split.counters + 1)
                   : "memory");
    } while (done < chunks);
  }
  __syncwarp();
}

}  // namespace fastq::cuda
