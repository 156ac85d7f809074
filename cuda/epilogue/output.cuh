// What ends every INT8 GEMM, shared by all kernel families: exact int32 sums become the output.
//
//   sum = acc - zero_point[m] * column_sums[n]                       int32, exact
//   y   = (f32(sum) * scale_a[m]) * scale_b[n], outliers, + bias[n]  float32
//   y   = activation(y) + residual[m, n]
//   out = round_to(out_dtype, y), or clamp(round(y / out_scale), -127, 127) for int8
//
// Each operation is rounded on its own (the _rn intrinsics keep the compiler from contracting them
// to a fused multiply-add), so that every kernel gives the same bits. A thread finishes eight
// neighbouring elements of a row; the vectors along N stay in its registers from row to row.
// Which steps there are is decided at run time: the branches are uniform, and the loads of scales
// and the stores dominate.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/problem.hpp"
#include "epilogue/outliers.cuh"

namespace fastq::cuda {

constexpr int kOutputColumns = 8;  // that a thread finishes at a time

struct OutputParams {
  int M, N;
  VectorView scale_a, scale_b, bias;
  VectorView zero_point, column_sums;
  OutlierParams outliers;
  MatrixView residual;
  const float* out_scale;
  void* out;
  int64_t stride_om, stride_on;
  DType dtype;
  Activation activation;
  // Eight elements, the first at a multiple of 8, can be read or written as vectors.
  bool out_is_vectorizable, residual_is_vectorizable;
  // Nothing but scales, outliers and a bias, to a vectorizable out of 16-bit floats.
  bool is_plain;
};

inline bool is_vectorizable(const void* data, int64_t stride_m, int64_t stride_n, int64_t rows,
                            int64_t element_size) {
  const int64_t bytes = element_size * kOutputColumns < 16 ? element_size * kOutputColumns : 16;
  return stride_n == 1 && reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         (rows == 1 || stride_m * element_size % bytes == 0);
}

inline OutputParams output_params(const Int8GemmProblem& p) {
  OutputParams o{};
  o.M = static_cast<int>(p.M), o.N = static_cast<int>(p.N);
  o.scale_a = p.scale_a, o.scale_b = p.scale_b, o.bias = p.bias;
  o.zero_point = p.zero_point, o.column_sums = p.column_sums;
  if (p.outliers != nullptr) o.outliers = outlier_params(p);
  o.residual = p.residual;
  o.out_scale = p.out_scale;
  o.out = p.out;
  o.stride_om = p.stride_om, o.stride_on = p.stride_on;
  o.dtype = p.out_dtype;
  o.activation = p.activation;
  o.out_is_vectorizable =
      is_vectorizable(p.out, p.stride_om, p.stride_on, p.M, element_size(p.out_dtype));
  o.residual_is_vectorizable =
      p.residual.data != nullptr &&
      is_vectorizable(p.residual.data, p.residual.stride_m, p.residual.stride_n, p.M,
                      element_size(p.residual.dtype));
  o.is_plain = p.zero_point.data == nullptr && p.activation == Activation::kNone &&
               p.residual.data == nullptr && o.out_is_vectorizable &&
               (p.out_dtype == DType::kBFloat16 || p.out_dtype == DType::kFloat16);
  return o;
}

// An element of a vector; 0 where the vector is absent or the index past its end.
__device__ inline float load_or_zero(const VectorView& v, int64_t i, int64_t end) {
  return v.data != nullptr && i < end ? load_float(v.data, v.dtype, i * v.stride) : 0.0f;
}

// Eight neighbours of a contiguous row.
__device__ inline void load_floats(const void* data, DType dtype, int64_t offset,
                                   float (&values)[8]) {
  if (dtype == DType::kFloat32) {
    const auto* v = reinterpret_cast<const float4*>(static_cast<const float*>(data) + offset);
    const float4 x = v[0], y = v[1];
    values[0] = x.x, values[1] = x.y, values[2] = x.z, values[3] = x.w;
    values[4] = y.x, values[5] = y.y, values[6] = y.z, values[7] = y.w;
    return;
  }
  const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + offset);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 two;
    if (dtype == DType::kBFloat16) {
      two = {__uint_as_float(pairs[i] << 16), __uint_as_float(pairs[i] & 0xFFFF0000u)};
    } else {
      __half2 halves;
      memcpy(&halves, &pairs[i], 4);
      two = __half22float2(halves);
    }
    values[2 * i] = two.x, values[2 * i + 1] = two.y;
  }
}

