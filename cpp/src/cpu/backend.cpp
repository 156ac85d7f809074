// The CPU's entries in the table of backends.
#include "core/backend.hpp"

#include <string>

#include "cpu/dequantize/dequantize.hpp"
#include "cpu/flash_attention/flash_attention.hpp"
#include "cpu/flash_decode/flash_decode.hpp"
#include "cpu/int8_gemm/int8_gemm.hpp"
#include "cpu/int8_gemm/pack.hpp"
#include "cpu/isa.hpp"
#include "cpu/kv_append/kv_append.hpp"
#include "cpu/llm_int8_matmul/llm_int8_matmul.hpp"
#include "cpu/quantize/quantize.hpp"
#include "cpu/thread_pool.hpp"

namespace fastq::cpu {
namespace {

std::string describe() {
  return std::string("{\"isa\":\"") + isa_name(active_isa()) +
         "\",\"threads\":" + std::to_string(get_num_threads()) +
         ",\"available\":" + supported_isas_json() + "}";
}

// The table of backends keeps its address.
const Backend kBackend = {int8_gemm_workspace_size,
                          int8_gemm,
                          int8_gemm_describe,
                          nullptr,
                          packed_weight_size,
                          pack_weight,
                          quantize,
                          dequantize,
                          describe,
                          flash_attention_workspace_size,
                          flash_attention,
                          flash_decode_workspace_size,
                          flash_decode,
                          nullptr,
                          kv_append,
                          llm_int8_matmul_workspace_size,
                          llm_int8_matmul};

[[maybe_unused]] const bool registered = register_backend(DeviceType::kCpu, kBackend);

}  // namespace
}  // namespace fastq::cpu
