// Sums over a row: of its elements, and of their squared distances from a mean.
//
// Sixteen partial sums in float64, element i in sum i % 16, which are added in pairs at the end.
// That is as good as exact for any row, and the order is the same for every instruction set, so the
// bits are too. (A square of float32 is exact in float64: a fused multiply-add changes nothing.)
//
// Compiled once per instruction set (see float_rows.hpp), on vectors of the compiler's own that are
// as wide as the instruction set's.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastq::cpu {
namespace {

constexpr int kMomentLanes = 16;

#if defined(__AVX512F__)
#define FASTQ_MOMENT_BYTES 64
#elif defined(__AVX__)
#define FASTQ_MOMENT_BYTES 32
#else
#define FASTQ_MOMENT_BYTES 16
#endif
using MomentDoubles = double __attribute__((vector_size(FASTQ_MOMENT_BYTES)));
using MomentFloats = float __attribute__((vector_size(FASTQ_MOMENT_BYTES / 2)));
#undef FASTQ_MOMENT_BYTES

constexpr int kMomentWidth = sizeof(MomentDoubles) / sizeof(double);

// The sum of x[i], with kSquares of (x[i] - mean)^2, the difference rounded to float32.
template <bool kSquares>
class Moment {
 public:
  explicit Moment(float mean) : mean_(mean) {}

  // Every run but the last of a row is a multiple of 16 long.
  void add(const float* x, int64_t count) {
    int64_t i = 0;
    for (; i + kMomentLanes <= count; i += kMomentLanes) add_block(x + i);
    if (i == count) return;
    float rest[kMomentLanes];
    for (int k = 0; k < kMomentLanes; ++k) rest[k] = i + k < count ? x[i + k] : neutral();
    add_block(rest);
  }

  double total() const {
    double sums[kMomentLanes];
    std::memcpy(sums, sums_, sizeof(sums));
    for (int half = kMomentLanes / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return sums[0];
  }

 private:
  float neutral() const { return kSquares ? mean_ : 0.0f; }

  void add_block(const float* x) {
    for (int k = 0; k < kMomentLanes / kMomentWidth; ++k) {
      MomentFloats narrow;
      std::memcpy(&narrow, x + k * kMomentWidth, sizeof(narrow));
      if (kSquares) narrow -= mean_;
      const MomentDoubles wide = __builtin_convertvector(narrow, MomentDoubles);
      sums_[k] += kSquares ? wide * wide : wide;
    }
  }

  const float mean_;
  MomentDoubles sums_[kMomentLanes / kMomentWidth] = {};
};

}  // namespace
}  // namespace fastq::cpu
