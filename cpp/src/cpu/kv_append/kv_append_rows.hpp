// Rows of new keys and values, the keys rotated, into a cache; and rotated queries.
//
//   (x, y) -> (x cos - y sin, y cos + x sin)   each product and sum rounded to float32
//
// Compiled once per instruction set (see float_rows.hpp), without fused multiply-adds: every
// instruction set gives the same bits.
//
// Source: RoFormer (Su et al., 2021); pairs of neighbours are its own, pairs of halves are those of
// GPT-NeoX.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/problem.hpp"
#include "cpu/float_rows.hpp"
#include "cpu/quantize/quantize_run.hpp"

namespace fastq::cpu {
namespace {

// cos and sin of a token's position, rotary_dim / 2 of each.
struct Angles {
  float cos[kMaxHeadDim / 2], sin[kMaxHeadDim / 2];

  Angles(const KvAppendProblem& p, int64_t token) {
    const auto load = [&](const MatrixView& m, float* to) {
      load_floats(m.data, m.dtype, token * m.stride_m, m.stride_n, p.rotary_dim / 2, to);
    };
    if (p.rotary_dim == 0) return;
    load(p.rotary_cos, cos);
    load(p.rotary_sin, sin);
  }
};

inline void rotate_pairs(const KvAppendProblem& p, const Angles& angles, float* row) {
  const int64_t half = p.rotary_dim / 2;
  const int64_t step = p.rotary_interleaved ? 2 : 1, partner = p.rotary_interleaved ? 1 : half;
  float x[kMaxHeadDim / 2], y[kMaxHeadDim / 2];
  for (int64_t i = 0; i < half; ++i) x[i] = row[step * i], y[i] = row[step * i + partner];
  for (int64_t i = 0; i < half; ++i) {
    row[step * i] = x[i] * angles.cos[i] - y[i] * angles.sin[i];
    row[step * i + partner] = y[i] * angles.cos[i] + x[i] * angles.sin[i];
  }
}

inline void copy_row(const AttentionTensor& from, int64_t at, const AttentionTensor& to,
                     int64_t to_at, DType dtype, int64_t count) {
  const int64_t size = element_size(dtype);
  std::memmove(static_cast<char*>(to.data) + to_at * size,
               static_cast<const char*>(from.data) + at * size, count * size);
}

inline void quantize_row(const float* row, int64_t count, int8_t* q, float& scale) {
  const uint32_t absmax = max_magnitude(row, count, 0);
  scale = scale_of(absmax);
  if (absmax < 0x7f800000u) {
    round_to_int8(row, count, scale, q);
  } else {
    std::memset(q, 0, static_cast<size_t>(count));
  }
}

// The rows of one token's heads into the cache; `place` is its page, or its sequence, and its row
// there.
struct Place {
  int64_t batch, row;
};

inline void append_heads(const KvAppendProblem& p, const AttentionTensor& from, int64_t begin,
                         const Angles* angles, const AttentionTensor& to, const CacheScales& scales,
                         const Place& place) {
  float row[kMaxHeadDim];
  for (int64_t head = 0; head < p.num_heads_k; ++head) {
    const int64_t at = begin + head * from.stride_head;
    const int64_t to_at =
        place.batch * to.stride_batch + place.row * to.stride_seqlen + head * to.stride_head;
    const bool is_int8 = p.cache.dtype == DType::kInt8;
    if (!is_int8 && angles == nullptr) {
      copy_row(from, at, to, to_at, p.dtype, p.head_dim);
      continue;
    }
    load_floats(from.data, p.dtype, at, 1, p.head_dim, row);
    if (angles != nullptr) rotate_pairs(p, *angles, row);
    if (is_int8) {
      quantize_row(row, p.head_dim, static_cast<int8_t*>(to.data) + to_at,
                   scales.data[place.batch * scales.stride_batch +
                               place.row * scales.stride_seqlen + head * scales.stride_head]);
    } else {
      store_floats(row, p.head_dim, to.data, p.dtype, to_at, 1);
    }
  }
}

inline void rotate_queries(const KvAppendProblem& p, int64_t batch, int64_t i,
                           const Angles* angles) {
  float row[kMaxHeadDim];
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const auto offset = [&](const AttentionTensor& t) {
      return batch * t.stride_batch + i * t.stride_seqlen + head * t.stride_head;
    };
    if (angles == nullptr) {
      copy_row(p.q, offset(p.q), p.out, offset(p.out), p.dtype, p.head_dim);
      continue;
    }
    load_floats(p.q.data, p.dtype, offset(p.q), 1, p.head_dim, row);
    rotate_pairs(p, *angles, row);
    store_floats(row, p.head_dim, p.out.data, p.dtype, offset(p.out), 1);
  }
}

void append_rows(const KvAppendProblem& p, int64_t first, int64_t last) {
  const KvCache& cache = p.cache;
  for (int64_t r = first; r < last; ++r) {
    const int64_t batch = r / p.seqlen_new, i = r % p.seqlen_new;
    const int64_t token = cache.seqlens[batch * cache.stride_seqlens] - p.seqlen_new + i;
    if (token < 0) {  // padding: its query stays as it is
      rotate_queries(p, batch, i, nullptr);
      continue;
    }
    const Angles angles(p, token);
    const Angles* const rotation = p.rotary_dim > 0 ? &angles : nullptr;
    rotate_queries(p, batch, i, rotation);
    Place place{batch, token};
    if (cache.page_size > 0) {
      place.batch = cache.block_table[batch * cache.stride_table + token / cache.page_size];
      place.row = token % cache.page_size;
    }
    const auto begin = [&](const AttentionTensor& t) {
      return batch * t.stride_batch + i * t.stride_seqlen;
    };
    append_heads(p, p.k, begin(p.k), rotation, cache.k, cache.k_scale, place);
    append_heads(p, p.v, begin(p.v), nullptr, cache.v, cache.v_scale, place);
  }
}

}  // namespace
}  // namespace fastq::cpu
