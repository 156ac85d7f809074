// fastq_flash_attention: every check, then one call into the backend.
#pragma once

#include <cstddef>

#include "fastq/fastq.h"

namespace fastq {

size_t flash_attention_workspace_size(const fastq_flash_attention_args& args);
void flash_attention(const fastq_flash_attention_args& args);

}  // namespace fastq
