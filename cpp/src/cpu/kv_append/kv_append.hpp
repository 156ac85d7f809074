// New keys and values into a cache, on the CPU.
#pragma once

#include "core/problem.hpp"

namespace fastq::cpu {

void kv_append(const KvAppendProblem& problem);

}  // namespace fastq::cpu
