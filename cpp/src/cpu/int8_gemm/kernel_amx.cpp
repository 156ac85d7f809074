// int8_gemm with AMX: TDPBSSD multiplies 16 rows x 64 bytes by 64 bytes x 16 columns, signed,
// exact.
//
// Eight tile registers: a 2 x 2 square of int32 sums (0..3), two row operands (4, 5) and two column
// operands (6, 7), so that each loaded tile is used twice. The row operand is read where it lies,
// with its own stride; the column operand is packed. 32 columns x 1024 of K (32 KB) stay in L1
// while the rows of a tile, from L2, pass by.
//
// For a short batch the roles are swapped: rows of the weight are the row operand, straight from
// memory, the activation is packed, and the sums are transposed.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "cpu/int8_gemm/epilogue.hpp"
#include "cpu/int8_gemm/kernels.hpp"
#include "cpu/int8_gemm/pack_avx512.hpp"

namespace fastq::cpu {
namespace {

constexpr int kTileRows = 16;           // rows of a tile register
constexpr int kPanelRows = 32;          // rows of the 2 x 2 square
constexpr int64_t kBlocksInL1 = 16;     // K blocks of 32 columns: 32 KB
constexpr int64_t kStreamAhead = 4096;  // bytes
constexpr int kAccStride = kTileN * static_cast<int>(sizeof(int32_t));

struct alignas(64) TileConfig {  // the operand of LDTILECFG
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

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

// Brings what a tile was told will be needed into L2, a few lines at each K block: all at once they
// would hold up the tile's own loads.
class Fetcher {
 public:
  Fetcher(const Fetch& first, const Fetch& second, int64_t blocks) : second_(second) {
    const int64_t lines = first.rows * first.lines + second.rows * second.lines;
    lines_a_block_ = static_cast<int>((lines + blocks - 1) / blocks);
    begin(first);
  }

  void step() {
    for (int i = 0; i < lines_a_block_; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(line_), _MM_HINT_T1);
      line_ += 64;
      if (--lines_left_ == 0) next_row();
    }
  }

 private:
  void begin(const Fetch& fetch) {
    now_ = fetch;
    if (now_.rows * now_.lines == 0) {
      now_ = second_;
      second_.rows = 0;
    }
    if (now_.rows * now_.lines == 0) lines_a_block_ = 0;
    line_ = now_.address;
    lines_left_ = now_.lines;
  }
  void next_row() {
    --now_.rows;
    now_.address += now_.stride;
    begin(now_);
  }

