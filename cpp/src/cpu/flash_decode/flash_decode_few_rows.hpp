// Attention of a few rows, fewer than there are lanes: head_dim lies along the vector's lanes, and
// each score is a dot product. A key or value is read once for all rows, which is all that matters
// where a sequence has one query.
//
//   s   (rows, keys of a block)   scores, then exp(s - m), times v's scale
//   o   (rows, head_dim)          out before its division by l
//
// head_dim is padded with zeros to a multiple of the lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/flash_attention/flash_attention_softmax.hpp"
#include "cpu/flash_decode/flash_decode_kernels.hpp"
#include "cpu/flash_decode/flash_decode_keys.hpp"

namespace fastq::cpu {
namespace {

constexpr int kFewRows = kRows / 2;                // more are faster along the lanes
constexpr int kRowTile = kLanes == 16 ? 4 : 2;     // rows that share a key in registers
constexpr int kKeyTile = 4;                        // keys whose dot products run side by side
constexpr int kValueTile = kLanes == 16 ? 16 : 8;  // vectors of sums

// What belongs to a row.
struct FewRow {
  float max, sum;
  int64_t first_key, last_key, position;
  float slope;
};

template <int kStride, size_t... kLane>
inline Vec with_neighbour(const Vec& v, std::index_sequence<kLane...>) {
  return v + Vec{v[kLane ^ kStride]...};
}

template <int kStride = kLanes / 2>
inline float sum_of_lanes(const Vec& v) {
  const Vec sum = with_neighbour<kStride>(v, std::make_index_sequence<kLanes>{});
  if constexpr (kStride > 1) {
    return sum_of_lanes<kStride / 2>(sum);
  } else {
    return sum[0];
  }
}

// s[r * kAttentionKeys + key] = sum_d q[r * padded + d] k[key][d]
template <int kRowCount, int kKeys>
inline void dot_tile(const float* q, const float* const* k, int64_t padded, float* s) {
  Vec acc[kKeys][kRowCount] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    Vec row[kRowCount];
    for (int r = 0; r < kRowCount; ++r) row[r] = load(q + r * padded + d);
    for (int key = 0; key < kKeys; ++key) {
      const Vec number = load(k[key] + d);
      for (int r = 0; r < kRowCount; ++r) acc[key][r] += number * row[r];
    }
  }
  for (int r = 0; r < kRowCount; ++r) {
    for (int key = 0; key < kKeys; ++key) s[r * kAttentionKeys + key] = sum_of_lanes(acc[key][r]);
  }
}

template <int kRowCount>
inline void dot_rows(const float* q, const float* const* k, int64_t keys, int64_t padded,
                     float* s) {
  int64_t key = 0;
  for (; key + kKeyTile <= keys; key += kKeyTile) {
    dot_tile<kRowCount, kKeyTile>(q, k + key, padded, s + key);
  }
  for (; key < keys; ++key) dot_tile<kRowCount, 1>(q, k + key, padded, s + key);
}

// o[r * padded + d] += sum_key s[r * kAttentionKeys + key] v[key][d], for kCount vectors of d.
template <int kRowCount, int kCount>
inline void add_values_tile(const float* s, const float* const* v, int64_t keys, int64_t padded,
                            int64_t d, float* o) {
  Vec acc[kRowCount][kCount];
  for (int r = 0; r < kRowCount; ++r) {
    for (int j = 0; j < kCount; ++j) acc[r][j] = load(o + r * padded + d + j * kLanes);
  }
  for (int64_t key = 0; key < keys; ++key) {
    const float* const from = v[key] + d;
    for (int j = 0; j < kCount; ++j) {
      const Vec number = load(from + j * kLanes);
      for (int r = 0; r < kRowCount; ++r) acc[r][j] += s[r * kAttentionKeys + key] * number;
    }
  }
  for (int r = 0; r < kRowCount; ++r) {
    for (int j = 0; j < kCount; ++j) store(o + r * padded + d + j * kLanes, acc[r][j]);
  }
}

template <int kRowCount>
inline void add_values(const float* s, const float* const* v, int64_t keys, int64_t padded,
                       float* o) {
  constexpr int kMost = std::min(kValueTile / kRowCount, 8);
  int64_t d = 0;
  for (; d + kMost * kLanes <= padded; d += kMost * kLanes) {
    add_values_tile<kRowCount, kMost>(s, v, keys, padded, d, o);
  }
  for (; d < padded; d += kLanes) add_values_tile<kRowCount, 1>(s, v, keys, padded, d, o);
}

// From the products q . k of a block to exp(s - m), times v's scale; 0 where the row does not
// attend to the key, or there is none. m, l and o move on with them.
template <bool kScaled>
inline void softmax_few(const FlashDecodeProblem& p, FewRow& row, int64_t first_key, int64_t keys,
                        const float* k_scale, const float* v_scale, int64_t padded, float* s,
                        float* o) {
  constexpr int kBlock = kAttentionKeys / kLanes;
  const Vec nothing = Vec{} - kInfinity;
  IntVec lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const auto begin = static_cast<int32_t>(std::max(row.first_key - first_key, int64_t{0}));
  const auto end = static_cast<int32_t>(std::min(row.last_key - first_key, keys));
  if (begin >= end) {
    std::fill_n(s, kAttentionKeys, 0.0f);
    return;
  }
  const auto position = static_cast<int32_t>(row.position - first_key);
  Vec top = nothing, scores[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    const IntVec at = lane + j * kLanes;
    Vec t = load(s + j * kLanes);
    if constexpr (kScaled) t *= load(k_scale + j * kLanes);
    t *= p.softmax_scale;
    if (p.softcap > 0) t = p.softcap * tanh_of(t / p.softcap);
    if (p.alibi_slopes != nullptr) {
      const IntVec distance = position - at;
      t -= row.slope * __builtin_convertvector(distance < 0 ? -distance : distance, Vec);
    }
    scores[j] = (at >= begin) & (at < end) ? t : nothing;
    top = scores[j] > top ? scores[j] : top;
  }
  float max = row.max;
  for (int i = 0; i < kLanes; ++i) max = top[i] > max ? top[i] : max;
  Vec sum = {};
  for (int j = 0; j < kBlock; ++j) {
    const IntVec at = lane + j * kLanes;
    const IntVec attends = (at >= begin) & (at < end);
    Vec e = exp_negative(scores[j] - max);
    sum += attends ? e : Vec{};
    if constexpr (kScaled) e *= load(v_scale + j * kLanes);
    store(s + j * kLanes, attends ? e : Vec{});
  }
  if (max != row.max) {
    const Vec old = Vec{} + row.max;
    const Vec scale = old == nothing ? Vec{} : exp_negative(old - max);
    row.sum *= scale[0];
    for (int64_t d = 0; d < padded; d += kLanes) store(o + d, load(o + d) * scale);
    row.max = max;
  }
  row.sum += sum_of_lanes(sum);
}

inline FewRow few_row(const FlashDecodeProblem& p, const AttentionTask& task, int64_t row) {
  const int64_t group = p.num_heads / p.num_heads_k;
  FewRow its{-kInfinity, 0, task.first_key, task.last_key, 0, 0};
  its.position = row / group + task.seqlen_k - task.seqlen_q;
  if (p.window_left >= 0) its.first_key = std::max(its.position - p.window_left, its.first_key);
  if (p.window_right >= 0) its.last_key = std::min(its.position + p.window_right + 1, its.last_key);
  if (p.alibi_slopes != nullptr) {
    const int64_t head = task.head_k * group + row % group;
    its.slope = p.alibi_slopes[task.batch * p.stride_ab + head * p.stride_ah];
  }
  return its;
}

// Calls tile(rows of the tile as a constant, first row) for all rows.
template <class Tile>
inline void for_each_row_tile(int rows, const Tile& tile) {
  int row = 0;
  for (; row + kRowTile <= rows; row += kRowTile) {
    tile(std::integral_constant<int, kRowTile>{}, row);
  }
  for (; row < rows; ++row) tile(std::integral_constant<int, 1>{}, row);
}

template <bool kScaled>
inline void attend_few_rows(const FlashDecodeProblem& p, const AttentionTask& task, float* parts,
                            float* scratch) {
  const int64_t D = p.head_dim, padded = (D + kLanes - 1) / kLanes * kLanes;
  const int rows = static_cast<int>(task.last_row - task.first_row);
  float* const q = scratch;
  float* const o = q + kFewRows * padded;
  float* const s = o + kFewRows * padded;
  float* const k_space = s + kFewRows * kAttentionKeys;
  float* const v_space = k_space + kAttentionKeys * padded;
  std::fill_n(scratch, 2 * kFewRows * padded, 0.0f);
  const bool in_place = p.cache.dtype == DType::kFloat32 && padded == D;
  if (!in_place) std::fill_n(k_space, 2 * kAttentionKeys * padded, 0.0f);
  const CacheRows cache(p.cache, task, D);
  const int64_t group = p.num_heads / p.num_heads_k;
  FewRow its[kFewRows];
  int64_t begin = task.last_key, end = task.first_key;
  for (int r = 0; r < rows; ++r) {
    const int64_t row = task.first_row + r;
    its[r] = few_row(p, task, row);
    if (its[r].first_key < its[r].last_key) {
      begin = std::min(begin, its[r].first_key), end = std::max(end, its[r].last_key);
    }
    const int64_t at = task.q + row / group * p.q.stride_seqlen + row % group * p.q.stride_head;
    load_floats(p.q.data, p.dtype, at, 1, D, q + r * padded);
  }
  alignas(64) float k_scale[kAttentionKeys] = {}, v_scale[kAttentionKeys] = {};
  const float *k[kAttentionKeys], *v[kAttentionKeys];
  for (int64_t key = begin; key < end; key += kAttentionKeys) {
    const int64_t keys = std::min<int64_t>(kAttentionKeys, end - key);
    const int64_t next = key + keys, more = std::min<int64_t>(kAttentionKeys, end - next);
    for (int64_t i = 0; i < keys; ++i) {
      k[i] = cache.row(p.cache.k, key + i, in_place, k_space + i * padded);
      v[i] = cache.row(p.cache.v, key + i, in_place, v_space + i * padded);
    }
    if constexpr (kScaled) {
      cache.scales(p.cache.k_scale, key, keys, k_scale);
      cache.scales(p.cache.v_scale, key, keys, v_scale);
    }
    cache.prefetch(p.cache.k, next, more);
    cache.prefetch(p.cache.v, next, more);
    for_each_row_tile(rows, [&](auto count, int r) {
      dot_rows<count()>(q + r * padded, k, keys, padded, s + r * kAttentionKeys);
    });
    for (int r = 0; r < rows; ++r) {
      softmax_few<kScaled>(p, its[r], key, keys, k_scale, v_scale, padded, s + r * kAttentionKeys,
                           o + r * padded);
    }
    for_each_row_tile(rows, [&](auto count, int r) {
      add_values<count()>(s + r * kAttentionKeys, v, keys, padded, o + r * padded);
    });
  }
  for (int r = 0; r < rows; ++r) {
    float* const part = parts + r * part_size(D);
    part[0] = its[r].max, part[1] = its[r].sum;
    std::copy_n(o + r * padded, D, part + 2);
  }
}

}  // namespace
}  // namespace fastq::cpu
