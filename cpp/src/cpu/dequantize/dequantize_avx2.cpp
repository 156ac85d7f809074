#include "cpu/dequantize/dequantize_kernels.hpp"
#include "cpu/dequantize/dequantize_rows.hpp"

namespace fastq::cpu {

const DequantizeRows kDequantizeRowsAvx2 = dequantize_rows;

}  // namespace fastq::cpu
