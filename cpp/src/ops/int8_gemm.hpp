// int8_gemm: every check, then the backend. See fastq.h for the formula and the shapes.
#pragma once

#include <string>
#include <vector>

#include "fastq/fastq.h"

namespace fastq {

size_t int8_gemm_workspace_size(const fastq_int8_gemm_args& args);
void int8_gemm(const fastq_int8_gemm_args& args);
std::string int8_gemm_describe(const fastq_int8_gemm_args& args);
std::vector<std::string> int8_gemm_candidates(const fastq_int8_gemm_args& args);

size_t pack_weight_size(const fastq_weight& weight);
void pack_weight(const fastq_weight& weight, const fastq_tensor& packed);

}  // namespace fastq
