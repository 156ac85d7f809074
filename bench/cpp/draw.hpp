// Operands drawn from N(0, 1).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "device.hpp"
#include "fastq/fastq.hpp"

namespace bench {

// Rounded to nearest, half to even. Not for NaN.
inline uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// `count` numbers of float32 or bfloat16.
inline BufferPtr draw(int64_t count, fastq_dtype dtype, bool cuda, std::mt19937& generator) {
  // Drawing takes longer than any op: what is large repeats what was drawn, in a matrix in another
  // column of each row.
  constexpr int64_t kDrawn = 4194301;  // a prime
  std::normal_distribution<float> normal;
  std::vector<float> floats(std::min(count, kDrawn));
  for (float& x : floats) x = normal(generator);
  std::vector<uint16_t> rounded;
  if (dtype == FASTQ_BFLOAT16) {
    for (const float x : floats) rounded.push_back(bfloat16_bits(x));
  }
  const size_t element = rounded.empty() ? sizeof(float) : sizeof(uint16_t);
  const void* const drawn = rounded.empty() ? static_cast<void*>(floats.data()) : rounded.data();
  const size_t bytes = count * element;
  auto buffer = std::make_shared<Buffer>(bytes, cuda);
  size_t filled = floats.size() * element;
  buffer->copy_from(drawn, filled);
  while (filled < bytes) {  // doubles a whole number of repetitions
    const size_t more = std::min(filled, bytes - filled);
    buffer->copy_from(buffer->data(), more, filled);
    filled += more;
  }
  return buffer;
}

}  // namespace bench
