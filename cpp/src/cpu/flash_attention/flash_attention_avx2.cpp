#include "cpu/flash_attention/flash_attention_kernels.hpp"
#include "cpu/flash_attention/flash_attention_rows.hpp"

namespace fastq::cpu {

const AttendRows kAttendRowsAvx2 = attend_rows;

}  // namespace fastq::cpu
