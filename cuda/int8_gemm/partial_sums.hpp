// The int32 sums that the blocks of a split K leave in the workspace, and what becomes of them.
// GemmChoice::take reserves their bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/problem.hpp"
#include "int8_gemm/int8_gemm_tile.hpp"

namespace fastq::cuda {

// (parts, M, N), rows padded to 32 bytes.
struct PartialSums {
  int32_t* data;
  int64_t M, N;
  int parts;

  int64_t ld() const { return round_up(N, 8); }
  int64_t part_stride() const { return M * ld(); }

  // The first part as the output of a product: raw sums.
  Int8GemmProblem as_output() const {
    Int8GemmProblem p;
    p.M = M, p.N = N;
    p.out = data;
    p.out_dtype = DType::kInt32;
    p.stride_om = ld(), p.stride_on = 1;
    return p;
  }
};

// Adds the parts up and writes problem.out.
void finish_partial_sums(const PartialSums& sums, const Int8GemmProblem& problem,
                         cudaStream_t stream);

}  // namespace fastq::cuda
