#include "cpu/dequantize/dequantize_kernels.hpp"
#include "cpu/dequantize/dequantize_rows.hpp"

namespace fastq::cpu {

const DequantizeRows kDequantizeRowsScalar = dequantize_rows;

}  // namespace fastq::cpu
