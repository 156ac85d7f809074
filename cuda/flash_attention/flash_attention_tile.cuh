// What the attention kernels share: a tile of queries, the keys it attends to, and the online
// softmax of its scores.
//
// Scores and outputs lie in registers as mma.sync and WGMMA leave them: of each 16 rows a lane has
// rows lane / 4 and lane / 4 + 8, and of each 8 columns 2 * (lane % 4) and the next, as
// x[columns / 8][4]: two of the upper row, two of the lower.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/problem.hpp"

namespace fastq::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// 2^x to 2 ulp, 0 where that is below the normal numbers.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A tile of queries of a head: those of its sequence from `first` on.
struct QueryTile {
  int batch, head, head_k;
  int first, seqlen_q, seqlen_k;
  int begin_q, begin_k;  // of packed sequences: their first rows
  int64_t left, right;   // the window; negative: no bound

  // `group` heads share a key head. False where the sequence is over.
  __device__ bool set(const FlashAttentionProblem& p, int group, int batch_, int head_,
                      int first_) {
    batch = batch_, head = head_, first = first_;
    head_k = head / group;
    seqlen_q = static_cast<int>(p.seqlen_q), seqlen_k = static_cast<int>(p.seqlen_k);
    begin_q = begin_k = 0;
    if (p.cu_seqlens_q != nullptr) {
      begin_q = p.cu_seqlens_q[batch], begin_k = p.cu_seqlens_k[batch];
      seqlen_q = p.cu_seqlens_q[batch + 1] - begin_q;
      seqlen_k = p.cu_seqlens_k[batch + 1] - begin_k;
    }
    left = p.window_left, right = p.window_right;
    return first < seqlen_q;
  }

  // Where a query stands among the keys.
  __device__ int64_t position(int query) const { return int64_t{query} + seqlen_k - seqlen_q; }
  // The keys it attends to.
  __device__ int first_key(int query) const {
    return left < 0 ? 0 : static_cast<int>(max(position(query) - left, int64_t{0}));
  }
  __device__ int last_key(int query) const {  // one past
    if (right < 0) return seqlen_k;
    return static_cast<int>(max(min(position(query) + right + 1, int64_t{seqlen_k}), int64_t{0}));
  }

  // Row `row` of the sequence.
  template <class T>
  __device__ T* row_of(const AttentionTensor& t, int begin, int row, int its_head) const {
    return static_cast<T*>(t.data) + batch * t.stride_batch +
           (int64_t{begin} + row) * t.stride_seqlen + its_head * t.stride_head;
  }
};

// Whether scores are more than scaled. The largest is looked for before the scale, which so must be
// positive.
__device__ inline bool transforms_scores(const FlashAttentionProblem& p) {
  return p.softcap > 0 || p.alibi_slopes != nullptr || p.softmax_scale < 0;
}
// What scores are multiplied by, in the end, to become exponents of 2.
__device__ inline float score_factor(const FlashAttentionProblem& p) {
  return transforms_scores(p) ? 1.0f : p.softmax_scale * kLog2e;
}

// What depends on it is computed where it stands, and not once before the loop around it: few
// blocks of keys need a mask, and every register is taken.
__device__ inline int not_hoisted(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// What ALiBi multiplies the distance from a query to a key with.
__device__ inline float alibi_slope(const FlashAttentionProblem& p, const QueryTile& tile) {
  if (p.alibi_slopes == nullptr) return 0;
  return p.alibi_slopes[tile.batch * p.stride_ab + tile.head * p.stride_ah];
}

// Scores of 16 rows become exponents of 2: scaled, capped, less the slope times the distance.
// `distance` is from this lane's first query to the first key.
template <int kTilesN>
__device__ inline void transform_scores(const FlashAttentionProblem& p, float slope, float distance,
                                        float (&s)[kTilesN][4]) {
  distance -= threadIdx.x % 4 * 2;
  const float scale = p.softmax_scale * kLog2e, cap = p.softcap * kLog2e;
  if (p.softcap > 0) {
    const float twice = 2 * scale / p.softcap;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (float& x : s[j]) x = cap - __fdividef(2 * cap, 1 + fast_exp2(twice * x));  // cap tanh
    }
  } else {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (float& x : s[j]) x *= scale;
    }
  }
  slope *= kLog2e;
#pragma unroll
  for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto further = static_cast<float>(i / 2 * 8 - (8 * j + i % 2));
      s[j][i] -= slope * fabsf(distance + further);
    }
  }
}

// Scores of keys that a query does not attend to become -inf.
template <int kTilesN>
__device__ inline void mask_scores(const QueryTile& tile, int first_query, int key,
                                   float (&s)[kTilesN][4]) {
  const int query = not_hoisted(first_query);
  const int column = key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = tile.first_key(query + 8 * half) - column;
    const int last = tile.last_key(query + 8 * half) - column;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = 8 * j + i;
        if (at < first || at >= last) s[j][2 * half + i] = -INFINITY;
      }
    }
  }
}

// The running softmax of this lane's two of 16 rows.
struct RowSoftmax {
  float max[2] = {-INFINITY, -INFINITY};  // exponents of 2
  float sum[2] = {0, 0};                  // of this lane's columns alone

  // Scores become exponentials; `rescale` is what the sums so far have been multiplied by.
  template <int kTilesN>
  __device__ void step(float (&s)[kTilesN][4], float factor, float (&rescale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = s[0][2 * half];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      most = fmaxf(max[half], most * factor);
      // Where there has been nothing to attend to, every exponential is 0.
      const float origin = most == -INFINITY ? 0.0f : most;
      rescale[half] = fast_exp2(max[half] - origin);
      max[half] = most;
      float total = 0;
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[j][2 * half + i];
          x = fast_exp2(fmaf(x, factor, -origin));
          total += x;
        }
      }
      sum[half] = fmaf(sum[half], rescale[half], total);
    }
  }

  // What the outputs of both rows are multiplied by in the end, and the natural logarithm of the
  // sum of exponentials.
  __device__ void finish(const QueryTile& tile, int query, float (&scale)[2], float (&lse)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const int row = query + 8 * half;
      const bool attends = tile.first_key(row) < tile.last_key(row);
      scale[half] = attends ? 1 / total : 0.0f;
      lse[half] = attends ? (max[half] + log2f(total)) / kLog2e : -INFINITY;
    }
  }
};

__device__ inline uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

}  // namespace fastq::cuda