// The vectors along N, for eight columns.
struct OutputColumns {
  float scale_b[8], bias[8];  // -0 where there is no bias: adding +0 would turn -0 into +0
};

__device__ inline void load_columns(const OutputParams& p, int n0, OutputColumns& c) {
  const bool whole = n0 + 8 <= p.N;
  const auto floats = [&](const VectorView& v, float (&values)[8]) {
    if (v.data == nullptr) return;
    const int64_t bytes = v.dtype == DType::kFloat32 ? 4 : 2;
    if (whole && v.stride == 1 && (reinterpret_cast<uintptr_t>(v.data) + n0 * bytes) % 16 == 0) {
      return load_floats(v.data, v.dtype, n0, values);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = n0 + i < p.N ? load_float(v.data, v.dtype, (n0 + i) * v.stride) : 0.0f;
    }
  };
#pragma unroll
  for (int i = 0; i < 8; ++i) c.bias[i] = -0.0f;
  floats(p.scale_b, c.scale_b);
  floats(p.bias, c.bias);
}

// The vectors along M, for one row.
struct OutputRow {
  float scale_a;
  int32_t zero_point;
};

__device__ inline OutputRow load_row(const OutputParams& p, int64_t m) {
  OutputRow row{};
  if (p.scale_a.data != nullptr) {
    row.scale_a = static_cast<const float*>(p.scale_a.data)[m * p.scale_a.stride];
  }
  if (p.zero_point.data != nullptr) {
    row.zero_point = static_cast<const int32_t*>(p.zero_point.data)[m * p.zero_point.stride];
  }
  return row;
}

// e^(t + t_low) = fraction * power * power2, for -117 < t <= 0 or NaN. Two powers, since 2^n alone
// may be subnormal, and multiplied in last, so that a subnormal result is rounded once.
struct SplitExp {
  float fraction, power, power2;
};

__device__ inline SplitExp split_exp(float t, float t_low) {
  const float n = rintf(t * 1.44269504f);
  // ln 2 in two parts, the first with few enough bits that n times it is exact.
  float r = fmaf(n, -0.693145752f, t);
  r = fmaf(n, -1.42860677e-6f, r) + t_low;
  // Minimax with the first two terms fixed, relative error 3e-9.
  float p = 0.0013814539415761828f;
  p = fmaf(p, r, 0.00836874544620514f);
  p = fmaf(p, r, 0.04166838899254799f);
  p = fmaf(p, r, 0.1666652113199234f);
  p = fmaf(p, r, 0.4999999403953552f);
  p = fmaf(r * r, p, r);
  const int whole = __float2int_rn(n), half = whole >> 1;
  return {1.0f + p, __int_as_float((half + 127) << 23), __int_as_float((whole - half + 127) << 23)};
}

// y / (1 + e^t), and for a negative y, which is -x, y * e^t / (1 + e^t).
__device__ inline float times_sigmoid(float y, float x, const SplitExp& e) {
  const bool below = __float_as_int(y) < 0;
  const float denominator = 1.0f + e.fraction * e.power * e.power2;
  const float ratio = __fdividef(below ? -x * e.fraction : y, denominator);
  return below ? ratio * e.power * e.power2 : ratio;
}

