// fastq_llm_int8_matmul: every check, then one call into the backend.
#pragma once

#include <cstddef>

#include "fastq/fastq.h"

namespace fastq {

size_t llm_int8_matmul_workspace_size(const fastq_llm_int8_matmul_args& args);
void llm_int8_matmul(const fastq_llm_int8_matmul_args& args);

}  // namespace fastq
