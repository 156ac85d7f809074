// Attention of bfloat16 rows with AMX, as flash_attention_rows.hpp describes it: TDPBF16PS
// multiplies 16 rows x 32 by 32 x 16 columns, into float32 sums.
//
// The row operand of a product is 16 lines of 32 numbers, the column operand 16 lines of pairs:
// line i holds numbers 2 i and 2 i + 1 of each of 16 columns. Eight tile registers: a 2 x 2 square
// of sums (0..3), two row operands (4, 5), two column operands (6, 7). Every operand is laid out
// tile by tile, 1 KB each, padded with zeros:
//
//   scores (keys, rows):     k  [head_dim / 32][key tile]        q  [head_dim / 32][row tile]
//   out (head_dim, rows):    v, transposed  [head_dim / 16][keys / 32]     p  [keys / 32][row tile]
//
// p, what the softmax leaves, is rounded to bfloat16.
#include <immintrin.h>

#include "cpu/amx_tile_config.hpp"
#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/flash_attention/flash_attention_softmax.hpp"
#include "cpu/transpose_avx512.hpp"

namespace fastq::cpu {
namespace {

constexpr int kTile = 512;                      // numbers of an operand's tile
constexpr int kKeyTiles = kAttentionKeys / 16;  // of k
constexpr int kKeySteps = kAttentionKeys / 32;  // of v and p
constexpr int kRowTiles = kRows / 16;           // of q and p
constexpr int kSumStride = kRows * static_cast<int>(sizeof(float));
static_assert(kRowTiles == 2 && kKeyTiles % 2 == 0);

// Up to 32 numbers of a row, zeros behind them.
__m512i load_line(const uint16_t* row, int64_t count) {
  const __mmask32 mask = count >= 32 ? ~0u : count <= 0 ? 0u : ~0u >> (32 - count);
  return _mm512_maskz_loadu_epi16(mask, row);
}

// Up to 16 numbers of a row, each widened to 32 bits.
__m512i load_half_line(const uint16_t* row, int64_t count) {
  const auto mask = static_cast<__mmask16>(count >= 16  ? 0xffff
                                           : count <= 0 ? 0
                                                        : 0xffff >> (16 - count));
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
}

void pack_queries(const FlashAttentionProblem& p, const AttentionTask& task, int64_t first,
                  int64_t steps, uint16_t* q) {
  const int64_t group = p.num_heads / p.num_heads_k;
  const auto* data = static_cast<const uint16_t*>(p.q.data);
  for (int64_t step = 0; step < steps; ++step) {
    for (int tile = 0; tile < kRowTiles; ++tile, q += kTile) {
      __m512i lines[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t row = first + tile * 16 + i;
        const int64_t at = task.q + row / group * p.q.stride_seqlen + row % group * p.q.stride_head;
        lines[i] = row < task.last_row ? load_line(data + at + step * 32, p.head_dim - step * 32)
                                       : _mm512_setzero_si512();
      }
      transpose_16x16(lines);  // pairs of numbers are 32 bits
      for (int i = 0; i < 16; ++i) _mm512_store_si512(q + i * 32, lines[i]);
    }
  }
}

// Keys are read one after the other: rows a large power of two apart fight for the same lines of
// the cache.
void pack_keys(const uint16_t* from, int64_t stride, int64_t keys, int64_t head_dim, int64_t steps,
               uint16_t* k) {
  for (int key = 0; key < kAttentionKeys; ++key) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t count = key < keys ? head_dim - step * 32 : 0;
      const __m512i line = load_line(from + key * stride + step * 32, count);
      _mm512_store_si512(k + (step * kAttentionKeys + key) * 32, line);
    }
  }
}

// `space` holds pairs of keys, number by number, before they are transposed.
void pack_values(const uint16_t* from, int64_t stride, int64_t keys, int64_t head_dim,
                 int64_t steps, uint16_t* space, uint16_t* v) {
  for (int pair = 0; pair < kAttentionKeys / 2; ++pair) {
    const uint16_t* const first = from + 2 * pair * stride;
    for (int64_t half = 0; half < 2 * steps; ++half) {
      const auto numbers = [&](int key) {
        const int64_t count = 2 * pair + key < keys ? head_dim - half * 16 : 0;
        return load_half_line(first + key * stride + half * 16, count);
      };
      const __m512i line = _mm512_or_si512(numbers(0), _mm512_slli_epi32(numbers(1), 16));
      _mm512_store_si512(space + (half * kAttentionKeys / 2 + pair) * 32, line);
    }
  }
  for (int64_t tile = 0; tile < 2 * steps * kKeySteps; ++tile) {
    __m512i lines[16];
    for (int i = 0; i < 16; ++i) lines[i] = _mm512_load_si512(space + tile * kTile + i * 32);
    transpose_16x16(lines);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(v + tile * kTile + i * 32, lines[i]);
  }
}

