// dequantize on CUDA.
#pragma once

#include "core/problem.hpp"

namespace fastq::cuda {

void dequantize(const DequantizeProblem& problem);

}  // namespace fastq::cuda
