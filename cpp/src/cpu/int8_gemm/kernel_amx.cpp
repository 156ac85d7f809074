// int8_gemm with AMX: TDPBSSD multiplies 16 rows x 64 bytes by 64 bytes x 16 columns, signed,
// exact.
//
// Eight tile registers: a 2 x 2 square of int32 sums (0..3), two row operands (4, 5) and two column
// operands (6, 7), so that each loaded tile is used twice. A square takes all of K at once. Both
// operands are packed, so that a tile register is filled from consecutive lines: rows K bytes apart
// would often share one set of L1. They come from L2, or from memory where nothing is used twice,
// and each K block fetches the next one into L1: loads of tiles wait for one another.
//
// For a short batch of a plain weight the roles are swapped: rows of the weight are the row
// operand, straight from memory, the activation is packed, and the sums are transposed.
#include <immintrin.h>

#include "cpu/amx_tile_config.hpp"
#include "cpu/int8_gemm/epilogue.hpp"
#include "cpu/int8_gemm/fetch.hpp"
#include "cpu/int8_gemm/kernels.hpp"
#include "cpu/int8_gemm/pack_avx512.hpp"

namespace fastq::cpu {
namespace {

constexpr int kTileRows = 16;   // rows of a tile register
constexpr int kPanelAhead = 2;  // K blocks fetched into L1 before their use
constexpr int kAccStride = kTileN * static_cast<int>(sizeof(int32_t));

// Rows of a panel that the registers of this thread are configured for; 0: not configured.
thread_local int configured_rows = 0;

void configure(int rows) {
  if (rows == configured_rows) return;
  const uint8_t first = static_cast<uint8_t>(rows < kTileRows ? rows : kTileRows);
  const uint8_t second = static_cast<uint8_t>(rows > kTileRows ? rows - kTileRows : 1);
  TileConfig config;
  config.rows[0] = config.rows[1] = config.rows[4] = first;
  config.rows[2] = config.rows[3] = config.rows[5] = second;
  _tile_loadconfig(&config);
  configured_rows = rows;
}

void begin() { configured_rows = 0; }

// An idle thread must not carry live tiles: they make its context switches dear.
void end() {
  if (configured_rows != 0) _tile_release();
  configured_rows = 0;
}

// One K block of up to 32 rows and 32 columns.
template <int RowTiles, int ColTiles>
inline void multiply_block(const int8_t* a, int64_t stride_am, const int8_t* b,
                           int64_t block_stride) {
  _tile_loadd(4, a, stride_am);
  _tile_loadd(6, b, 64);
  _tile_dpbssd(0, 4, 6);
  if constexpr (ColTiles == 2) {
    _tile_loadd(7, b + block_stride, 64);
    _tile_dpbssd(1, 4, 7);
  }
  if constexpr (RowTiles == 2) {
    _tile_loadd(5, a + kTileRows * stride_am, stride_am);
    _tile_dpbssd(2, 5, 6);
    if constexpr (ColTiles == 2) _tile_dpbssd(3, 5, 7);
  }
}

// The operands of a square. `fetch(block)` is called before each whole K block.
struct Square {
  const int8_t* a;
  int64_t stride_am;
  int64_t a_step;        // bytes from one K block to the next
  const int8_t* a_tail;  // the zero-padded last block of the rows, 64 bytes apart, or null
  const int8_t* b;
  int64_t block_stride;
  int64_t blocks;  // whole K blocks
};

template <int RowTiles, int ColTiles, class FetchBlock>
void multiply_square(const Square& s, FetchBlock& fetch, int32_t* acc) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t *a = s.a, *b = s.b;
  for (int64_t block = 0; block < s.blocks; ++block, a += s.a_step, b += kBlockBytes) {
    fetch(block);
    multiply_block<RowTiles, ColTiles>(a, s.stride_am, b, s.block_stride);
  }
  if (s.a_tail != nullptr) {
    multiply_block<RowTiles, ColTiles>(s.a_tail, kBlockK, b, s.block_stride);
  }
  _tile_stored(0, acc, kAccStride);
  if constexpr (ColTiles == 2) _tile_stored(1, acc + kBlockN, kAccStride);
  acc += kTileRows * kTileN;
  if constexpr (RowTiles == 2) _tile_stored(2, acc, kAccStride);
  if constexpr (RowTiles == 2 && ColTiles == 2) _tile_stored(3, acc + kBlockN, kAccStride);
}

template <class FetchBlock>
void multiply(const Square& square, int rows, int cols, FetchBlock&& fetch, int32_t* acc) {
  configure(rows);
  if (rows > kTileRows) {
    if (cols > kBlockN) return multiply_square<2, 2>(square, fetch, acc);
    return multiply_square<2, 1>(square, fetch, acc);
  }
  if (cols > kBlockN) return multiply_square<1, 2>(square, fetch, acc);
  multiply_square<1, 1>(square, fetch, acc);
}

void panel_tile(const PanelTile& t, int32_t* acc) {
  const int64_t a_step = t.rows * kBlockK;
  const uintptr_t a = address(t.a), b = address(t.b);
  RowFetcher out(t.out, t.blocks);
  RunFetcher next(t.next, t.blocks);
  const auto fetch = [&](int64_t block) {
    fetch_run<_MM_HINT_T0>(a + (block + kPanelAhead) * a_step, a_step);
    const uintptr_t ahead = b + (block + kPanelAhead) * kBlockBytes;
    fetch_run<_MM_HINT_T0>(ahead, kBlockBytes);
    if (t.cols > kBlockN) fetch_run<_MM_HINT_T0>(ahead + t.block_stride, kBlockBytes);
    out.step();
    next.step(block);
  };
  multiply({t.a, kBlockK, a_step, nullptr, t.b, t.block_stride, t.blocks}, t.rows, t.cols, fetch,
           acc);
}

void copy_tail(const int8_t* a, int64_t stride_am, int rows, int64_t count, int8_t* tail) {
  const __mmask64 mask = ~0ull >> (kBlockK - count);
  for (int r = 0; r < rows; ++r) {
    _mm512_store_si512(tail + r * kBlockK, _mm512_maskz_loadu_epi8(mask, a + r * stride_am));
  }
}

void transpose_sums(const int32_t* src, int32_t* dst) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(src + i * kTileN);
  transpose_16x16(rows);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(dst + i * kTileN, rows[i]);
}

