// fastq_kv_append: every check, then one call into the backend.
#pragma once

#include <optional>

#include "core/problem.hpp"
#include "fastq/fastq.h"

namespace fastq {

// Nothing where there is nothing to write.
std::optional<KvAppendProblem> checked_kv_append(const fastq_kv_append_args& args);

void kv_append(const fastq_kv_append_args& args);

}  // namespace fastq
