// Where the keys and values of a sequence and head lie in a cache, and what they are as floats.
//
// Compiled once per instruction set (see float_rows.hpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "core/problem.hpp"
#include "cpu/flash_attention/flash_attention_softmax.hpp"
#include "cpu/float_rows.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastq::cpu {
namespace {

// What a vector of floats is loaded from.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline Vec load_as_floats(const float* from) { return load(from); }

#if defined(__AVX512F__)

inline Vec load_as_floats(const int8_t* from) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)));
}
inline Vec load_as_floats(const BFloat16* from) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline Vec load_as_floats(const Float16* from) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(v));
}

#elif defined(__AVX2__)

inline Vec load_as_floats(const int8_t* from) {
  const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)));
}
inline Vec load_as_floats(const BFloat16* from) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
inline Vec load_as_floats(const Float16* from) {
  return reinterpret_cast<Vec>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

#else

inline Vec load_as_floats(const int8_t* from) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(from[i]);
  return v;
}
inline Vec load_as_floats(const BFloat16* from) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = bfloat16_to_float(from[i].bits);
  return v;
}
inline Vec load_as_floats(const Float16* from) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = float16_to_float(from[i].bits);
  return v;
}

#endif

// The rows of a sequence and head.
class CacheRows {
 public:
  CacheRows(const KvCache& cache, int64_t batch, int64_t head, int64_t head_dim)
      : cache_(cache), batch_(batch), head_(head), head_dim_(head_dim) {
    if (cache.page_size > 0) {
      shift_ = __builtin_ctz(static_cast<unsigned>(cache.page_size));
      table_ = cache.block_table + batch * cache.stride_table;
    }
  }

  template <class T>
  const T* address(const AttentionTensor& t, int64_t token) const {
    return static_cast<const T*>(t.data) + offset(t, token);
  }

  void load(const AttentionTensor& t, int64_t token, float* to) const {
    if (cache_.dtype == DType::kInt8) {
      const int8_t* const from = address<int8_t>(t, token);
      for (int64_t d = 0; d < head_dim_; ++d) to[d] = static_cast<float>(from[d]);
    } else {
      load_floats(t.data, cache_.dtype, offset(t, token), 1, head_dim_, to);
    }
  }

  void scales(const CacheScales& s, int64_t first, int64_t count, float* to) const {
    for (int64_t i = 0; i < count; ++i) to[i] = s.data[offset(s, first + i)];
  }

  // Asks for rows before they are wanted: they may lie far apart, where the processor does not look
  // ahead by itself.
  void prefetch(const AttentionTensor& t, int64_t first, int64_t count) const {
    const int64_t size = element_size(cache_.dtype), bytes = head_dim_ * size;
    for (int64_t i = 0; i < count; ++i) {
      const char* const from = static_cast<const char*>(t.data) + offset(t, first + i) * size;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
    }
  }

 private:
  template <class Strides>
  int64_t offset(const Strides& t, int64_t token) const {
    int64_t batch = batch_;
    if (table_ != nullptr) {
      batch = table_[token >> shift_];
      token &= (int64_t{1} << shift_) - 1;
    }
    return batch * t.stride_batch + token * t.stride_seqlen + head_ * t.stride_head;
  }

  const KvCache& cache_;
  const int64_t batch_, head_, head_dim_;
  int shift_ = 0;  // of a token, to its page's place in the table
  const int32_t* table_ = nullptr;
};

}  // namespace
}  // namespace fastq::cpu
