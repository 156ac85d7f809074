// llm_int8_matmul on CUDA: quantise and flag, gather what was flagged, multiply.
#pragma once

#include <cstddef>

#include "core/backend.hpp"

namespace fastq::cuda {

size_t llm_int8_matmul_workspace_size(const LlmInt8MatmulProblem& problem);
void llm_int8_matmul(const LlmInt8MatmulProblem& problem, Workspace& workspace);

}  // namespace fastq::cuda
