// dequantize: int8 rows times their scale. See fastq.h.
#pragma once

#include "fastq/fastq.h"

namespace fastq {

void dequantize(const fastq_dequantize_args& args);

}  // namespace fastq
