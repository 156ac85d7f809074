// float16 and bfloat16 conversions against the definition: the nearest representable value, ties to
// the even one, found by search among the decoded neighbours in double precision.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "core/float16.hpp"

namespace {

using namespace fastq;  // NOLINT

int failures = 0;

// The value of a format with `mantissa_bits` below a sign and an exponent of the given bias.
double decode(uint32_t magnitude, int mantissa_bits, int bias) {
  const uint32_t exponent = magnitude >> mantissa_bits;
  const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
  if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return std::ldexp(mantissa + (1u << mantissa_bits),
                    static_cast<int>(exponent) - bias - mantissa_bits);
}

void check_narrowing(float value, uint32_t got, int mantissa_bits, int bias, uint32_t infinity) {
  const double magnitude = std::fabs(static_cast<double>(value));
  const uint32_t bits = got & 0x7fffu;
  bool right;
  if (std::isnan(value)) {
    right = bits > infinity;
  } else if (std::isinf(value)) {
    right = bits == infinity;
  } else {
    // Decoding Inf's bits as a number gives the first value past the range: overflow rounds to it.
    right = bits <= infinity;
    const double error = std::fabs(decode(bits, mantissa_bits, bias) - magnitude);
    for (const uint32_t other : {bits - 1, bits + 1}) {
      if (other > infinity) continue;  // also bits - 1 of zero
      const double distance = std::fabs(decode(other, mantissa_bits, bias) - magnitude);
      if (bits == infinity && other < bits && magnitude > decode(infinity, mantissa_bits, bias)) {
        continue;
      }
      right = right && (error < distance || (error == distance && bits % 2 == 0));
    }
  }
  right = right && (got >> 15) == static_cast<uint32_t>(std::signbit(value));
  if (right) return;
  if (++failures < 20) std::printf("%a (%08x) -> %04x\n", value, float_bits(value), got);
}

void check(float value) {
  check_narrowing(value, float_to_float16(value), 10, 15, 0x7c00);
  check_narrowing(value, float_to_bfloat16(value), 7, 127, 0x7f80);
}

void check_widening(uint32_t bits, float got, int mantissa_bits, int bias, uint32_t infinity) {
  const uint32_t magnitude = bits & 0x7fffu;
  bool right = std::signbit(got) == static_cast<bool>(bits >> 15);
  if (magnitude > infinity) {
    right = right && std::isnan(got);
  } else if (magnitude == infinity) {
    right = right && std::isinf(got);
  } else {
    right = right && std::fabs(static_cast<double>(got)) == decode(magnitude, mantissa_bits, bias);
  }
  if (!right && ++failures < 20) std::printf("%04x -> %a\n", bits, got);
}

}  // namespace

int main() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    check_widening(bits, float16_to_float(static_cast<uint16_t>(bits)), 10, 15, 0x7c00);
    check_widening(bits, bfloat16_to_float(static_cast<uint16_t>(bits)), 7, 127, 0x7f80);
    // Around each value of the 16-bit formats, and around the midpoints between them.
    for (const uint32_t base :
         {float_bits(float16_to_float(static_cast<uint16_t>(bits))), bits << 16}) {
      for (const uint32_t offset :
           {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
        check(float_from_bits(base + offset));
        check(float_from_bits(base - offset));
      }
    }
  }
  uint32_t random = 12345;
  for (int i = 0; i < 2000000; ++i)
    check(float_from_bits(random = random * 1664525u + 1013904223u));
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
