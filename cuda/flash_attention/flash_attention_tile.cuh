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

// Which keys of a sequence a query attends to.
struct KeyBounds {
  int seqlen_q, seqlen_k;
  int left, right;  // the window; negative: no bound

  __device__ void set(int seqlen_q_, int seqlen_k_, int64_t window_left, int64_t window_right) {
    seqlen_q = seqlen_q_, seqlen_k = seqlen_k_;
    // No further than the sequence, lest sums overflow.
    left = static_cast<int>(min(window_left, int64_t{seqlen_k}));
    right = static_cast<int>(min(window_right, int64_t{seqlen_q}));
  }

  // Where a query stands among the keys.
  __device__ int position(int query) const { return query - seqlen_q + seqlen_k; }
  // The keys it attends to.
  __device__ int first_key(int query) const {
    return left < 0 ? 0 : max(position(query) - left, 0);
  }
  __device__ int last_key(int query) const {  // one past
    return right < 0 ? seqlen_k : max(min(position(query) + right + 1, seqlen_k), 0);
  }
};

// A tile of queries of a head: those of its sequence from `first` on.
struct QueryTile : KeyBounds {
  int batch, head, head_k;
  int first;
  int begin_q, begin_k;  // of packed sequences: their first rows

  // `group` heads share a key head. False where the sequence is over.
  __device__ bool set(const FlashAttentionProblem& p, int group, int batch_, int head_,
                      int first_) {
    batch = batch_, head = head_, first = first_;
    head_k = head / group;
    int rows_q = static_cast<int>(p.seqlen_q), rows_k = static_cast<int>(p.seqlen_k);
    begin_q = begin_k = 0;
    if (p.cu_seqlens_q != nullptr) {
      begin_q = p.cu_seqlens_q[batch], begin_k = p.cu_seqlens_k[batch];
      rows_q = p.cu_seqlens_q[batch + 1] - begin_q;
      rows_k = p.cu_seqlens_k[batch + 1] - begin_k;
    }
    KeyBounds::set(rows_q, rows_k, p.window_left, p.window_right);
    return first < seqlen_q;
  }

  // The blocks of `tile_n` keys, begin to end, that `rows` of the queries attend to.
  struct KeyBlocks {
    int begin, end;
    int whole_begin, whole_end;  // keys that all these queries attend to
  };
  __device__ KeyBlocks key_blocks(int from, int rows, int tile_n) const {
    const int begin = first + from, last = min(begin + rows, seqlen_q) - 1;
    return {first_key(begin) / tile_n, (last_key(last) + tile_n - 1) / tile_n, first_key(last),
            last_key(begin)};
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
__device__ __forceinline__ void transform_scores(const FlashAttentionProblem& p, float slope,
                                                 float distance, float (&s)[kTilesN][4]) {
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
__device__ __forceinline__ void mask_scores(const QueryTile& tile, int first_query, int key,
                                            float (&s)[kTilesN][4]) {
  const int query = not_hoisted(first_query);
  const int column = key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int last = tile.last_key(query + 8 * half) - column;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + i >= last) s[j][2 * half + i] = -INFINITY;
      }
    }
    if (tile.left < 0) continue;
    const int first = tile.first_key(query + 8 * half) - column;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (8 * j + i < first) s[j][2 * half + i] = -INFINITY;
      }
    }
  }
}

// The running softmax of this lane's two of 16 rows.
//
// Exponentials are relative to a reference, which need not be the largest score: it is replaced
// only by one that is 2^kSlack times as large. So blocks after the first few need neither a
// reduction over the lanes of a row nor new sums and outputs. Each row decides for itself, whatever
// the others do.
struct RowSoftmax {
  static constexpr float kSlack = 15;           // 2^15 is within float16's range
  static constexpr float kLimit = 32768;        // 2^kSlack
  float reference[2] = {-INFINITY, -INFINITY};  // exponents of 2
  float sum[2] = {0, 0};                        // of this lane's columns alone

  // Takes a block's scores into account. True where the warp's outputs so far must be multiplied by
  // `rescale`, as the sums have been.
  template <int kTilesN>
  __device__ __forceinline__ bool refer(const float (&s)[kTilesN][4], float factor,
                                        float (&rescale)[2]) {
    float most[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float columns[2] = {s[0][2 * half], s[0][2 * half + 1]};
#pragma unroll
      for (int j = 1; j < kTilesN; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) columns[i] = fmaxf(columns[i], s[j][2 * half + i]);
      }
      most[half] = fmaxf(columns[0], columns[1]);
    }
    const bool is_large =
        most[0] * factor > reference[0] + kSlack || most[1] * factor > reference[1] + kSlack;
    const bool replaces = __any_sync(0xffffffffu, is_large);
    if (replaces) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = most[half];
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2)) * factor;
        rescale[half] = 1;
        if (x > reference[half] + kSlack) {
          rescale[half] = fast_exp2(reference[half] - x);
          reference[half] = x;
        }
        sum[half] *= rescale[half];
      }
    }
    return replaces;
  }

  // The scores become exponentials. False where one may be larger than 2^kSlack, as none is that
  // has been referred to.
  template <int kTilesN>
  __device__ __forceinline__ bool exponentiate(float (&s)[kTilesN][4], float factor,
                                               bool is_referred = true) {
    // Where there has been nothing to attend to, every exponential is 0; of scores that have not
    // been referred to, infinite.
    const float origin[2] = {is_referred && reference[0] == -INFINITY ? 0.0f : reference[0],
                             is_referred && reference[1] == -INFINITY ? 0.0f : reference[1]};
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = fast_exp2(fmaf(s[j][i], factor, -origin[i / 2]));
    }
    // Several sums at a time: an exponential's latency is that of many additions.
    float total[2][4] = {};
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i / 2][j % 2 * 2 + i % 2] += s[j][i];
    }
    bool fits = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float all = (total[half][0] + total[half][1]) + (total[half][2] + total[half][3]);
      fits = fits && all <= kLimit;
      sum[half] += all;
    }
    return fits;
  }

  // What the outputs of both rows are multiplied by in the end.
  __device__ __forceinline__ void finish(const QueryTile& tile, int query, float (&scale)[2]) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
      for (float& x : sum) x += __shfl_xor_sync(0xffffffffu, x, distance);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = __fdividef(1, sum[half]);
      if (reference[half] == -INFINITY) {  // rarely; scores that are there may all be -inf
        const int row = query + 8 * half;
        if (tile.first_key(row) >= tile.last_key(row)) scale[half] = 0;
      }
    }
  }
  // Writes the natural logarithms of both rows' sums of exponentials, after finish.
  __device__ __forceinline__ void store_lse(const FlashAttentionProblem& p, const QueryTile& tile,
                                            int query) const {
    if (p.lse == nullptr || threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + 8 * half;
      if (row >= tile.seqlen_q) continue;
      p.lse[tile.batch * p.stride_lb + tile.head * p.stride_lh +
            (int64_t{tile.begin_q} + row) * p.stride_lq] =
          (reference[half] + __log2f(sum[half])) / kLog2e;
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
