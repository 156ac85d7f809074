// TMA descriptors of operands: boxes of rows of 128 bytes, swizzled over 128 bytes, with zeros past
// the edges. Data and strides are multiples of 16 bytes.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fastq::cuda {

// A K-major int8 operand (rows, cols), its rows ld bytes apart, in boxes of box_rows rows.
CUtensorMap cached_operand_map(const void* data, int64_t rows, int64_t cols, int64_t ld,
                               int box_rows);

// A tensor of 16-bit elements (batch, heads, rows, cols) of any strides (elements), those of cols
// being 1, in boxes of box_rows rows by 64 columns.
struct HeadsLayout {
  int64_t batch, heads, rows, cols;
  int64_t stride_batch, stride_head, stride_row;
};
CUtensorMap cached_heads_map(const void* data, const HeadsLayout& layout, int box_rows);

}  // namespace fastq::cuda