  Fetch now_, second_;
  int lines_a_block_;
  uintptr_t line_;
  int64_t lines_left_;
};

// What to fetch into L2 during a panel for the tiles after it: at each K block, the next `bytes` of
// each stream.
struct Ahead {
  uintptr_t address;  // may lie past the end of the weight
  int64_t stride;
  int streams;
  int bytes;
};

inline uintptr_t address(const int8_t* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

inline void fetch(const Ahead& ahead, int64_t block) {
  uintptr_t line = ahead.address + block * ahead.bytes;
  for (int i = 0; i < ahead.streams; ++i, line += ahead.stride) {
    for (int byte = 0; byte < ahead.bytes; byte += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(line + byte), _MM_HINT_T1);
    }
  }
}

struct Panel {
  const int8_t* a;
  int64_t stride_am;
  const int8_t* a_tail;  // the zero-padded last block of the rows, 64 bytes apart, or null
  const int8_t* b;
  int64_t block_stride;
  int64_t blocks;  // whole K blocks
  Ahead ahead;
  Fetcher* fetcher;
};

template <int RowTiles, int ColTiles>
void multiply_panel(const Panel& p, bool accumulate, int32_t* acc) {
  int32_t* acc_right = acc + kBlockN;
  int32_t* acc_below = acc + kTileRows * kTileN;
  int32_t* acc_corner = acc_below + kBlockN;
  if (accumulate) {
    _tile_loadd(0, acc, kAccStride);
    if constexpr (ColTiles == 2) _tile_loadd(1, acc_right, kAccStride);
    if constexpr (RowTiles == 2) _tile_loadd(2, acc_below, kAccStride);
    if constexpr (RowTiles == 2 && ColTiles == 2) _tile_loadd(3, acc_corner, kAccStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int8_t* b = p.b;
  for (int64_t block = 0; block < p.blocks; ++block, b += kBlockBytes) {
    fetch(p.ahead, block);
    p.fetcher->step();
    multiply_block<RowTiles, ColTiles>(p.a + block * kBlockK, p.stride_am, b, p.block_stride);
  }
  if (p.a_tail != nullptr) {
    multiply_block<RowTiles, ColTiles>(p.a_tail, kBlockK, b, p.block_stride);
  }
  _tile_stored(0, acc, kAccStride);
  if constexpr (ColTiles == 2) _tile_stored(1, acc_right, kAccStride);
  if constexpr (RowTiles == 2) _tile_stored(2, acc_below, kAccStride);
  if constexpr (RowTiles == 2 && ColTiles == 2) _tile_stored(3, acc_corner, kAccStride);
}

void multiply(const Panel& panel, int rows, int cols, bool accumulate, int32_t* acc) {
  configure(rows);
  if (rows > kTileRows) {
    if (cols > kBlockN) return multiply_panel<2, 2>(panel, accumulate, acc);
    return multiply_panel<2, 1>(panel, accumulate, acc);
  }
  if (cols > kBlockN) return multiply_panel<1, 2>(panel, accumulate, acc);
  multiply_panel<1, 1>(panel, accumulate, acc);
}

void copy_tail(const int8_t* a, int64_t stride_am, int rows, int64_t count, int8_t* tail) {
  const __mmask64 mask = ~0ull >> (kBlockK - count);
  for (int r = 0; r < rows; ++r) {
    _mm512_store_si512(tail + r * kBlockK, _mm512_maskz_loadu_epi8(mask, a + r * stride_am));
  }
}

void packed_tile(const PackedTile& t, int32_t* acc) {
  alignas(64) int8_t tail[kPanelRows * kBlockK];
  const int64_t full_blocks = t.K / kBlockK;
  // With a single panel of rows nothing in L1 is used again, and K is walked at once.
  const int64_t step = t.rows > kPanelRows ? kBlocksInL1 : full_blocks + 1;
  const int panels = (t.rows + kPanelRows - 1) / kPanelRows;
  const int streams = t.b_in_cache ? 0 : t.cols > kBlockN ? 2 : 1;
  Fetcher fetcher(t.out, t.next_a, panels * std::max<int64_t>(full_blocks, 1));
  int64_t block = 0;
  do {
    const int64_t left = full_blocks - block;
    const bool last = left <= step;
    const int64_t blocks = last ? left : step;
    for (int r = 0; r < t.rows; r += kPanelRows) {
      const int rows = t.rows - r < kPanelRows ? t.rows - r : kPanelRows;
      const int8_t* a = t.a + r * t.stride_am + block * kBlockK;
      const int8_t* b = t.b + block * kBlockBytes;
      Ahead ahead{address(b) + kStreamAhead, t.block_stride, streams, kBlockBytes};
      if (panels > 1) {  // each panel fetches its share of the columns that come next
        const int64_t next = last ? 2 * t.block_stride : (block + blocks) * kBlockBytes;
        ahead.bytes = kBlockBytes / panels / 64 * 64;
        ahead.address = address(t.b) + next + r / kPanelRows * ahead.bytes * blocks;
      }
      Panel panel{a, t.stride_am, nullptr, b, t.block_stride, blocks, ahead, &fetcher};
      if (last && t.K % kBlockK != 0) {
        copy_tail(a + blocks * kBlockK, t.stride_am, rows, t.K % kBlockK, tail);
        panel.a_tail = tail;
      }
      multiply(panel, rows, t.cols, block != 0, acc + r * kTileN);
    }
    block += blocks;
  } while (block < full_blocks);
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
  const Ahead ahead{address(t.w) + t.fetch_row * t.stride_wn, t.stride_wn, t.fetch_rows, kBlockK};
  Fetcher fetcher(t.out, {}, std::max<int64_t>(full_blocks, 1));
  Panel panel{t.w, t.stride_wn, nullptr, t.a, t.block_stride, full_blocks, ahead, &fetcher};
  if (t.K % kBlockK != 0) {
    copy_tail(t.w + full_blocks * kBlockK, t.stride_wn, t.cols, t.K % kBlockK, tail);
    panel.a_tail = tail;
  }
  multiply(panel, t.cols, t.rows, false, sums);
  for (int n = 0; n < t.cols; n += kTileRows) {
    for (int m = 0; m < t.rows; m += kBlockN) {
      transpose_sums(sums + n * kTileN + m, acc + m * kTileN + n);
    }
  }
}

}  // namespace

const GemmKernels kAmxGemmKernels = {
    begin, end, packed_tile, dot_tile_avx512_vnni, swapped_tile, pack_block_avx512, write_tile};

}  // namespace fastq::cpu
