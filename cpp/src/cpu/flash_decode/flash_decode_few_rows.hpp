// Attention of a few rows, fewer than there are lanes: head_dim lies along the vector's lanes, and
// each score is a dot product. Keys and values are read from the cache as they are; that is all
// that matters where a sequence has one query.
//
//   s   (rows, keys of a block)   scores, then exp(s - m), times v's scale
//   o   (rows, head_dim)          out before its division by l
//
// Where head_dim is no multiple of the lanes, it is padded with zeros, and keys and values are
// first copied as floats.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/flash_attention/flash_attention_softmax.hpp"
#include "cpu/flash_decode/flash_decode_kernels.hpp"
#include "cpu/flash_decode/flash_decode_keys.hpp"

namespace fastq::cpu {
namespace {

constexpr int kFewRows = kRows / 2;                // of a head; more are faster along the lanes
constexpr int kMostFewRows = kAttentionRows;       // of all heads of a task
constexpr int kRowTile = kLanes == 16 ? 4 : 2;     // rows that share a key in registers
constexpr int kKeysOfHeads = 16;                   // of one head, before those of the next
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
template <int kRowCount, int kKeys, class T>
inline void dot_tile(const float* q, const T* const* k, int64_t padded, float* s) {
  Vec acc[kKeys][kRowCount] = {};
  for (int64_t d = 0; d < padded; d += kLanes) {
    Vec row[kRowCount];
    for (int r = 0; r < kRowCount; ++r) row[r] = load(q + r * padded + d);
    for (int key = 0; key < kKeys; ++key) {
      const Vec number = load_as_floats(k[key] + d);
      for (int r = 0; r < kRowCount; ++r) acc[key][r] += number * row[r];
    }
  }
  for (int r = 0; r < kRowCount; ++r) {
    for (int key = 0; key < kKeys; ++key) s[r * kAttentionKeys + key] = sum_of_lanes(acc[key][r]);
  }
}

template <int kRowCount, class T>
inline void dot_rows(const float* q, const T* const* k, int64_t keys, int64_t padded, float* s) {
  int64_t key = 0;
  for (; key + kKeyTile <= keys; key += kKeyTile) {
    dot_tile<kRowCount, kKeyTile>(q, k + key, padded, s + key);
  }
  for (; key < keys; ++key) dot_tile<kRowCount, 1>(q, k + key, padded, s + key);
}

// o[r * padded + d] += sum_key s[r * kAttentionKeys + key] v[key][d], for kCount vectors of d.
template <int kRowCount, int kCount, class T>
inline void add_values_tile(const float* s, const T* const* v, int64_t keys, int64_t padded,
                            int64_t d, float* o) {
  Vec acc[kRowCount][kCount];
  for (int r = 0; r < kRowCount; ++r) {
    for (int j = 0; j < kCount; ++j) acc[r][j] = load(o + r * padded + d + j * kLanes);
  }
  for (int64_t key = 0; key < keys; ++key) {
    const T* const from = v[key] + d;
    for (int j = 0; j < kCount; ++j) {
      const Vec number = load_as_floats(from + j * kLanes);
      for (int r = 0; r < kRowCount; ++r) acc[r][j] += s[r * kAttentionKeys + key] * number;
    }
  }
  for (int r = 0; r < kRowCount; ++r) {
    for (int j = 0; j < kCount; ++j) store(o + r * padded + d + j * kLanes, acc[r][j]);
  }
}

template <int kRowCount, class T>
inline void add_values(const float* s, const T* const* v, int64_t keys, int64_t padded, float* o) {
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
    scores[j] = ((at >= begin) & (at < end)) ? t : nothing;
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

inline FewRow few_row(const FlashDecodeProblem& p, const AttentionTask& task, int64_t head_k,
                      int64_t row) {
  const int64_t group = p.num_heads / p.num_heads_k;
  FewRow its{-kInfinity, 0, task.first_key, task.last_key, 0, 0};
  its.position = row / group + task.seqlen_k - task.seqlen_q;
  if (p.window_left >= 0) its.first_key = std::max(its.position - p.window_left, its.first_key);
  if (p.window_right >= 0) its.last_key = std::min(its.position + p.window_right + 1, its.last_key);
  if (p.alibi_slopes != nullptr) {
    const int64_t head = head_k * group + row % group;
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

// The rows of a task, `rows` of each of its heads, and all that belongs to them.
struct FewRows {
  int rows;
  int64_t padded;
  float *q, *o, *s;
  float* space;  // for keys or values of one head as floats
  FewRow its[kMostFewRows];
};

// Where keys or values lie, or copies of them as floats.
template <class T, bool kCopied>
struct FewKeys {
  using Element = std::conditional_t<kCopied, float, T>;
  const Element* at[kAttentionKeys];

  FewKeys(const CacheRows& cache, const AttentionTensor& t, int64_t first, int64_t count,
          const FewRows& all) {
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kCopied) {
        cache.load(t, first + i, all.space + i * all.padded);
        at[i] = all.space + i * all.padded;
      } else {
        at[i] = cache.address<T>(t, first + i);
      }
    }
  }
};

// A block of keys for all heads of a task. A token's heads lie side by side, so a few keys are read
// for each head in turn; of a single head all of them at once.
template <class T, bool kCopied>
inline void attend_few_keys(const FlashDecodeProblem& p, const AttentionTask& task, int64_t heads,
                            int64_t key, int64_t keys, int64_t end, FewRows& all) {
  constexpr bool kScaled = std::is_same_v<T, int8_t>;
  const int64_t step = heads > 1 ? kKeysOfHeads : kAttentionKeys;
  const auto for_each_run = [&](const AttentionTensor& t, const auto& run) {
    for (int64_t at = 0; at < keys; at += step) {
      const int64_t count = std::min(step, keys - at), next = key + at + step;
      for (int64_t h = 0; h < heads; ++h) {
        const CacheRows cache(p.cache, task.batch, task.head_k + h, p.head_dim);
        cache.prefetch(t, next, std::min(step, end - next));
        run(FewKeys<T, kCopied>(cache, t, key + at, count, all).at, at, count, h * all.rows);
      }
    }
  };
  for_each_run(p.cache.k, [&](const auto* k, int64_t at, int64_t count, int64_t first) {
    for_each_row_tile(all.rows, [&](auto tile, int r) {
      dot_rows<tile()>(all.q + (first + r) * all.padded, k, count, all.padded,
                       all.s + (first + r) * kAttentionKeys + at);
    });
  });
  // Past the last key they are 0 or what they were: no row attends to it.
  alignas(64) float k_scale[kAttentionKeys] = {}, v_scale[kAttentionKeys] = {};
  for (int64_t h = 0; h < heads; ++h) {
    if constexpr (kScaled) {
      const CacheRows cache(p.cache, task.batch, task.head_k + h, p.head_dim);
      cache.scales(p.cache.k_scale, key, keys, k_scale);
      cache.scales(p.cache.v_scale, key, keys, v_scale);
    }
    for (int64_t r = h * all.rows; r < (h + 1) * all.rows; ++r) {
      softmax_few<kScaled>(p, all.its[r], key, keys, k_scale, v_scale, all.padded,
                           all.s + r * kAttentionKeys, all.o + r * all.padded);
    }
  }
  for_each_run(p.cache.v, [&](const auto* v, int64_t at, int64_t count, int64_t first) {
    for_each_row_tile(all.rows, [&](auto tile, int r) {
      add_values<tile()>(all.s + (first + r) * kAttentionKeys + at, v, count, all.padded,
                         all.o + (first + r) * all.padded);
    });
  });
}

// Fetches the queries, and says which keys [begin, end) any of them attends to.
inline void begin_few_rows(const FlashDecodeProblem& p, const AttentionTask& task, int64_t heads,
                           FewRows& all, int64_t& begin, int64_t& end) {
  const int64_t group = p.num_heads / p.num_heads_k;
  begin = task.last_key, end = task.first_key;
  for (int64_t h = 0; h < heads; ++h) {
    for (int r = 0; r < all.rows; ++r) {
      const int64_t row = task.first_row + r, head = h * group + row % group;
      FewRow& its = all.its[h * all.rows + r];
      its = few_row(p, task, task.head_k + h, row);
      if (its.first_key < its.last_key) {
        begin = std::min(begin, its.first_key), end = std::max(end, its.last_key);
      }
      const int64_t at = task.q + row / group * p.q.stride_seqlen + head * p.q.stride_head;
      load_floats(p.q.data, p.dtype, at, 1, p.head_dim, all.q + (h * all.rows + r) * all.padded);
    }
  }
}

template <class T, bool kCopied>
inline void attend_few_rows(const FlashDecodeProblem& p, const AttentionTask& task, int64_t heads,
                            float* parts, float* scratch) {
  const int64_t D = p.head_dim;
  FewRows all;
  all.rows = static_cast<int>(task.last_row - task.first_row);
  all.padded = (D + kLanes - 1) / kLanes * kLanes;
  const int64_t count = heads * all.rows;
  all.q = scratch, all.o = all.q + count * all.padded, all.s = all.o + count * all.padded;
  all.space = all.s + count * kAttentionKeys;
  std::fill_n(all.q, 2 * count * all.padded, 0.0f);
  if (kCopied) std::fill_n(all.space, kAttentionKeys * all.padded, 0.0f);
  int64_t begin, end;
  begin_few_rows(p, task, heads, all, begin, end);
  for (int64_t key = begin; key < end; key += kAttentionKeys) {
    const int64_t keys = std::min<int64_t>(kAttentionKeys, end - key);
    attend_few_keys<T, kCopied>(p, task, heads, key, keys, end, all);
  }
  for (int64_t r = 0; r < count; ++r) {
    float* const part = parts + r * part_size(D);
    part[0] = all.its[r].max, part[1] = all.its[r].sum;
    std::copy_n(all.o + r * all.padded, D, part + 2);
  }
}

template <class T>
inline void attend_few_rows_of(const FlashDecodeProblem& p, const AttentionTask& task,
                               int64_t heads, float* parts, float* scratch) {
  const bool copied = p.head_dim % kLanes != 0;
  (copied ? attend_few_rows<T, true> : attend_few_rows<T, false>)(p, task, heads, parts, scratch);
}

}  // namespace
}  // namespace fastq::cpu
