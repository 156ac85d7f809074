// The rotation of a pair (x, y) by an angle: (x cos - y sin, y cos + x sin), the same bits wherever
// a new token is appended. Every product and sum is rounded on its own.
#pragma once

#include <cuda_runtime_api.h>

namespace fastq::cuda {

// One of the two, `other` the other one, and the sine negative for the first.
__device__ inline float rotated(float x, float other, float cosine, float sine) {
  return __fadd_rn(__fmul_rn(x, cosine), __fmul_rn(other, sine));
}

}  // namespace fastq::cuda
