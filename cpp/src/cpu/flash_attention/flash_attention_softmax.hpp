// The rows of FlashAttention's forward pass on the CPU, flash_decode's too: which keys each attends
// to, the running maximum m and sum l of its softmax, and its output.
//
// Scores are transposed, (keys, kRows): rows lie along the vector's lanes, so that the softmax is
// one lane's own affair. kRows rows are a panel.
//
//   st   (keys, kRows)      scores, then exp(s - m)
//   ot   (head_dim, kRows)  out before its division by l
//
// Included by files that are compiled once per instruction set, so everything here has internal
// linkage: the linker must not hand a function compiled for AVX-512 to a caller compiled without.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/float_rows.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastq::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 2;
constexpr int kRows = kVectors * kLanes;
static_assert(kAttentionRows % kRows == 0);

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline void store(float* to, const Vec& v) { std::memcpy(to, &v, sizeof(v)); }

// What belongs to the rows of a panel.
struct Rows {
  Vec max[kVectors], sum[kVectors];
  IntVec first_key[kVectors], last_key[kVectors];  // that a row attends to
  IntVec position[kVectors];                       // of its query among the keys
  Vec slope[kVectors];                             // of ALiBi
  int64_t least_first, most_first, least_last, most_last;
};

// Asks for the rows of keys or values that come next: they may lie pages apart, where the processor
// does not look ahead by itself.
inline void prefetch_rows(const AttentionTensor& t, DType dtype, int64_t first, int64_t count,
                          int64_t head_dim) {
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < count; ++i) {
    const char* row = static_cast<const char*>(t.data) + (first + i * t.stride_seqlen) * size;
    for (int64_t at = 0; at < head_dim * size; at += 64) __builtin_prefetch(row + at, 0, 2);
  }
}

// e^r for |r| <= ln 2 / 2: minimax with the first two terms fixed, relative error 3e-9.
inline Vec exp_fraction(const Vec& r) {
  Vec y = 0.0013814539415761828f * r + 0.00836874544620514f;
  y = y * r + 0.04166838899254799f;
  y = y * r + 0.1666652113199234f;
  y = y * r + 0.4999999403953552f;
  return (r * r) * y + (r + 1.0f);
}

// e^x for x <= 0 or NaN; 0 below the normal numbers. ln 2 comes in two parts, the first with few
// enough bits that n times it is exact.
inline Vec exp_negative(const Vec& x) {
  const Vec limit = Vec{} - 87.0f;
#if defined(__AVX512F__)
  // A result too small for a normal number would cost the processor some hundred cycles, so x has a
  // limit; the order of the operands lets NaN through.
  const Vec from = reinterpret_cast<Vec>(
      _mm512_max_ps(reinterpret_cast<__m512>(limit), reinterpret_cast<__m512>(x)));
  const Vec n = reinterpret_cast<Vec>(_mm512_roundscale_ps(
      reinterpret_cast<__m512>(from * 1.44269504f), _MM_FROUND_TO_NEAREST_INT));
  const Vec r = (from - n * 0.693145752f) - n * 1.42860677e-6f;
  const Vec y = reinterpret_cast<Vec>(
      _mm512_scalef_ps(reinterpret_cast<__m512>(exp_fraction(r)), reinterpret_cast<__m512>(n)));
#else
  const Vec from = x < limit ? limit : x;
  const Vec magic = Vec{} + 0x1.8p23f;  // adding it rounds to an integer
  const Vec n = (from * 1.44269504f + magic) - magic;
  const Vec r = (from - n * 0.693145752f) - n * 1.42860677e-6f;
  const IntVec bits = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof(power));
  const Vec y = exp_fraction(r) * power;
#endif
  return x < limit ? Vec{} : y;
}

inline Vec tanh_of(const Vec& x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec e = exp_negative(-2.0f * size);
  const Vec y = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -y : y;
}

inline bool all_equal(const Vec& x, const Vec& y) {
  const IntVec equal = x == y;
  int32_t all = -1;
  for (int i = 0; i < kLanes; ++i) all &= equal[i];
  return all != 0;
}

