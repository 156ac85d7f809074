// out = round(f32(q) * scale), row by row, on the CPU.
#pragma once

#include "core/problem.hpp"

namespace fastq::cpu {

void dequantize(const DequantizeProblem& problem);

}  // namespace fastq::cpu
