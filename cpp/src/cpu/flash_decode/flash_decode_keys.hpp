// Where the keys and values of a sequence and head lie in a cache, and what they are as floats.
//
// Compiled once per instruction set (see float_rows.hpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/problem.hpp"
#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/float_rows.hpp"

namespace fastq::cpu {
namespace {

class CacheRows {
 public:
  CacheRows(const KvCache& cache, const AttentionTask& task, int64_t head_dim)
      : cache_(cache), task_(task), head_dim_(head_dim), size_(element_size(cache.dtype)) {}

  // A row as floats: where it lies, if it can be read there, else in `space`.
  const float* row(const AttentionTensor& t, int64_t token, bool in_place, float* space) const {
    const int64_t at = offset(t, token);
    if (in_place) return static_cast<const float*>(t.data) + at;
    if (cache_.dtype == DType::kInt8) {
      const int8_t* const from = static_cast<const int8_t*>(t.data) + at;
      for (int64_t d = 0; d < head_dim_; ++d) space[d] = static_cast<float>(from[d]);
    } else {
      load_floats(t.data, cache_.dtype, at, 1, head_dim_, space);
    }
    return space;
  }

  void scales(const CacheScales& s, int64_t first, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; ++i) to[i] = s.data[offset(s, first + i)];
  }

  // Asks for rows before they are wanted: they may lie far apart, where the processor does not look
  // ahead by itself.
  void prefetch(const AttentionTensor& t, int64_t first, int64_t count) const {
    const int64_t bytes = head_dim_ * size_;
    for (int64_t i = 0; i < count; ++i) {
      const char* const from = static_cast<const char*>(t.data) + offset(t, first + i) * size_;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }

 private:
  template <class Strides>
  int64_t offset(const Strides& t, int64_t token) const {
    int64_t batch = task_.batch;
    if (cache_.page_size > 0) {
      const auto size = static_cast<uint32_t>(cache_.page_size), at = static_cast<uint32_t>(token);
      batch = cache_.block_table[task_.batch * cache_.stride_table + at / size];
      token = at % size;
    }
    return batch * t.stride_batch + token * t.stride_seqlen + task_.head_k * t.stride_head;
  }

  const KvCache& cache_;
  const AttentionTask& task_;
  const int64_t head_dim_, size_;
};

}  // namespace
}  // namespace fastq::cpu
