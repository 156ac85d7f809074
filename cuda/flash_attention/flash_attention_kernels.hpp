// The compiled kernels: each instance's translation unit registers itself here, and
// flash_attention.cpp looks its choice up.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/integers.hpp"
#include "core/problem.hpp"
#include "runtime/device.hpp"
#include "runtime/kernel_family.hpp"

namespace fastq::cuda {

struct AttentionKernel {
  KernelFamily family;
  DType dtype;
  int head_dim;  // and every smaller one
  int tile_m;    // queries
  size_t workspace_size;
  void (*launch)(const FlashAttentionProblem&, void* workspace);
  void (*load)();  // on the current device, with its shared-memory limit raised
};

// Called from static initialisers.
bool register_attention_kernel(const AttentionKernel& kernel);

// Rows of 16-bit elements begin at multiples of so many.
inline bool is_aligned(const AttentionTensor& t, int elements) {
  return reinterpret_cast<uintptr_t>(t.data) % (2 * elements) == 0 &&
         t.stride_batch % elements == 0 && t.stride_seqlen % elements == 0 &&
         t.stride_head % elements == 0;
}

// Whether TMA can reach all of a tensor whose rows so begin.
inline bool tma_can_address(const AttentionTensor& t) {
  return std::max({t.stride_batch, t.stride_seqlen, t.stride_head}) < int64_t{1} << 39;
}

// The grid for so many blocks; an error where it cannot hold them.
unsigned attention_grid(int64_t blocks);

}  // namespace fastq::cuda