// The scores of a block's keys, from the products q . k to exp(s - m); m, l and ot move on with
// them. With kScaled keys and values have a scale each: the products are multiplied by k's, what
// st is left with by v's, where the row attends to the key.
template <bool kScaled, class Problem>
inline void softmax_block(const Problem& p, Rows& rows, int64_t first_key, int64_t keys, float* st,
                          float* ot, const float* k_scale = nullptr,
                          const float* v_scale = nullptr) {
  const bool masked = first_key < rows.most_first || first_key + keys > rows.least_last;
  for (int j = 0; j < kVectors; ++j) {
    const Vec nothing = Vec{} - kInfinity;
    const IntVec attended = rows.last_key[j] - rows.first_key[j];
    const auto attends = [&](int32_t at) {  // first_key <= at < last_key, in one comparison
      const IntVec from_first = at - rows.first_key[j];
      return reinterpret_cast<UintVec>(from_first) < reinterpret_cast<UintVec>(attended);
    };
    Vec max = rows.max[j];
    for (int64_t key = 0; key < keys; ++key) {
      Vec s = load(st + key * kRows + j * kLanes);
      if constexpr (kScaled) s *= k_scale[key];
      s *= p.softmax_scale;
      if (p.softcap > 0) s = p.softcap * tanh_of(s / p.softcap);
      const auto at = static_cast<int32_t>(first_key + key);
      if (p.alibi_slopes != nullptr) {
        const IntVec distance = rows.position[j] - at;
        s -= rows.slope[j] * __builtin_convertvector(distance < 0 ? -distance : distance, Vec);
      }
      if (masked) s = attends(at) ? s : nothing;
      max = s > max ? s : max;
      store(st + key * kRows + j * kLanes, s);
    }
    // A row that attends to none of these keys, nor did to any before: exp(-inf - 0), which is 0,
    // not exp(-inf + inf).
    const auto from = static_cast<int32_t>(first_key), to = static_cast<int32_t>(first_key + keys);
    const IntVec is_outside = (rows.last_key[j] <= from) | (rows.first_key[j] >= to);
    const Vec shift = (max == nothing) & is_outside ? Vec{} : max;
    Vec sum = {};
    for (int64_t key = 0; key < keys; ++key) {
      const Vec e = exp_negative(load(st + key * kRows + j * kLanes) - shift);
      sum += e;
      Vec weight = e;
      if constexpr (kScaled) {
        weight *= v_scale[key];  // of a key not attended to it may be NaN
        if (masked) weight = attends(static_cast<int32_t>(first_key + key)) ? weight : Vec{};
      }
      store(st + key * kRows + j * kLanes, weight);
    }
    if (!all_equal(max, rows.max[j])) {
      const Vec old = rows.max[j];
      const Vec scale = old == nothing ? Vec{} : exp_negative(old - shift);
      rows.sum[j] *= scale;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        float* const o = ot + d * kRows + j * kLanes;
        store(o, load(o) * scale);
      }
      rows.max[j] = max;
    }
    rows.sum[j] += sum;
  }
}

// Which keys the rows of a panel attend to; lanes past the last row attend to none.
template <class Problem>
inline void set_rows(const Problem& p, const AttentionTask& task, int64_t first, Rows& rows) {
  const int64_t group = p.num_heads / p.num_heads_k;
  rows.least_first = rows.least_last = task.last_key;
  rows.most_first = rows.most_last = 0;
  for (int lane = 0; lane < kRows; ++lane) {
    const int64_t row = first + lane, i = row / group;
    const int64_t position = i + task.seqlen_k - task.seqlen_q;
    int64_t begin = task.first_key, end = task.last_key;
    if (p.window_left >= 0) begin = std::max(position - p.window_left, begin);
    if (p.window_right >= 0) end = std::min(position + p.window_right + 1, end);
    if (row >= task.last_row || begin >= end) begin = end = 0;
    const int j = lane / kLanes, in = lane % kLanes;
    rows.first_key[j][in] = static_cast<int32_t>(begin);
    rows.last_key[j][in] = static_cast<int32_t>(end);
    rows.position[j][in] = static_cast<int32_t>(position);
    rows.slope[j][in] = 0;
    if (p.alibi_slopes != nullptr && row < task.last_row) {
      const int64_t head = task.head_k * group + row % group;
      rows.slope[j][in] = p.alibi_slopes[task.batch * p.stride_ab + head * p.stride_ah];
    }
    if (row >= task.last_row) continue;
    rows.most_first = std::max(rows.most_first, begin);
    rows.least_last = std::min(rows.least_last, end);
    if (begin == end) continue;
    rows.least_first = std::min(rows.least_first, begin);
    rows.most_last = std::max(rows.most_last, end);
  }
  for (int j = 0; j < kVectors; ++j) {
    rows.max[j] = Vec{} - kInfinity;
    rows.sum[j] = Vec{};
  }
}

// Writes out and lse; ot is divided by l where it lies.
inline void store_rows(const FlashAttentionProblem& p, const AttentionTask& task, int64_t first,
                       const Rows& rows, float* ot) {
  const int64_t group = p.num_heads / p.num_heads_k;
  for (int j = 0; j < kVectors; ++j) {
    const IntVec attends = rows.first_key[j] < rows.last_key[j];
    const Vec scale = attends ? 1.0f / rows.sum[j] : Vec{};
    for (int64_t d = 0; d < p.head_dim; ++d) {
      float* const o = ot + d * kRows + j * kLanes;
      store(o, load(o) * scale);
    }
  }
  float row_of[kMaxHeadDim];
  for (int lane = 0; lane < kRows && first + lane < task.last_row; ++lane) {
    const int64_t row = first + lane, i = row / group, head = row % group;
    const int j = lane / kLanes, in = lane % kLanes;
    for (int64_t d = 0; d < p.head_dim; ++d) row_of[d] = ot[d * kRows + lane];
    store_floats(row_of, p.head_dim, p.out.data, p.dtype,
                 task.out + i * p.out.stride_seqlen + head * p.out.stride_head, 1);
    if (p.lse == nullptr) continue;
    const bool attends = rows.first_key[j][in] < rows.last_key[j][in];
    p.lse[task.lse + i * p.stride_lq + head * p.stride_lh] =
        attends ? rows.max[j][in] + std::log(rows.sum[j][in]) : -kInfinity;
  }
}

}  // namespace
}  // namespace fastq::cpu
