// int8_gemm on CUDA: choice and launch.
#pragma once

#include <string>
#include <vector>

#include "core/backend.hpp"

namespace fastq::cuda {

size_t int8_gemm_workspace_size(const Int8GemmProblem& problem);
void int8_gemm(const Int8GemmProblem& problem, Workspace& workspace);
std::string int8_gemm_describe(const Int8GemmProblem& problem);
std::vector<std::string> int8_gemm_candidates(const Int8GemmProblem& problem);
// The names of the instances that this build holds, as FASTQ_KERNELS takes them.
std::vector<std::string> int8_gemm_instances();

}  // namespace fastq::cuda
