// int8_gemm on the CPU: the choice of algorithm, and the driver.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/backend.hpp"
#include "cpu/isa.hpp"

namespace fastq::cpu {

enum class GemmAlgorithm {
  kDot,      // both operands contiguous along K: dot products straight from memory
  kPacked,   // b comes packed
  kRepack,   // each thread packs a group of columns of b into its workspace, then works through M
  kSwapped,  // a is packed as if it were the weight; rows of b are read straight from memory
};

struct GemmConfig {
  Isa isa;
  GemmAlgorithm algorithm;
  int threads;
  bool copy_a;          // a is not contiguous along K: copied to the workspace first
  bool pack_a;          // a is packed into panels first, as b is (AVX-512)
  int64_t slab_m;       // rows of a packed at a time
  int64_t tile_m;       // rows of a per tile call
  int64_t chunk_m;      // rows of a per task
  int64_t chunk_n;      // columns of b per task
  size_t shared_bytes;  // workspace for a copy or a packed form of a
  size_t thread_bytes;  // workspace of each thread
  size_t workspace_bytes() const { return shared_bytes + thread_bytes * threads; }
};

// Pure: no environment, no processor.
GemmConfig select_gemm_config(const Int8GemmProblem& problem, Isa isa, int max_threads);

size_t int8_gemm_workspace_size(const Int8GemmProblem& problem);
void int8_gemm(const Int8GemmProblem& problem, Workspace& workspace);
std::string int8_gemm_describe(const Int8GemmProblem& problem);

}  // namespace fastq::cpu
