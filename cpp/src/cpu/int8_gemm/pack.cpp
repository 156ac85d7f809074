#include "cpu/int8_gemm/pack.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/error.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

constexpr char kMagic[8] = {'F', 'A', 'S', 'T', 'Q', 'P', 'K', 'W'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kColumnsPerTask = 64;
constexpr int64_t kPanelRun = 512;
constexpr int64_t kSerialBytes = 64 * 1024;  // packing less is not worth waking a thread

int64_t sums_bytes(int64_t N) {
  return round_up(round_up(N, kBlockN) * static_cast<int64_t>(sizeof(int32_t)), 64);
}

void sum_columns(const int8_t* blocks, int64_t K, int32_t* sums) {
  std::fill_n(sums, kBlockN, 0);
  const int64_t groups = round_up(K, kBlockK) / 4;
  for (int64_t g = 0; g < groups; ++g, blocks += kBlockN * 4) {
    for (int n = 0; n < kBlockN; ++n) {
      sums[n] += blocks[n * 4] + blocks[n * 4 + 1] + blocks[n * 4 + 2] + blocks[n * 4 + 3];
    }
  }
}

}  // namespace

size_t packed_weight_size(int64_t K, int64_t N) {
  const int64_t blocks = round_up(N, kBlockN) / kBlockN * packed_block_stride(K);
  return static_cast<size_t>(static_cast<int64_t>(sizeof(PackedHeader)) + sums_bytes(N) + blocks);
}

const int8_t* packed_blocks(const void* packed, int64_t K, int64_t N) {
  PackedHeader header;
  std::memcpy(&header, packed, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
    invalid_value("int8_gemm: b: expected a weight written by pack_weight, got other bytes");
  }
  if (header.version != kVersion || header.header_bytes != sizeof(PackedHeader)) {
    invalid_value("int8_gemm: b: expected packed form version " + std::to_string(kVersion) +
                  ", got version " + std::to_string(header.version) + "; pack the weight again");
  }
  if (header.k != K || header.n != N) {
    invalid_value("int8_gemm: b: expected a packed weight of (K, N) = (" + std::to_string(K) +
                  ", " + std::to_string(N) + "), got (" + std::to_string(header.k) + ", " +
                  std::to_string(header.n) + ")");
  }
  return static_cast<const int8_t*>(packed) + sizeof(PackedHeader) + sums_bytes(N);
}

const int32_t* packed_column_sums(const void* packed) {
  return reinterpret_cast<const int32_t*>(static_cast<const char*>(packed) + sizeof(PackedHeader));
}

void pack_columns(const GemmKernels& kernels, const int8_t* b, int64_t stride_bk, int64_t stride_bn,
                  int64_t K, int64_t n, int8_t* blocks) {
  const int64_t block_stride = packed_block_stride(K);
  const auto pack = [&](int64_t k0, int64_t n0) {
    kernels.pack_block(b + k0 * stride_bk + n0 * stride_bn, stride_bk, stride_bn,
                       static_cast<int>(std::min<int64_t>(kBlockK, K - k0)),
                       static_cast<int>(std::min<int64_t>(kBlockN, n - n0)),
                       blocks + n0 / kBlockN * block_stride + k0 * kBlockN);
  };
  // Along the contiguous dimension first: the other order would touch a new page at every step.
  if (stride_bn == 1) {
    for (int64_t k0 = 0; k0 < K; k0 += kBlockK) {
      for (int64_t n0 = 0; n0 < n; n0 += kBlockN) pack(k0, n0);
    }
  } else {
    for (int64_t n0 = 0; n0 < n; n0 += kBlockN) {
      for (int64_t k0 = 0; k0 < K; k0 += kBlockK) pack(k0, n0);
    }
  }
}

void pack_panel(const int8_t* a, int64_t stride_am, int64_t stride_ak, int64_t K, int rows,
                int8_t flip, int8_t* panel) {
  const int64_t step = rows * kBlockK;
  const int64_t whole = stride_ak == 1 ? K / kBlockK * kBlockK : 0;
  // Runs of each row long enough to be fetched ahead, short enough for their panel to stay in L1.
  for (int64_t k0 = 0; k0 < whole; k0 += kPanelRun) {
    const int64_t end = std::min(k0 + kPanelRun, whole);
    for (int r = 0; r < rows; ++r) {
      const int8_t* row = a + r * stride_am;
      int8_t* target = panel + k0 * rows + r * kBlockK;
      for (int64_t k = k0; k < end; k += kBlockK, target += step) {
        for (int i = 0; i < kBlockK; ++i) target[i] = static_cast<int8_t>(row[k + i] ^ flip);
      }
    }
  }
  for (int64_t k0 = whole; k0 < K; k0 += kBlockK) {
    for (int r = 0; r < rows; ++r) {
      int8_t* target = panel + k0 * rows + r * kBlockK;
      for (int64_t k = k0; k < k0 + kBlockK; ++k) {
        const int8_t value = k < K ? a[r * stride_am + k * stride_ak] : int8_t{0};
        *target++ = static_cast<int8_t>(value ^ flip);
      }
    }
  }
}

void pack_weight(const int8_t* b, int64_t stride_bk, int64_t stride_bn, int64_t K, int64_t N,
                 void* packed) {
  const GemmKernels& kernels = gemm_kernels(active_isa());
  char* bytes = static_cast<char*>(packed);
  int32_t* sums = const_cast<int32_t*>(packed_column_sums(packed));
  int8_t* blocks = reinterpret_cast<int8_t*>(bytes + sizeof(PackedHeader) + sums_bytes(N));
  std::memset(sums, 0, static_cast<size_t>(sums_bytes(N)));
  const int64_t tasks = (N + kColumnsPerTask - 1) / kColumnsPerTask;
  parallel_for(tasks, K * N < kSerialBytes ? 1 : get_num_threads(), [&](int64_t task, int) {
    const int64_t first = task * kColumnsPerTask;
    const int64_t last = std::min(first + kColumnsPerTask, N);
    for (int64_t n = first; n < last; n += kBlockN) {
      int8_t* column = blocks + n / kBlockN * packed_block_stride(K);
      pack_columns(kernels, b + n * stride_bn, stride_bk, stride_bn, K,
                   std::min<int64_t>(kBlockN, last - n), column);
      sum_columns(column, K, sums + n);
    }
  });
  // The header last: a buffer that an error left half-written is never taken for a weight.
  PackedHeader header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.header_bytes = sizeof(PackedHeader);
  header.k = K;
  header.n = N;
  std::memcpy(packed, &header, sizeof(header));
}

}  // namespace fastq::cpu
