// The columns of x that hold outliers, gathered for the end of the product.
#pragma once

#include <cstdint>

#include "core/problem.hpp"

namespace fastq::cuda {

constexpr int kOutlierCapacity = 64;  // columns that are gathered; the others are read in place

struct GatheredOutliers {
  uint32_t* masks;  // one for each of `mask_rows` rows of x, or one for all
  int mask_rows;
  int32_t* columns;      // (K,)
  int32_t* num_columns;  // one element
  float *x, *b;          // OutlierSplit's gathered_x and gathered_b
  int64_t stride_x, stride_b;
};

// Words of a mask of K columns.
int64_t mask_words(int64_t K);

// Before x is quantised, where rows share a mask.
void clear_outlier_mask(const LlmInt8MatmulProblem& problem, const GatheredOutliers& to);

// After x was quantised, with its outliers flagged.
void gather_outliers(const LlmInt8MatmulProblem& problem, const GatheredOutliers& to);

}  // namespace fastq::cuda
