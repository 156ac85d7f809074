// Attention to a cache on a GPU: the choice of a kernel, and its launch.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "core/backend.hpp"

namespace fastq::cuda {

size_t flash_decode_workspace_size(const FlashDecodeProblem& problem);
void flash_decode(const FlashDecodeProblem& problem, Workspace& workspace);
// One token of one sequence.
bool flash_decode_appends(const FlashDecodeProblem& problem);
// Names of the compiled instances, as fastq_describe lists them.
std::vector<std::string> flash_decode_instances();

}  // namespace fastq::cuda
