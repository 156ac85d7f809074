// The arithmetic that ends every INT8 GEMM, shared by all kernel families:
//
//   out = round_to(out_dtype, (f32(acc) * scale_a[m]) * scale_b[n] + bias[n])
//
// Each operation is rounded on its own (the _rn intrinsics keep the compiler from contracting them
// to a fused multiply-add), so that every kernel and the CPU give the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/problem.hpp"

namespace fastq::cuda {

// How a 32-bit accumulator becomes an output word. The word's size is a template parameter of the
// kernels, what stands in it is chosen at run time.
enum class OutputKind : int32_t { kBFloat16, kFloat16, kFloat32, kInt32 };

inline OutputKind output_kind(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return OutputKind::kFloat16;
    case DType::kFloat32:
      return OutputKind::kFloat32;
    case DType::kInt32:
      return OutputKind::kInt32;
    default:
      return OutputKind::kBFloat16;
  }
}

struct DequantizeParams {
  VectorView scale_a, scale_b, bias;  // scales are float32; absent with kInt32
  OutputKind kind;
};

__device__ inline float load_element(const VectorView& v, int64_t i) {
  const int64_t offset = i * v.stride;
  if (v.dtype == DType::kBFloat16) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(v.data)[offset]);
  }
  if (v.dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(v.data)[offset]);
  return static_cast<const float*>(v.data)[offset];
}

// The element, or `missing` where the vector is absent or the index past its end.
__device__ inline float load_or(const VectorView& v, int64_t i, int64_t end, float missing) {
  return v.data != nullptr && i < end ? load_element(v, i) : missing;
}

__device__ inline float dequantize(int32_t acc, float scale_a, float scale_b, float bias,
                                   bool has_bias) {
  const float scaled = __fmul_rn(__fmul_rn(__int2float_rn(acc), scale_a), scale_b);
  return has_bias ? __fadd_rn(scaled, bias) : scaled;  // adding 0 would turn -0 into +0
}

// The output word: uint16_t holds bfloat16 or float16, uint32_t float32 or the raw int32 sum.
template <class Word>
__device__ Word output_word(int32_t acc, float value, OutputKind kind);

template <>
__device__ inline uint16_t output_word<uint16_t>(int32_t, float value, OutputKind kind) {
  return kind == OutputKind::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                       : __half_as_ushort(__float2half_rn(value));
}

template <>
__device__ inline uint32_t output_word<uint32_t>(int32_t acc, float value, OutputKind kind) {
  return kind == OutputKind::kFloat32 ? __float_as_uint(value) : static_cast<uint32_t>(acc);
}

}  // namespace fastq::cuda
