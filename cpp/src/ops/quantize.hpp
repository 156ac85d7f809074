// quantize: one scale a row, for activations (per token) and weights (per channel). See fastq.h.
#pragma once

#include "fastq/fastq.h"

namespace fastq {

void quantize_per_token(const fastq_quantize_args& args);
void quantize_per_channel(const fastq_quantize_args& args);

}  // namespace fastq
