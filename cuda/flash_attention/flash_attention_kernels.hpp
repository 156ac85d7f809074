// The compiled kernels: each instance's translation unit registers itself here, and
// flash_attention.cpp looks its choice up.
#pragma once

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
  void (*launch)(const FlashAttentionProblem&);
  void (*load)();  // on the current device, with its shared-memory limit raised
};

// Called from static initialisers.
bool register_attention_kernel(const AttentionKernel& kernel);

// Rows of head_dim 16-bit elements begin at multiples of 16 bytes.
inline bool is_vectorizable(const AttentionTensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride_batch % 8 == 0 &&
         t.stride_seqlen % 8 == 0 && t.stride_head % 8 == 0;
}

// The grid for so many blocks; an error where it cannot hold them.
unsigned attention_grid(int64_t blocks);

}  // namespace fastq::cuda
