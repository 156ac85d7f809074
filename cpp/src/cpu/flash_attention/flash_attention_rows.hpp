// Attention of some rows (queries of the heads that share a key head) to the keys of a sequence:
//
//   s[j,r] = mask(softcap(softmax_scale * sum_d k[j,d] q[r,d]) - slope |p(r) - j|)
//   out[r,d] = sum_j v[j,d] exp(s[j,r] - m[r]) / l[r],   l[r] = sum_j exp(s[j,r] - m[r])
//
// FlashAttention-2's forward pass (flash_attention_panels.hpp) to the keys of a sequence.
#pragma once

#include <cstdint>

#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/flash_attention/flash_attention_panels.hpp"
#include "cpu/flash_attention/flash_attention_softmax.hpp"
#include "cpu/float_rows.hpp"

namespace fastq::cpu {
namespace {

struct SequenceKeys {
  static constexpr bool kScaled = false;
  const FlashAttentionProblem& p;
  const AttentionTask& task;

  void load(int64_t first, int64_t count, float* k, float* v) const {
    gather(p.k, task.k, first, count, k);
    gather(p.v, task.v, first, count, v);
  }
  void prefetch(int64_t first, int64_t count) const {
    prefetch_rows(p.k, p.dtype, task.k + first * p.k.stride_seqlen, count, p.head_dim);
    prefetch_rows(p.v, p.dtype, task.v + first * p.v.stride_seqlen, count, p.head_dim);
  }

 private:
  // Side by side: rows a large power of two apart would fight for the same lines of the cache.
  void gather(const AttentionTensor& t, int64_t begin, int64_t first, int64_t count,
              float* space) const {
    for (int64_t key = 0; key < count; ++key) {
      load_floats(t.data, p.dtype, begin + (first + key) * t.stride_seqlen, 1, p.head_dim,
                  space + key * p.head_dim);
    }
  }
};

void attend_rows(const FlashAttentionProblem& p, const AttentionTask& task, float* scratch) {
  Rows rows[kPanels];
  float* ot = nullptr;
  const int panels = attend_panels(p, task, SequenceKeys{p, task}, scratch, rows, ot);
  for (int panel = 0; panel < panels; ++panel) {
    store_rows(p, task, task.first_row + panel * kRows, rows[panel],
               ot + panel * p.head_dim * kRows);
  }
}

}  // namespace
}  // namespace fastq::cpu
