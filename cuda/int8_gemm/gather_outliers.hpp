// Kernels around the columns of x that hold outliers.
#pragma once

#include "core/problem.hpp"

namespace fastq::cuda {

constexpr int kOutlierCapacity = 64;  // columns that are gathered; the others are read in place

// Words of a mask of K columns.
int64_t mask_words(int64_t K);

// Clears a mask that rows share, and two counters if there are any, before x is quantised.
void clear_outlier_mask(uint32_t* mask, int64_t words, int32_t* counters, int device_index,
                        void* stream);

// Finds and gathers what the problem's product does not gather itself. After x was quantised.
void gather_outliers(const Int8GemmProblem& problem);

}  // namespace fastq::cuda
