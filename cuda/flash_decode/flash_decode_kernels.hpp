// The compiled kernels: each instance's translation unit registers itself here, and
// flash_decode.cpp looks its choice up.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include <cutlass/fast_math.h>

#include "core/problem.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {

constexpr int kDecodeWaves = 4;
constexpr int kMaxDecodeCluster = 8;

struct FlashDecodeParams {
  FlashDecodeProblem problem;
  KvAppendProblem append;  // its k, v and rotation, where `appends` (flash_decode_appends)
  bool appends;
  // The queries of the heads that share a key head are the rows of a matrix: row r is query
  // r / group of head head_k * group + r % group. A tile has `columns` of them.
  cutlass::FastDivmod group, tiles;
  int columns;
  int page_shift;                       // log2(page_size)
  bool is_vectorizable;                 // rows of the cache begin at multiples of 16 bytes
  bool launches_dependent, is_settled;  // core/settled_weights.hpp
  cutlass::FastDivmod at_a_time;        // blocks of threads that the device holds
  int waves;                            // of them: 1 or kDecodeWaves
  int cluster;  // more than 1: so many blocks of threads share a tile, and these are all there are
  // Where a tile is divided among blocks of threads, its parts: of each block of threads two,
  // (columns, padded head_dim) sums and (columns, 2) references and sums of exponentials.
  float* parts;
  int padded_head_dim;
  int2* parts_of_tile;  // the first part, and how many; (batch, tiles, num_heads_k)
};

struct FlashDecodeKernel {
  DType dtype, cache_dtype;
  int head_dim;  // and every smaller one
  int columns;
  int stages;
  int block_keys;  // of a block of keys
  // On a device where it has been loaded; 0 where it does not fit.
  int (*blocks_per_sm)(int device);
  // How many clusters of `size` blocks that device holds at a time; 0 where it knows no clusters.
  int (*clusters)(int device, int size);
  void (*launch)(const FlashDecodeParams& params, cudaStream_t stream);
  int (*load)(const DeviceProps& props);  // on that device; the architecture of its code
};

// Called from static initialisers.
bool register_flash_decode_kernel(const FlashDecodeKernel& kernel);

// Adds the parts of tiles that were divided, in their order.
void launch_flash_decode_combine(const FlashDecodeParams& params, cudaStream_t stream);
int load_flash_decode_combine();

}  // namespace fastq::cuda
