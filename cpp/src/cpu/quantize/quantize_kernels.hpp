// quantize_rows.hpp, compiled for each instruction set.
#pragma once

#include "core/problem.hpp"

namespace fastq::cpu {

using QuantizeRows = void (*)(const QuantizeProblem& problem, int64_t first, int64_t last);

extern const QuantizeRows kQuantizeRowsScalar;
#if defined(__x86_64__)
extern const QuantizeRows kQuantizeRowsAvx2;
extern const QuantizeRows kQuantizeRowsAvx512;
#endif

}  // namespace fastq::cpu
