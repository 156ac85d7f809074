// FlashAttention on the CPU: which queries a task has, and the kernel that takes it.
#pragma once

#include <cstddef>

#include "core/backend.hpp"

namespace fastq::cpu {

size_t flash_attention_workspace_size(const FlashAttentionProblem& problem);
void flash_attention(const FlashAttentionProblem& problem, Workspace& workspace);

}  // namespace fastq::cpu
