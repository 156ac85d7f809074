// The compiled kernels: each instance's translation unit registers itself here, and int8_gemm.cpp
// looks its choice up.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.hpp"
#include "int8_gemm/int8_gemm_tile.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {

// What a kernel is launched with. a and b are K-major, their rows ld_a and ld_b bytes apart,
// 16-byte aligned.
struct GemmLaunch {
  const Int8GemmProblem* problem;
  const GemmConfig* config;
  const int8_t* a;
  int64_t ld_a;
  const int8_t* b;
  int64_t ld_b;
  bool b_is_constant;  // the kernel before this one does not write it
  const DeviceProps* device;
  cudaStream_t stream;
  int32_t* partial_sums = nullptr;  // where an sm_80 kernel with split_k > 1 has room for them
};

struct GemmKernel {
  KernelFamily family;
  TileConfig tile;
  void (*launch)(const GemmLaunch&);
  void (*load)();  // on the current device, with its shared-memory limit raised
};

// Called from static initialisers.
bool register_gemm_kernel(const GemmKernel& kernel);

// Null when the build has no such instance.
const GemmKernel* find_gemm_kernel(KernelFamily family, const TileConfig& tile);

}  // namespace fastq::cuda
