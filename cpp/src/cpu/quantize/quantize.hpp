// Row-wise quantisation on the CPU, after a norm or an activation too.
#pragma once

#include "core/problem.hpp"

namespace fastq::cpu {

void quantize(const QuantizeProblem& problem);

}  // namespace fastq::cpu