void swapped_tile(const SwappedTile& t, int32_t* acc) {
  alignas(64) int8_t tail[kPanelRows * kBlockK];
  alignas(64) int32_t sums[kPanelRows * kTileN];  // [n][m]
  const int64_t full_blocks = t.K / kBlockK;
  const uintptr_t next = address(t.w) + t.fetch_row * t.stride_wn;
  RowFetcher out(t.out, full_blocks);
  const auto fetch = [&](int64_t block) {
    for (int i = 0; i < t.fetch_rows; ++i) {
      fetch_run<_MM_HINT_T1>(next + i * t.stride_wn + block * kBlockK, kBlockK);
    }
    out.step();
  };
  Square square{t.w, t.stride_wn, kBlockK, nullptr, t.a, t.block_stride, full_blocks};
  if (t.K % kBlockK != 0) {
    copy_tail(t.w + full_blocks * kBlockK, t.stride_wn, t.cols, t.K % kBlockK, tail);
    square.a_tail = tail;
  }
  multiply(square, t.cols, t.rows, fetch, sums);
  for (int n = 0; n < t.cols; n += kTileRows) {
    for (int m = 0; m < t.rows; m += kBlockN) {
      transpose_sums(sums + n * kTileN + m, acc + m * kTileN + n);
    }
  }
}

}  // namespace

const GemmKernels kAmxGemmKernels = {begin,  end, nullptr,      dot_tile_avx512_vnni, panel_tile,
                                     kTileN, 0,   swapped_tile, pack_block_avx512,    write_tile};

}  // namespace fastq::cpu
