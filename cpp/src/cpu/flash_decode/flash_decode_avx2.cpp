#include "cpu/flash_decode/flash_decode_kernels.hpp"
#include "cpu/flash_decode/flash_decode_rows.hpp"

namespace fastq::cpu {

const DecodeKernels kDecodeAvx2 = {attend_cache, combine_parts, kFewRows};

}  // namespace fastq::cpu
