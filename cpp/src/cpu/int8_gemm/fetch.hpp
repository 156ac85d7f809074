// Fetching what comes next while a tile multiplies. Internal linkage: see float_rows.hpp.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "cpu/int8_gemm/kernels.hpp"

namespace fastq::cpu {
namespace {

inline uintptr_t address(const int8_t* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

template <_mm_hint kHint>
inline void fetch_run(uintptr_t line, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(line + byte), kHint);
  }
}

// Brings lines into L2, a few at each of `steps`: all at once they would hold up the tile's own
// loads.
class RowFetcher {
 public:
  RowFetcher(const Fetch& fetch, int64_t steps) : row_(fetch) {
    const int64_t lines = fetch.rows * fetch.lines;
    steps = std::max<int64_t>(steps, 1);
    lines_a_step_ = (lines + steps - 1) / steps;
    if (lines == 0) row_.rows = 0;
  }

  void step() {
    for (int64_t i = 0; i < lines_a_step_ && row_.rows > 0; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(row_.address + line_ * 64), _MM_HINT_T1);
      if (++line_ == row_.lines) {
        line_ = 0;
        --row_.rows;
        row_.address += row_.stride;
      }
    }
  }

 private:
  Fetch row_;  // and those after it
  int64_t line_ = 0;
  int64_t lines_a_step_;
};

// The same for one long run, in several places at a time: memory serves them side by side.
class RunFetcher {
 public:
  RunFetcher(const Run& run, int64_t steps) : address_(run.address) {
    steps = std::max<int64_t>(steps, 1);
    part_bytes_ = (run.lines + kParts - 1) / kParts * 64;
    step_bytes_ = (part_bytes_ / 64 + steps - 1) / steps * 64;
  }

  void step(int64_t index) {
    const int64_t offset = index * step_bytes_;
    if (offset >= part_bytes_) return;
    for (int part = 0; part < kParts; ++part) {
      fetch_run<_MM_HINT_T1>(address_ + part * part_bytes_ + offset, step_bytes_);
    }
  }

 private:
  static constexpr int kParts = 4;
  uintptr_t address_;
  int64_t part_bytes_, step_bytes_;
};

}  // namespace
}  // namespace fastq::cpu
