// flash_decode_rows.hpp, compiled for each instruction set.
#pragma once

#include <cstdint>

#include "core/problem.hpp"
#include "cpu/flash_attention/flash_attention_kernels.hpp"

namespace fastq::cpu {

constexpr int kDecodeRows = 64;  // of a task, at most

// What the softmax of a row over some of its keys leaves, as floats: m, l, and head_dim numbers of
// out before its division by l.
constexpr int64_t part_size(int64_t head_dim) { return head_dim + 2; }

struct DecodeKernels {
  // The part of each of the task's rows, one after the other, and so for `heads` key heads from the
  // task's on: more than one where there are at most `few_rows` rows of each.
  void (*attend)(const FlashDecodeProblem& problem, const AttentionTask& task, int64_t heads,
                 float* parts, float* scratch);
  // A row's out and lse, from `count` parts, `stride` floats apart. Row r of a sequence and key
  // head is as in AttentionTask.
  void (*combine)(const FlashDecodeProblem& problem, int64_t batch, int64_t head_k, int64_t row,
                  const float* parts, int64_t count, int64_t stride);
  int few_rows;
};

extern const DecodeKernels kDecodeScalar;
#if defined(__x86_64__)
extern const DecodeKernels kDecodeAvx2;
extern const DecodeKernels kDecodeAvx512;
#endif

}  // namespace fastq::cpu
