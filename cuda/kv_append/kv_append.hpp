// Writing new keys and values to a cache on a GPU.
#pragma once

#include "core/problem.hpp"

namespace fastq::cuda {

void kv_append(const KvAppendProblem& problem);

}  // namespace fastq::cuda
