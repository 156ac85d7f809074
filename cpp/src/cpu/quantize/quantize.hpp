// Row-wise symmetric quantisation and its inverse on the CPU.
#pragma once

#include "core/problem.hpp"

namespace fastq::cpu {

void quantize(const QuantizeProblem& problem);

}  // namespace fastq::cpu
