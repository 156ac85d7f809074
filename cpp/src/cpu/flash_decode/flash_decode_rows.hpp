// Attention of a task's rows to some keys of a cache, and the combination of such parts:
//
//   M = max_i m_i,  l = sum_i l_i exp(m_i - M),  out = sum_i o_i exp(m_i - M) / l
//
// with the parts of a row in the order of its keys. Few rows are taken one by one
// (flash_decode_few_rows.hpp), more of them along the vector's lanes, as flash_attention does.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/flash_attention/flash_attention_panels.hpp"
#include "cpu/flash_decode/flash_decode_few_rows.hpp"
#include "cpu/flash_decode/flash_decode_kernels.hpp"
#include "cpu/flash_decode/flash_decode_keys.hpp"

namespace fastq::cpu {
namespace {

template <bool kIsInt8>
struct CacheKeys {
  static constexpr bool kScaled = kIsInt8;
  const FlashDecodeProblem& p;
  const CacheRows rows;

  void load(int64_t first, int64_t count, float* k, float* v) const {
    for (int64_t i = 0; i < count; ++i) {
      rows.load(p.cache.k, first + i, k + i * p.head_dim);
      rows.load(p.cache.v, first + i, v + i * p.head_dim);
    }
  }
  void scales(int64_t first, int64_t count, float* k, float* v) const {
    rows.scales(p.cache.k_scale, first, count, k);
    rows.scales(p.cache.v_scale, first, count, v);
  }
  void prefetch(int64_t first, int64_t count) const {
    rows.prefetch(p.cache.k, first, count);
    rows.prefetch(p.cache.v, first, count);
  }
};

template <bool kIsInt8>
inline void attend_many_rows(const FlashDecodeProblem& p, const AttentionTask& task, float* parts,
                             float* scratch) {
  Rows rows[kPanels];
  float* ot = nullptr;
  const CacheKeys<kIsInt8> keys{p, CacheRows(p.cache, task.batch, task.head_k, p.head_dim)};
  const int panels = attend_panels(p, task, keys, scratch, rows, ot);
  for (int panel = 0; panel < panels; ++panel, ot += p.head_dim * kRows) {
    const int64_t first = task.first_row + panel * kRows;
    for (int lane = 0; lane < kRows && first + lane < task.last_row; ++lane) {
      float* const part = parts + (panel * kRows + lane) * part_size(p.head_dim);
      part[0] = rows[panel].max[lane / kLanes][lane % kLanes];
      part[1] = rows[panel].sum[lane / kLanes][lane % kLanes];
      for (int64_t d = 0; d < p.head_dim; ++d) part[2 + d] = ot[d * kRows + lane];
    }
  }
}

void attend_cache(const FlashDecodeProblem& p, const AttentionTask& task, int64_t heads,
                  float* parts, float* scratch) {
  const bool few = task.last_row - task.first_row <= kFewRows;
  switch (p.cache.dtype) {
    case DType::kInt8:
      if (few) return attend_few_rows_of<int8_t>(p, task, heads, parts, scratch);
      return attend_many_rows<true>(p, task, parts, scratch);
    case DType::kFloat16:
      if (few) return attend_few_rows_of<Float16>(p, task, heads, parts, scratch);
      break;
    case DType::kBFloat16:
      if (few) return attend_few_rows_of<BFloat16>(p, task, heads, parts, scratch);
      break;
    default:
      if (few) return attend_few_rows_of<float>(p, task, heads, parts, scratch);
  }
  attend_many_rows<false>(p, task, parts, scratch);
}

void combine_parts(const FlashDecodeProblem& p, int64_t batch, int64_t head_k, int64_t row,
                   const float* parts, int64_t count, int64_t stride) {
  float max = -kInfinity, sum = 0;
  float out[kMaxHeadDim] = {};
  for (int64_t i = 0; i < count; ++i) max = std::max(max, parts[i * stride]);  // never NaN
  for (int64_t i = 0; i < count; ++i) {
    const float* const part = parts + i * stride;
    // Also of two infinities, whose difference is NaN.
    const Vec weight = part[0] == max ? Vec{} + 1.0f : exp_negative(Vec{} + (part[0] - max));
    sum += weight[0] * part[1];
    for (int64_t d = 0; d < p.head_dim; ++d) out[d] += weight[0] * part[2 + d];
  }
  const float scale = sum == 0 ? 0.0f : 1.0f / sum;  // 0: the row attends to nothing
  for (int64_t d = 0; d < p.head_dim; ++d) out[d] *= scale;
  const int64_t group = p.num_heads / p.num_heads_k;
  const int64_t query = row / group, head = head_k * group + row % group;
  store_floats(out, p.head_dim, p.out.data, p.dtype,
               batch * p.out.stride_batch + query * p.out.stride_seqlen + head * p.out.stride_head,
               1);
  if (p.lse == nullptr) return;
  p.lse[batch * p.stride_lb + head * p.stride_lh + query * p.stride_lq] = max + std::log(sum);
}

}  // namespace
}  // namespace fastq::cpu
