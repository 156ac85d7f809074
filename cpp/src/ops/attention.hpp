// The checks that the attention ops share, and what they make of a problem.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "core/problem.hpp"
#include "ops/checks.hpp"

namespace fastq {

// (..., seqlen, heads, head_dim); a tensor of rank 3 has no batch stride.
AttentionTensor attention_tensor(const TensorView& t);

void check_head_dim_stride(const char* op, const NamedTensor& tensor);
// 1 to kMaxHeadDim.
void check_head_dim(const char* op, const NamedTensor& q, int64_t head_dim);
// num_heads is a multiple of num_heads_k.
void check_num_heads(const char* op, const NamedTensor& k, int64_t num_heads, int64_t num_heads_k);
// softmax_scale and softcap are finite, softcap is not negative.
void check_softmax(const char* op, float softmax_scale, float softcap);

// Scores: softmax_scale, softcap, window and causal.
template <class Args, class Problem>
void set_scores(const char* op, const Args& args, Problem& p) {
  check_softmax(op, args.softmax_scale, args.softcap);
  p.softmax_scale = args.softmax_scale != 0 ? args.softmax_scale
                                            : 1.0f / std::sqrt(static_cast<float>(p.head_dim));
  p.softcap = args.softcap;
  if (args.has_window != 0) {  // no sequence is longer
    p.window_left = std::min<int64_t>(args.window_left, INT32_MAX);
    p.window_right = std::min<int64_t>(args.window_right, INT32_MAX);
  }
  if (args.causal != 0) p.window_right = 0;
}

template <class Problem>
void set_alibi_slopes(const char* op, const NamedTensor& slopes, Problem& p) {
  const TensorView& t = *slopes.view;
  if (!is_present(t)) return;
  check_well_formed(op, slopes);
  check_dtype(op, slopes, {DType::kFloat32});
  const bool fits =
      (t.rank == 1 || (t.rank == 2 && t.sizes[0] == p.batch)) && t.sizes[t.rank - 1] == p.num_heads;
  if (!fits) wrong_shape(op, slopes, "(num_heads,) or (batch, num_heads)");
  p.alibi_slopes = static_cast<const float*>(t.data);
  p.stride_ab = t.rank == 2 ? t.strides[0] : 0;
  p.stride_ah = t.strides[t.rank - 1];
}

// (batch, num_heads, rows), or (num_heads, rows) where sequences are packed; no overlap with
// `others`.
template <class Problem>
void set_lse(const char* op, const NamedTensor& lse, bool is_packed, int64_t rows,
             std::initializer_list<NamedTensor> others, Problem& p) {
  const TensorView& t = *lse.view;
  if (!is_present(t)) return;
  check_well_formed(op, lse);
  check_dtype(op, lse, {DType::kFloat32});
  const int rank = is_packed ? 2 : 3;
  const bool fits = t.rank == rank && (is_packed || t.sizes[0] == p.batch) &&
                    t.sizes[rank - 2] == p.num_heads && t.sizes[rank - 1] == rows;
  if (!fits) {
    wrong_shape(op, lse, is_packed ? "(num_heads, total_q)" : "(batch, num_heads, seqlen_q)");
  }
  check_output(op, lse, others);
  p.lse = static_cast<float*>(t.data);
  p.stride_lb = is_packed ? 0 : t.strides[0];
  p.stride_lh = t.strides[rank - 2], p.stride_lq = t.strides[rank - 1];
}

}  // namespace fastq
