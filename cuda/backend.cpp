// The CUDA backend's row of the backend table. Registering touches no driver.
#include <string>
#include <vector>

#include "core/backend.hpp"
#include "dequantize/dequantize.hpp"
#include "flash_attention/flash_attention.hpp"
#include "flash_decode/flash_decode.hpp"
#include "int8_gemm/int8_gemm.hpp"
#include "kv_append/kv_append.hpp"
#include "llm_int8_matmul/llm_int8_matmul.hpp"
#include "quantize/quantize.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

size_t no_packed_form(int64_t, int64_t) { return 0; }

void add_names(std::string& json, const char* op, const std::vector<std::string>& names) {
  json += std::string(",\"") + op + "\":[";
  for (const std::string& name : names) json += (json.back() == '[' ? "\"" : ",\"") + name + "\"";
  json += "]";
}

std::string describe_backend() {
  std::string json = describe();
  json.pop_back();
  add_names(json, "int8_gemm", int8_gemm_instances());
  add_names(json, "flash_attention", flash_attention_instances());
  add_names(json, "flash_decode", flash_decode_instances());
  return json + "}";
}

constexpr Backend kBackend = {
    &int8_gemm_workspace_size,
    &int8_gemm,
    &int8_gemm_describe,
    &int8_gemm_candidates,
    &no_packed_form,
    nullptr,
    &quantize,
    &dequantize,
    &describe_backend,
    &flash_attention_workspace_size,
    &flash_attention,
    &flash_decode_workspace_size,
    &flash_decode,
    &flash_decode_appends,
    &kv_append,
    &llm_int8_matmul_workspace_size,
    &llm_int8_matmul,
};

[[maybe_unused]] const bool registered = register_backend(DeviceType::kCuda, kBackend);

}  // namespace
}  // namespace fastq::cuda
