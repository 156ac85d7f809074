// kv_append_rows.hpp, compiled for each instruction set.
#pragma once

#include <cstdint>

#include "core/problem.hpp"

namespace fastq::cpu {

// Rows [first, last) of all sequences': row r is row r % seqlen_new of sequence r / seqlen_new.
using AppendRows = void (*)(const KvAppendProblem& problem, int64_t first, int64_t last);

extern const AppendRows kAppendRowsScalar;
#if defined(__x86_64__)
extern const AppendRows kAppendRowsAvx2;
extern const AppendRows kAppendRowsAvx512;
#endif

}  // namespace fastq::cpu
