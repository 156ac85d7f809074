// flash_attention_rows.hpp, compiled for each instruction set.
#pragma once

#include <cstdint>

#include "core/problem.hpp"

namespace fastq::cpu {

// Rows of one sequence and one key head: row r is query r / group of query head
// head_k * group + r % group, where group is the number of query heads that share a key head.
struct AttentionTask {
  int64_t batch, head_k;
  int64_t first_row, last_row;
  int64_t seqlen_q, seqlen_k;
  int64_t first_key, last_key;  // of the sequence's, those that the task attends to
  // The first element of the sequence and head in each tensor, in elements.
  int64_t q, k, v, out, lse;
};

constexpr int kAttentionRows = 256;  // of a task, at most
constexpr int kAttentionKeys = 64;   // that are attended to at a time

// float32 numbers that a thread needs for its tasks, whatever the kernel.
constexpr int64_t attention_scratch(int64_t head_dim) {
  const int64_t padded = (head_dim + 31) / 32 * 32;
  return 2 * padded * kAttentionRows        // q and out, transposed
         + kAttentionRows * kAttentionKeys  // scores
         + 3 * kAttentionKeys * padded;     // k and v, and one of them halfway
}

using AttendRows = void (*)(const FlashAttentionProblem& problem, const AttentionTask& task,
                            float* scratch);

extern const AttendRows kAttendRowsScalar;
#if defined(__x86_64__)
extern const AttendRows kAttendRowsAvx2;
extern const AttendRows kAttendRowsAvx512;
extern const AttendRows kAttendRowsAmx;  // bfloat16 only
#endif

}  // namespace fastq::cpu
