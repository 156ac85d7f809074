// TMA descriptors of int8 operands.
#pragma once

#include <cuda.h>

#include "runtime/tma_cache.hpp"

namespace fastq::cuda {

// A K-major int8 operand (rows, cols), its rows ld bytes apart, as TMA reads it: boxes of box_rows
// rows by 128 bytes, swizzled over 128 bytes, zeros past the edges. data and ld are multiples of 16
// bytes.
CUtensorMap cached_operand_map(const TmaKey& operand);

}  // namespace fastq::cuda
