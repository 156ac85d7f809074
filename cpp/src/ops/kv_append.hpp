// fastq_kv_append: every check, then one call into the backend.
#pragma once

#include "fastq/fastq.h"

namespace fastq {

void kv_append(const fastq_kv_append_args& args);

}  // namespace fastq
