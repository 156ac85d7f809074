#include "cpu/quantize/quantize_kernels.hpp"
#include "cpu/quantize/quantize_rows.hpp"

namespace fastq::cpu {

const QuantizeRows kQuantizeRowsScalar = quantize_rows;

}  // namespace fastq::cpu
