// quantize: one scale a row, for activations (per token) and weights (per channel); norm_quant and
// activation_quant: the same of what comes before an INT8 product. See fastq.h.
#pragma once

#include "fastq/fastq.h"

namespace fastq {

void quantize_per_token(const fastq_quantize_args& args);
void quantize_per_channel(const fastq_quantize_args& args);
void norm_quant(const fastq_norm_quant_args& args);
void activation_quant(const fastq_activation_quant_args& args);

}  // namespace fastq
