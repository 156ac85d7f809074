// Attention of a few queries to a cache on the CPU: its division into tasks and parts.
#pragma once

#include <cstddef>

#include "core/backend.hpp"

namespace fastq::cpu {

size_t flash_decode_workspace_size(const FlashDecodeProblem& problem);
void flash_decode(const FlashDecodeProblem& problem, Workspace& workspace);

}  // namespace fastq::cpu
