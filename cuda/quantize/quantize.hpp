// quantize on CUDA: one scale a row.
#pragma once

#include "core/problem.hpp"

namespace fastq::cuda {

void quantize(const QuantizeProblem& problem);

}  // namespace fastq::cuda
