// The packed weight: what fastq_pack_weight writes, the same for every instruction set.
//
//   PackedHeader (64 bytes)
//   int32 column sums, (N rounded up to 16)
//   blocks [N / 16][K / 64][16 groups of k][16 n][4 k] int8, zero-padded, on a 64-byte boundary
//
// A block is at once a B tile of AMX's TDPBSSD and sixteen operands of AVX512-VNNI's VPDPBUSD.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/integers.hpp"
#include "cpu/int8_gemm/kernels.hpp"

namespace fastq::cpu {

struct PackedHeader {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  int64_t k;
  int64_t n;
  uint8_t reserved[32];
};
static_assert(sizeof(PackedHeader) == 64, "the header is part of the packed form");

// Bytes of one column block: from the first block of 16 columns to the next.
constexpr int64_t packed_block_stride(int64_t K) { return round_up(K, kBlockK) * kBlockN; }

size_t packed_weight_size(int64_t K, int64_t N);

// The blocks inside a packed weight. Throws when the bytes are no packed weight of this size.
const int8_t* packed_blocks(const void* packed, int64_t K, int64_t N);

// Columns [0, n) of b, as consecutive column blocks at `blocks`.
void pack_columns(const GemmKernels& kernels, const int8_t* b, int64_t stride_bk, int64_t stride_bn,
                  int64_t K, int64_t n, int8_t* blocks);

// Its column sums, padded with zeros to whole blocks.
const int32_t* packed_column_sums(const void* packed);

// Rows of a as one packed panel, [K / 64][rows][64], zero-padded past K, each byte xor-ed with
// flip.
void pack_panel(const int8_t* a, int64_t stride_am, int64_t stride_ak, int64_t K, int rows,
                int8_t flip, int8_t* panel);

void pack_weight(const int8_t* b, int64_t stride_bk, int64_t stride_bn, int64_t K, int64_t N,
                 void* packed);

}  // namespace fastq::cpu
