// fastq_flash_decode: every check, then one call into the backend.
#pragma once

#include <cstddef>

#include "fastq/fastq.h"

namespace fastq {

size_t flash_decode_workspace_size(const fastq_flash_decode_args& args);
void flash_decode(const fastq_flash_decode_args& args);

}  // namespace fastq
