// FlashAttention on a GPU: the choice of a kernel.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "core/backend.hpp"

namespace fastq::cuda {

size_t flash_attention_workspace_size(const FlashAttentionProblem& problem);
void flash_attention(const FlashAttentionProblem& problem, Workspace& workspace);
// Names of the compiled instances, as fastq_describe lists them.
std::vector<std::string> flash_attention_instances();

}  // namespace fastq::cuda