// What the softmax left of a block, keys past its last as zeros.
void pack_probabilities(float* st, int64_t keys, uint16_t* p) {
  std::fill(st + keys * kRows, st + kAttentionKeys * kRows, 0.0f);
  const auto bits = [&](int key, int tile) {
    const __m512 e = _mm512_loadu_ps(st + key * kRows + tile * 16);
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(e));
  };
  for (int step = 0; step < kKeySteps; ++step) {
    for (int tile = 0; tile < kRowTiles; ++tile) {
      for (int i = 0; i < 16; ++i, p += 32) {
        const int key = step * 32 + 2 * i;
        const __m512i second = _mm512_slli_epi32(bits(key + 1, tile), 16);
        _mm512_store_si512(p, _mm512_or_si512(bits(key, tile), second));
      }
    }
  }
}

// A 2 x 2 square of sums += the products of two row tiles and two column tiles at each step.
void multiply_square(const uint16_t* a, int64_t a_next, int64_t a_step, const uint16_t* b,
                     int64_t b_step, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, a += a_step, b += b_step) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_loadd(5, a + a_next, 64);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

void load_square(const float* sums) {
  _tile_loadd(0, sums, kSumStride);
  _tile_loadd(1, sums + 16, kSumStride);
  _tile_loadd(2, sums + 16 * kRows, kSumStride);
  _tile_loadd(3, sums + 16 * kRows + 16, kSumStride);
}

void store_square(float* sums) {
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + 16, kSumStride);
  _tile_stored(2, sums + 16 * kRows, kSumStride);
  _tile_stored(3, sums + 16 * kRows + 16, kSumStride);
}

void attend_rows_amx(const FlashAttentionProblem& problem, const AttentionTask& task,
                     float* scratch) {
  constexpr int kPanels = kAttentionRows / kRows;
  const int64_t steps = (problem.head_dim + 31) / 32, D = steps * 32;
  float* const ot = scratch;
  float* const st = ot + D * kAttentionRows;
  auto* const p = reinterpret_cast<uint16_t*>(st + kAttentionKeys * kRows);
  auto* const q = reinterpret_cast<uint16_t*>(st + kAttentionKeys * kAttentionRows);
  uint16_t* const k = q + D * kAttentionRows;
  uint16_t* const v = k + D * kAttentionKeys;
  uint16_t* const space = v + D * kAttentionKeys;
  const TileConfig config;
  _tile_loadconfig(&config);

  Rows rows[kPanels];
  const int panels = static_cast<int>((task.last_row - task.first_row + kRows - 1) / kRows);
  int64_t begin = task.last_key, end = task.first_key;
  for (int panel = 0; panel < panels; ++panel) {
    const int64_t first = task.first_row + panel * kRows;
    set_rows(problem, task, first, rows[panel]);
    pack_queries(problem, task, first, steps, q + panel * D * kRows);
    begin = std::min(begin, rows[panel].least_first);
    end = std::max(end, rows[panel].most_last);
  }
  std::fill_n(ot, panels * D * kRows, 0.0f);

  const auto* const k_data = static_cast<const uint16_t*>(problem.k.data);
  const auto* const v_data = static_cast<const uint16_t*>(problem.v.data);
  const int64_t stride_k = problem.k.stride_seqlen, stride_v = problem.v.stride_seqlen;
  for (int64_t key = begin; key < end; key += kAttentionKeys) {
    const int64_t keys = std::min<int64_t>(kAttentionKeys, end - key);
    pack_keys(k_data + task.k + key * stride_k, stride_k, keys, problem.head_dim, steps, k);
    pack_values(v_data + task.v + key * stride_v, stride_v, keys, problem.head_dim, steps, space,
                v);
    const int64_t next = key + keys, more = std::min<int64_t>(kAttentionKeys, end - next);
    prefetch_rows(problem.k, problem.dtype, task.k + next * stride_k, more, problem.head_dim);
    prefetch_rows(problem.v, problem.dtype, task.v + next * stride_v, more, problem.head_dim);
    for (int panel = 0; panel < panels; ++panel) {
      Rows& its = rows[panel];
      if (key >= its.most_last || key + keys <= its.least_first) continue;
      float* const o = ot + panel * D * kRows;
      for (int tile = 0; tile < kKeyTiles; tile += 2) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        multiply_square(k + tile * kTile, kTile, kKeyTiles * kTile, q + panel * D * kRows,
                        kRowTiles * kTile, steps);
        store_square(st + tile * 16 * kRows);
      }
      softmax_block<false>(problem, its, key, keys, st, o);
      pack_probabilities(st, keys, p);
      for (int64_t tile = 0; tile < 2 * steps; tile += 2) {
        load_square(o + tile * 16 * kRows);
        multiply_square(v + tile * kKeySteps * kTile, kKeySteps * kTile, kTile, p,
                        kRowTiles * kTile, kKeySteps);
        store_square(o + tile * 16 * kRows);
      }
    }
  }
  _tile_release();  // an idle thread with live tiles makes its context switches dear
  for (int panel = 0; panel < panels; ++panel) {
    store_rows(problem, task, task.first_row + panel * kRows, rows[panel], ot + panel * D * kRows);
  }
}

}  // namespace

const AttendRows kAttendRowsAmx = attend_rows_amx;

}  // namespace fastq::cpu
