// FlashAttention's forward pass for a task's rows, panel by panel, a block of keys at a time, so
// that the scores of a whole row never exist. Rows lie along the vector's lanes
// (flash_attention_softmax.hpp), and q, transposed to (head_dim, kRows), as well: then k and v are
// read as they are, one number for all lanes.
//
// Where the keys come from is the caller's affair: `Keys` has
//
//   kScaled                            whether keys and values have scales
//   load(first, count, k, v)           keys and values as floats, rows side by side
//   scales(first, count, k, v)         with kScaled only
//   prefetch(first, count)             asks for those that come next
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/flash_attention/flash_attention_softmax.hpp"
#include "cpu/float_rows.hpp"

namespace fastq::cpu {
namespace {

constexpr int kPanels = kAttentionRows / kRows;
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
template <class Problem>
inline void load_queries(const Problem& p, const AttentionTask& task, int64_t first, float* qt) {
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

// Leaves m and l of the panels in `rows`, and their ot one after the other in `ot`, both within
// what attention_scratch says. Returns the number of panels.
template <class Problem, class Keys>
inline int attend_panels(const Problem& p, const AttentionTask& task, const Keys& source,
                         float* scratch, Rows (&rows)[kPanels], float*& ot) {
  const int64_t D = p.head_dim;
  float* const qt = scratch;
  ot = qt + D * kAttentionRows;
  float* const st = ot + D * kAttentionRows;
  float* const k = st + kAttentionRows * kAttentionKeys;
  float* const v = k + kAttentionKeys * D;
  const int panels = static_cast<int>((task.last_row - task.first_row + kRows - 1) / kRows);
  int64_t begin = task.last_key, end = task.first_key;
  for (int panel = 0; panel < panels; ++panel) {
    const int64_t first = task.first_row + panel * kRows;
    set_rows(p, task, first, rows[panel]);
    load_queries(p, task, first, qt + panel * D * kRows);
    begin = std::min(begin, rows[panel].least_first);
    end = std::max(end, rows[panel].most_last);
  }
  std::fill_n(ot, panels * D * kRows, 0.0f);

  float k_scale[kAttentionKeys], v_scale[kAttentionKeys];
  for (int64_t key = begin; key < end; key += kAttentionKeys) {
    const int64_t keys = std::min<int64_t>(kAttentionKeys, end - key);
    source.load(key, keys, k, v);
    if constexpr (Keys::kScaled) source.scales(key, keys, k_scale, v_scale);
    const int64_t next = key + keys;
    source.prefetch(next, std::min<int64_t>(kAttentionKeys, end - next));
    for (int panel = 0; panel < panels; ++panel) {
      Rows& its = rows[panel];
      if (key >= its.most_last || key + keys <= its.least_first) continue;
      float* const o = ot + panel * D * kRows;
      multiply(keys, k, D, 1, qt + panel * D * kRows, D, st, false);
      softmax_block<Keys::kScaled>(p, its, key, keys, st, o, k_scale, v_scale);
      multiply(D, v, 1, D, st, keys, o, true);
    }
  }
  return panels;
}

}  // namespace
}  // namespace fastq::cpu
