#include "cpu/kv_append/kv_append_kernels.hpp"
#include "cpu/kv_append/kv_append_rows.hpp"

namespace fastq::cpu {

const AppendRows kAppendRowsAvx512 = append_rows;

}  // namespace fastq::cpu
