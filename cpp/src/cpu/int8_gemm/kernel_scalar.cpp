// int8_gemm in plain C++: what runs where no wider instruction set does, and the simplest text of
// what the others compute.
#include <cstring>

#include "cpu/int8_gemm/epilogue.hpp"
#include "cpu/int8_gemm/kernels.hpp"

namespace fastq::cpu {
namespace {

// acc[0:16] += a[0:count] times one packed block; count <= 64
void accumulate_block(const int8_t* a, int count, const int8_t* block, int32_t* acc) {
  for (int k = 0; k < count; ++k) {
    const int8_t* group = block + (k / 4) * kBlockN * 4 + k % 4;
    for (int n = 0; n < kBlockN; ++n) acc[n] += a[k] * group[n * 4];
  }
}

void packed_tile(const PackedTile& t, int32_t* acc) {
  for (int r = 0; r < t.rows; ++r, acc += kTileN) {
    std::memset(acc, 0, kTileN * sizeof(int32_t));
    const int8_t* a = t.a + r * t.stride_am;
    for (int n = 0; n < t.cols; n += kBlockN) {
      const int8_t* block = t.b + (n / kBlockN) * t.block_stride;
      for (int64_t k = 0; k < t.K; k += kBlockK, block += kBlockBytes) {
        const int count = static_cast<int>(t.K - k < kBlockK ? t.K - k : kBlockK);
        accumulate_block(a + k, count, block, acc + n);
      }
    }
  }
}

void dot_tile(const DotTile& t, int32_t* acc) {
  for (int r = 0; r < t.rows; ++r, acc += kTileN) {
    const int8_t* a = t.a + r * t.stride_am;
    std::memset(acc, 0, kTileN * sizeof(int32_t));
    for (int n = 0; n < t.cols; ++n) {
      const int8_t* w = t.w + n * t.stride_wn;
      int32_t sum = 0;
      for (int64_t k = 0; k < t.K; ++k) sum += a[k] * w[k];
      acc[n] = sum;
    }
  }
}

// A full block from contiguous rows of b^T: sixteen 4-byte groups a row.
void pack_block_rows(const int8_t* b, int64_t stride_bn, int8_t* block) {
  for (int n = 0; n < kBlockN; ++n) {
    for (int k = 0; k < kBlockK; k += 4) {
      std::memcpy(block + k * kBlockN + n * 4, b + n * stride_bn + k, 4);
    }
  }
}

}  // namespace

void pack_block_strided(const int8_t* b, int64_t stride_bk, int64_t stride_bn, int k_count,
                        int n_count, int8_t* block) {
  const bool full = k_count == kBlockK && n_count == kBlockN;
  if (full && stride_bk == 1) return pack_block_rows(b, stride_bn, block);
  if (!full) std::memset(block, 0, kBlockBytes);
  for (int k = 0; k < k_count; ++k) {
    int8_t* group = block + (k / 4) * kBlockN * 4 + k % 4;
    for (int n = 0; n < n_count; ++n) group[n * 4] = b[k * stride_bk + n * stride_bn];
  }
}

const GemmKernels kScalarGemmKernels = {nullptr, nullptr, packed_tile,        dot_tile,  nullptr, 0,
                                        0,       nullptr, pack_block_strided, write_tile};

}  // namespace fastq::cpu