__device__ inline float silu(float y) {
  const float size = fabsf(y);
  const float x = size > 116.0f ? 116.0f : size;  // past it the result is y or 0; NaN stays
  return times_sigmoid(y, x, split_exp(-x, 0.0f));
}

// y / (1 + e^-2u), u = sqrt(2 / pi) (y + 0.044715 y^3); 2u as a sum of two floats.
__device__ inline float gelu_tanh(float y) {
  constexpr float kLinear = 1.59576917f, kLinearLow = -4.534068e-8f;  // 2 sqrt(2 / pi)
  constexpr float kCubic = 0.0447149985f, kCubicLow = 1.546144e-9f;
  const float size = fabsf(y);
  const float x = size > 11.1f ? 11.1f : size;
  const float square = x * x, square_low = fmaf(x, x, -square);
  const float cubic = kCubic * square;
  const float cubic_low =
      fmaf(kCubic, square, -cubic) + fmaf(kCubic, square_low, kCubicLow * square);
  const float factor = 1.0f + cubic;
  const float factor_low =
      (cubic > 1.0f ? (cubic - factor) + 1.0f : (1.0f - factor) + cubic) + cubic_low;
  const float linear = kLinear * x, linear_low = fmaf(kLinear, x, -linear) + kLinearLow * x;
  const float t = linear * factor;
  const float t_low = fmaf(linear, factor, -t) + fmaf(linear, factor_low, linear_low * factor);
  return times_sigmoid(y, x, split_exp(-t, -t_low));
}

// y Phi(y), Phi(-x) = e^(-x^2 / 2) R(x); R a polynomial in (x - 3.75) / (x + 3.75) over x + 3.75,
// relative error 2e-8 on [0, 15.2].
__device__ inline float gelu(float y) {
  const float size = fabsf(y);
  const float x = size > 15.2f ? 15.2f : size;
  const float square = x * x;
  const SplitExp e = split_exp(-0.5f * square, -0.5f * fmaf(x, x, -square));
  const float w = __fdividef(1.0f, x + 3.75f);
  const float q = (x - 3.75f) * w;
  float p = 0.0004434498550835997f;
  p = fmaf(p, q, 0.0005096289096400142f);
  p = fmaf(p, q, -0.004169018007814884f);
  p = fmaf(p, q, 0.0012000735150650144f);
  p = fmaf(p, q, 0.037492506206035614f);
  p = fmaf(p, q, -0.15152083337306976f);
  p = fmaf(p, q, 0.3529396057128906f);
  p = fmaf(p, q, -0.5881882905960083f);
  p = fmaf(p, q, 0.7502940893173218f);
  const float tail = p * w * e.fraction;
  const bool below = __float_as_int(y) < 0;
  return below ? -x * tail * e.power * e.power2 : y * (1.0f - tail * e.power * e.power2);
}

// The relative error stays below 8 * 2^-24, as on the CPU, also where the result is tiny.
__device__ inline void activate(Activation activation, float (&y)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (activation == Activation::kRelu) {
      y[i] = y[i] < 0.0f ? 0.0f : y[i];  // NaN stays
    } else if (activation == Activation::kGelu) {
      y[i] = gelu(y[i]);
    } else if (activation == Activation::kGeluTanh) {
      y[i] = gelu_tanh(y[i]);
    } else {
      y[i] = silu(y[i]);
    }
  }
}

__device__ inline int8_t quantized(float y, float scale) {
  const float ratio = __fdiv_rn(y, scale);
  const int q = min(max(__float2int_rn(ratio), -127), 127);
  return static_cast<int8_t>(ratio != ratio ? -128 : q);  // -128: what nothing finite gives
}

