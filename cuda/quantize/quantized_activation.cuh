// Activations of what is then rounded to eight bits: absolute errors of 1e-6 of |y| do, and the
// instructions that epilogue/output.cuh spends on the last bits would cost more than memory does.
// NaN stays, and the limits at infinity are right.
//
//   silu       y / (1 + e^-y)
//   gelu_tanh  y / (1 + e^-2u),  u = sqrt(2 / pi) (y + 0.044715 y^3)
//   gelu       max(y, 0) - |y| Phi(-|y|),  Phi(-x) = 2^P(x), P a minimax polynomial whose error
//              weighs with Phi^0.85: Phi is off by 2e-7 at the most, and 0 where x is large
#pragma once

#include "core/problem.hpp"
#include "quantize/row_scale.cuh"

namespace fastq::cuda {

__device__ inline float max_or_nan(float x, float y) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
  return result;
}
__device__ inline float approximate_exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float quantized_silu(float y) {
  y = max_or_nan(y, -104.0f);  // where it is 0
  return y * approximate_reciprocal(1 + approximate_exp2(-1.44269504f * y));
}

__device__ inline float quantized_gelu_tanh(float y) {
  constexpr float kLinear = -2.30220819f, kCubic = -0.102943240f;  // log2(e) 2 sqrt(2 / pi) ...
  y = max_or_nan(y, -16.0f);
  return y * approximate_reciprocal(1 + approximate_exp2(y * fmaf(kCubic, y * y, kLinear)));
}

__device__ inline float quantized_gelu(float y) {
  const float x = fminf(fabsf(y), 16.0f);
  float p = fmaf(2.45210958e-05f, x, -6.94868271e-04f);
  p = fmaf(p, x, 7.84186088e-03f);
  p = fmaf(p, x, -5.30570336e-02f);
  p = fmaf(p, x, -4.59019631e-01f);
  p = fmaf(p, x, -1.15112817f);
  p = fmaf(p, x, -0.999999583f);
  return fmaf(-x, approximate_exp2(p), max_or_nan(y, 0.0f));
}

// use(f), f the function of an element: gelu, silu or gelu_tanh.
template <class Use>
__device__ inline void with_curved_activation(Activation activation, const Use& use) {
  if (activation == Activation::kGelu) return use([](float y) { return quantized_gelu(y); });
  if (activation == Activation::kSilu) return use([](float y) { return quantized_silu(y); });
  use([](float y) { return quantized_gelu_tanh(y); });
}

// The same of any; kIsPlain: relu at the most.
template <bool kIsPlain, class Use>
__device__ inline void with_quantized_activation(Activation activation, const Use& use) {
  if (activation == Activation::kNone) return use([](float y) { return y; });
  if (kIsPlain || activation == Activation::kRelu) {
    return use([](float y) { return max_or_nan(y, 0.0f); });
  }
  if constexpr (!kIsPlain) with_curved_activation(activation, use);
}

template <int kCount>
__device__ inline void activate_quantized(Activation activation, float (&y)[kCount]) {
  with_quantized_activation<false>(activation, [&](const auto& activate) {
#pragma unroll
    for (float& x : y) x = activate(x);
  });
}

}  // namespace fastq::cuda
