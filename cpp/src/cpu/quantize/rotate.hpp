// The Hadamard rotation of a run: every `rotation` consecutive elements are replaced by their
// product with the Hadamard matrix of that order (+-1, unnormalised), as butterflies
//   (x[i], x[i + stride]) = (x[i] + x[i + stride], x[i] - x[i + stride]),  stride 1, 2, 4, ...
// The order of the strides is part of the contract: it fixes each rounding.
//
// Compiled once per instruction set (see float_rows.hpp), on vectors of the compiler's own that are
// as wide as the instruction set's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fastq::cpu {

static constexpr int64_t kRotateBlock = 32;  // the largest rotation

#if defined(__AVX512F__)
#define FASTQ_ROTATE_BYTES 64
#elif defined(__AVX__)
#define FASTQ_ROTATE_BYTES 32
#else
#define FASTQ_ROTATE_BYTES 16
#endif
using RotateFloats = float __attribute__((vector_size(FASTQ_ROTATE_BYTES), may_alias));
using RotateBits = int32_t __attribute__((vector_size(FASTQ_ROTATE_BYTES)));
#undef FASTQ_ROTATE_BYTES

static constexpr int kRotateLanes = sizeof(RotateFloats) / sizeof(float);
static constexpr int kRotateVectors = kRotateBlock / kRotateLanes;

// Each lane i becomes the sum of the pair (i, i ^ kStride), or the difference where i is the second
// of the two: b changes its sign and a is added.
template <int kStride, size_t... kLane>
static inline void butterfly_lanes(RotateFloats& v, std::index_sequence<kLane...>) {
  const RotateFloats other = {v[kLane ^ kStride]...};
  constexpr RotateBits kSign = {(kLane & kStride ? INT32_MIN : 0)...};
  v = other + reinterpret_cast<RotateFloats>(reinterpret_cast<RotateBits>(v) ^ kSign);
}

template <int kStride>
static inline void butterflies(RotateFloats (&block)[kRotateVectors]) {
  if constexpr (kStride < kRotateLanes) {
    for (RotateFloats& v : block) {
      butterfly_lanes<kStride>(v, std::make_index_sequence<kRotateLanes>{});
    }
  } else {
    constexpr int kStep = kStride / kRotateLanes;
    for (int i = 0; i < kRotateVectors; ++i) {
      if (i & kStep) continue;
      const RotateFloats a = block[i], b = block[i + kStep];
      block[i] = a + b;
      block[i + kStep] = a - b;
    }
  }
}

// `x` is aligned to 64 bytes and has room for `count` rounded up to whole blocks.
static inline void rotate(float* x, int64_t count, int rotation) {
  for (int64_t i = count; i % kRotateBlock != 0; ++i) x[i] = 0.0f;
  for (int64_t i = 0; i < count; i += kRotateBlock) {
    auto* from = reinterpret_cast<RotateFloats*>(x + i);
    RotateFloats block[kRotateVectors];
    for (int k = 0; k < kRotateVectors; ++k) block[k] = from[k];
    butterflies<1>(block);
    if (rotation > 2) butterflies<2>(block);
    if (rotation > 4) butterflies<4>(block);
    if (rotation > 8) butterflies<8>(block);
    if (rotation > 16) butterflies<16>(block);
    for (int k = 0; k < kRotateVectors; ++k) from[k] = block[k];
  }
}

}  // namespace fastq::cpu
