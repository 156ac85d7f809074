// relu, gelu in both forms, and silu, in place on a run of float32.
//
//   relu       y < 0 ? 0 : y, so NaN stays
//   silu       y / (1 + e^-y)
//   gelu_tanh  y / (1 + e^-2u),  u = sqrt(2 / pi) * (y + 0.044715 y^3)
//   gelu       y * Phi(y), Phi(y) = (1 + erf(y / sqrt(2))) / 2
//
// The relative error stays below 8 * 2^-24 for every y, also where the result is tiny. With x = |y|
// each of the last three is made of e^t, t <= 0: t is formed in float64, where its rounding does no
// harm, and the power of two in e^t is multiplied in last, so that a subnormal result is rounded
// once. Phi(-x) = e^(-x^2 / 2) * R(x) with a smooth R, a polynomial here.
//
// Compiled once per instruction set (see float_rows.hpp), out of operations that IEEE 754 defines
// to the last bit: every set gives the same bits. The loops become vector code.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/float16.hpp"
#include "core/problem.hpp"

namespace fastq::cpu {

// e^t = fraction * power * power2. Two powers, since 2^n alone may be subnormal.
struct SplitExp {
  float fraction, power, power2;
  float value() const { return fraction * power * power2; }
};

static inline SplitExp split_exp(double t) {  // -117 < t <= 0, or NaN
  constexpr double kRounder = 0x1.8p52;       // leaves a whole number in the low bits
  constexpr double kPerLn2 = 0x1.71547652b82fep0, kLn2 = 0x1.62e42fefa39efp-1;
  const double shifted = t * kPerLn2 + kRounder;
  const float r = static_cast<float>(t - (shifted - kRounder) * kLn2);  // |r| <= ln 2 / 2
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int32_t n = static_cast<int32_t>(static_cast<uint32_t>(bits));
  const int32_t half = n >> 1;
  // Minimax with the first two terms fixed, relative error 3e-9.
  float p = 0.0013814539415761828f;
  p = p * r + 0.00836874544620514f;
  p = p * r + 0.04166838899254799f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = r + r * r * p;
  const auto power = [](int32_t e) {
    return float_from_bits((static_cast<uint32_t>(e) + 127u) << 23);
  };
  return {1.0f + p, power(half), power(n - half)};
}

static inline float magnitude(float y) { return float_from_bits(float_bits(y) & 0x7fffffffu); }

// Bits, since the compiler would make branches of `?:`, which end the vector code.
static inline float select(uint32_t mask, float x, float y) {
  return float_from_bits((float_bits(x) & mask) | (float_bits(y) & ~mask));
}

// `below` where y has its sign bit set, else `above`.
static inline float by_sign(float y, float below, float above) {
  return select(0u - (float_bits(y) >> 31), below, above);
}

// Past `limit` the result for -x is 0 and for x it is x; NaN stays.
static inline float at_most(float x, float limit) {
  return select(0u - static_cast<uint32_t>(x > limit), limit, x);
}

// y / (1 + e^t), and for a negative y, which is -x, y * e^t / (1 + e^t).
static inline float times_sigmoid(float y, float x, const SplitExp& e) {
  const float ratio = by_sign(y, -x * e.fraction, y) / (1.0f + e.value());
  return ratio * by_sign(y, e.power, 1.0f) * by_sign(y, e.power2, 1.0f);
}

static inline float silu(float y) {
  const float x = at_most(magnitude(y), 116.0f);
  return times_sigmoid(y, x, split_exp(-static_cast<double>(x)));
}

static inline float gelu_tanh(float y) {
  constexpr double kLinear = 0x1.9884533d43651p+0;  // 2 sqrt(2 / pi)
  constexpr double kCubic = kLinear * 0.044715;
  const float x = at_most(magnitude(y), 11.1f);
  const double wide = x;
  return times_sigmoid(y, x, split_exp(-wide * (kLinear + kCubic * (wide * wide))));
}

// R(x) = e^(x^2 / 2) * Phi(-x) on [0, 15.2], relative error 2e-8: a polynomial in
// (x - 3.75) / (x + 3.75) over x + 3.75.
static inline float scaled_tail(float x) {
  const float w = 1.0f / (x + 3.75f);
  const float q = (x - 3.75f) * w;
  float p = 0.0004434498550835997f;
  p = p * q + 0.0005096289096400142f;
  p = p * q - 0.004169018007814884f;
  p = p * q + 0.0012000735150650144f;
  p = p * q + 0.037492506206035614f;
  p = p * q - 0.15152083337306976f;
  p = p * q + 0.3529396057128906f;
  p = p * q - 0.5881882905960083f;
  p = p * q + 0.7502940893173218f;
  return p * w;
}

static inline float gelu(float y) {
  const float x = at_most(magnitude(y), 15.2f);
  const double wide = x;
  const SplitExp e = split_exp(-0.5 * (wide * wide));
  const float tail = scaled_tail(x) * e.fraction;
  const float below = -x * tail * e.power * e.power2;
  const float above = y * (1.0f - tail * e.power * e.power2);
  return by_sign(y, below, above);
}

// kCount is a constant: the compiler sees how often the loops run.
template <int kCount>
static inline void activate(Activation activation, float* y) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      for (int i = 0; i < kCount; ++i) y[i] = y[i] < 0 ? 0.0f : y[i];
      return;
    case Activation::kGelu:
      for (int i = 0; i < kCount; ++i) y[i] = gelu(y[i]);
      return;
    case Activation::kGeluTanh:
      for (int i = 0; i < kCount; ++i) y[i] = gelu_tanh(y[i]);
      return;
    case Activation::kSilu:
      for (int i = 0; i < kCount; ++i) y[i] = silu(y[i]);
      return;
  }
}

}  // namespace fastq::cpu