// Writes eight words (2 bytes or 4) or bytes of a row; those past N are left alone.
template <class Word>
__device__ inline void store_words(const OutputParams& p, int64_t m, int n0,
                                   const Word (&words)[8]) {
  Word* target = static_cast<Word*>(p.out) + m * p.stride_om + n0 * p.stride_on;
  if (p.out_is_vectorizable && n0 + 8 <= p.N) {
    if constexpr (sizeof(Word) == 1) {
      uint2 v;
      memcpy(&v, words, 8);
      *reinterpret_cast<uint2*>(target) = v;
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Word)) / 2; ++i) {
        uint4 v;
        memcpy(&v, reinterpret_cast<const char*>(words) + 16 * i, 16);
        reinterpret_cast<uint4*>(target)[i] = v;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (n0 + i < p.N) target[i * p.stride_on] = words[i];
  }
}

__device__ inline float scale_sum(int32_t acc, float scale_a, float scale_b) {
  return __fmul_rn(__fmul_rn(__int2float_rn(acc), scale_a), scale_b);
}
__device__ inline float scale_sum(int32_t acc, float scale_a, float scale_b, float bias) {
  return __fadd_rn(scale_sum(acc, scale_a, scale_b), bias);
}

__device__ inline uint16_t narrow(float x, DType dtype) {
  return dtype == DType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                   : __half_as_ushort(__float2half_rn(x));
}

__device__ inline uint32_t narrow_pair(float x, float y, DType dtype) {
  uint32_t word;
  if (dtype == DType::kBFloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(x, y);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// None of them added yet, once a kernel has gathered them.
__device__ inline AddedOutliers gathered_outliers(const OutputParams& p) {
  const int32_t* num_columns = p.outliers.split.num_columns;
  return {num_columns == nullptr ? 0 : num_columns[0] + num_columns[1], false};
}

// Finishes row m, columns n0 to n0 + 7, of which `acc` holds the sums. m < M.
__device__ inline void store_row(const OutputParams& p, const OutputColumns& c,
                                 const OutputRow& row, int64_t m, int n0, int32_t (&acc)[8],
                                 const AddedOutliers& outliers) {
  if (p.zero_point.data != nullptr) {
    // Not kept in registers: most products have none.
    const auto* sums = static_cast<const int32_t*>(p.column_sums.data);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (n0 + i < p.N) acc[i] -= row.zero_point * sums[(n0 + i) * p.column_sums.stride];
    }
  }
  if (p.dtype == DType::kInt32) return store_words(p, m, n0, acc);

  float y[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    y[i] =
        outliers.are_added ? __int_as_float(acc[i]) : scale_sum(acc[i], row.scale_a, c.scale_b[i]);
  }
  const int added = outliers.are_added ? p.outliers.split.capacity : 0;
  if (outliers.count > added) {
    float sums[8];  // the call's own: y is to stay in registers
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = y[i];
    add_outliers(p.outliers, added, outliers.count, m, n0, sums);
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = sums[i];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i] = __fadd_rn(y[i], c.bias[i]);
  if (p.activation != Activation::kNone) activate(p.activation, y);
  if (p.residual.data != nullptr) {
    float residual[8];
    const int64_t first = m * p.residual.stride_m + n0 * p.residual.stride_n;
    if (p.residual_is_vectorizable && n0 + 8 <= p.N) {
      load_floats(p.residual.data, p.residual.dtype, first, residual);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        residual[i] = n0 + i < p.N ? load_float(p.residual.data, p.residual.dtype,
                                                first + i * p.residual.stride_n)
                                   : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) y[i] = __fadd_rn(y[i], residual[i]);
  }

  if (p.dtype == DType::kFloat32) {
    store_words(p, m, n0, y);
  } else if (p.dtype == DType::kInt8) {
    int8_t bytes[8];
    const float scale = *p.out_scale;
#pragma unroll
    for (int i = 0; i < 8; ++i) bytes[i] = quantized(y[i], scale);
    store_words(p, m, n0, bytes);
  } else {
    uint16_t words[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      words[i] = narrow(y[i], p.dtype);
    }
    store_words(p, m, n0, words);
  }
}

}  // namespace fastq::cuda
