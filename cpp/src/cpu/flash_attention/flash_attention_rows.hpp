// Attention of some rows (queries of the heads that share a key head) to the keys of a sequence:
//
//   s[j,r] = mask(softcap(softmax_scale * sum_d k[j,d] q[r,d]) - slope |p(r) - j|)
//   out[r,d] = sum_j v[j,d] exp(s[j,r] - m[r]) / l[r],   l[r] = sum_j exp(s[j,r] - m[r])
//
// FlashAttention-2's forward pass: a block of keys at a time, so that the scores of a whole row
// never exist. Rows lie along the vector's lanes (flash_attention_softmax.hpp), and q, transposed
// to (head_dim, kRows), as well: then k and v are read as they are, one number for all lanes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/flash_attention/flash_attention_softmax.hpp"
#include "cpu/float_rows.hpp"

namespace fastq::cpu {
namespace {

constexpr int kTileRows = kLanes == 16 ? 8 : 4;  // of k or v, as many sums as registers hold

// c[i, :] (+)= sum_k a[i * stride_ai + k * stride_ak] * b[k, :], kCount rows of a, kRows columns.
template <int kCount>
inline void multiply_tile(const float* a, int64_t stride_ai, int64_t stride_ak, const float* b,
                          int64_t depth, float* c, bool accumulate) {
  Vec acc[kCount][kVectors] = {};
  if (accumulate) {
    for (int i = 0; i < kCount; ++i) {
      for (int j = 0; j < kVectors; ++j) acc[i][j] = load(c + i * kRows + j * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * kRows + j * kLanes);
    for (int i = 0; i < kCount; ++i) {
      const float x = a[i * stride_ai + k * stride_ak];
      for (int j = 0; j < kVectors; ++j) acc[i][j] += x * row[j];
    }
  }
  for (int i = 0; i < kCount; ++i) {
    for (int j = 0; j < kVectors; ++j) store(c + i * kRows + j * kLanes, acc[i][j]);
  }
}

inline void multiply(int64_t count, const float* a, int64_t stride_ai, int64_t stride_ak,
                     const float* b, int64_t depth, float* c, bool accumulate) {
  int64_t i = 0;
  for (; i + kTileRows <= count; i += kTileRows) {
    multiply_tile<kTileRows>(a + i * stride_ai, stride_ai, stride_ak, b, depth, c + i * kRows,
                             accumulate);
  }
  for (; i < count; ++i) {
    multiply_tile<1>(a + i * stride_ai, stride_ai, stride_ak, b, depth, c + i * kRows, accumulate);
  }
}

// qt of a panel; lanes past the last row are 0.
inline void load_queries(const FlashAttentionProblem& p, const AttentionTask& task, int64_t first,
                         float* qt) {
  const int64_t group = p.num_heads / p.num_heads_k;
  float row_of[kMaxHeadDim];
  for (int lane = 0; lane < kRows; ++lane) {
    const int64_t row = first + lane;
    if (row < task.last_row) {
      const int64_t at = task.q + row / group * p.q.stride_seqlen + row % group * p.q.stride_head;
      load_floats(p.q.data, p.dtype, at, 1, p.head_dim, row_of);
    } else {
      std::fill_n(row_of, p.head_dim, 0.0f);
    }
    for (int64_t d = 0; d < p.head_dim; ++d) qt[d * kRows + lane] = row_of[d];
  }
}

// Keys or values as floats, side by side: rows a large power of two apart would fight for the same
// lines of the cache.
inline void gather(const AttentionTensor& t, DType dtype, int64_t first, int64_t keys,
                   int64_t head_dim, float* space) {
  for (int64_t key = 0; key < keys; ++key) {
    load_floats(t.data, dtype, first + key * t.stride_seqlen, 1, head_dim, space + key * head_dim);
  }
}

void attend_rows(const FlashAttentionProblem& p, const AttentionTask& task, float* scratch) {
  constexpr int kPanels = kAttentionRows / kRows;
  const int64_t D = p.head_dim;
  float* const qt = scratch;
  float* const ot = qt + D * kAttentionRows;
  float* const st = ot + D * kAttentionRows;
  float* const k = st + kAttentionRows * kAttentionKeys;
  float* const v = k + kAttentionKeys * D;
  Rows rows[kPanels];
  const int panels = static_cast<int>((task.last_row - task.first_row + kRows - 1) / kRows);
  int64_t begin = task.seqlen_k, end = 0;
  for (int panel = 0; panel < panels; ++panel) {
    const int64_t first = task.first_row + panel * kRows;
    set_rows(p, task, first, rows[panel]);
    load_queries(p, task, first, qt + panel * D * kRows);
    begin = std::min(begin, rows[panel].least_first);
    end = std::max(end, rows[panel].most_last);
  }
  std::fill_n(ot, panels * D * kRows, 0.0f);

  for (int64_t key = begin; key < end; key += kAttentionKeys) {
    const int64_t keys = std::min<int64_t>(kAttentionKeys, end - key);
    gather(p.k, p.dtype, task.k + key * p.k.stride_seqlen, keys, D, k);
    gather(p.v, p.dtype, task.v + key * p.v.stride_seqlen, keys, D, v);
    const int64_t next = key + keys, more = std::min<int64_t>(kAttentionKeys, end - next);
    prefetch_rows(p.k, p.dtype, task.k + next * p.k.stride_seqlen, more, D);
    prefetch_rows(p.v, p.dtype, task.v + next * p.v.stride_seqlen, more, D);
    for (int panel = 0; panel < panels; ++panel) {
      Rows& its = rows[panel];
      if (key >= its.most_last || key + keys <= its.least_first) continue;
      float* const o = ot + panel * D * kRows;
      multiply(keys, k, D, 1, qt + panel * D * kRows, D, st, false);
      softmax_block(p, its, key, keys, st, o);
      multiply(D, v, 1, D, st, keys, o, true);
    }
  }
  for (int panel = 0; panel < panels; ++panel) {
    store_rows(p, task, task.first_row + panel * kRows, rows[panel], ot + panel * D * kRows);
  }
}

}  // namespace
}  // namespace fastq::cpu
