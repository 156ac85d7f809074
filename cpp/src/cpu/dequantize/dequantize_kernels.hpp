// dequantize_rows.hpp, compiled for each instruction set.
#pragma once

#include "core/problem.hpp"

namespace fastq::cpu {

using DequantizeRows = void (*)(const DequantizeProblem& problem, int64_t first, int64_t last);

extern const DequantizeRows kDequantizeRowsScalar;
#if defined(__x86_64__)
extern const DequantizeRows kDequantizeRowsAvx2;
extern const DequantizeRows kDequantizeRowsAvx512;
#endif

}  // namespace fastq::cpu
