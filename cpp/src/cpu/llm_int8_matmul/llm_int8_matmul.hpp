// The LLM.int8() product on the CPU: int8 for most of x, float32 for its outliers.
#pragma once

#include <cstddef>

#include "core/backend.hpp"

namespace fastq::cpu {

size_t llm_int8_matmul_workspace_size(const LlmInt8MatmulProblem& problem);
void llm_int8_matmul(const LlmInt8MatmulProblem& problem, Workspace& workspace);

}  // namespace fastq::cpu
