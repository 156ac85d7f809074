// int8_gemm on CUDA: choice and launch.
#pragma once

#include <string>

#include "core/backend.hpp"

namespace fastq::cuda {

size_t int8_gemm_workspace_size(const Int8GemmProblem& problem);
void int8_gemm(const Int8GemmProblem& problem, Workspace& workspace);
std::string int8_gemm_describe(const Int8GemmProblem& problem);

}  // namespace fastq::cuda
