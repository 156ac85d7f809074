// Copies an int8 operand to the K-major, 16-byte aligned form that the tensor-core kernels read.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastq::cuda {

// out[r * ld + k] = in[r * stride_r + k * stride_k] for r < rows, k < K; ld is a multiple of 16 and
// at least K, out is 16-byte aligned. Bytes from K to ld become zero.
void relayout(const int8_t* in, int64_t stride_r, int64_t stride_k, int64_t rows, int64_t K,
              int8_t* out, int64_t ld, cudaStream_t stream);

}  // namespace fastq::cuda
