// The CUDA backend's row of the backend table. Registering touches no driver.
#include <string>

#include "core/backend.hpp"
#include "dequantize/dequantize.hpp"
#include "int8_gemm/int8_gemm.hpp"
#include "quantize/quantize.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

size_t no_packed_form(int64_t, int64_t) { return 0; }

std::string describe_backend() {
  std::string json = describe();
  json.pop_back();
  json += ",\"int8_gemm\":[";
  for (const std::string& name : int8_gemm_instances()) {
    if (json.back() != '[') json += ",";
    json += "\"" + name + "\"";
  }
  return json + "]}";
}

constexpr Backend kBackend = {
    &int8_gemm_workspace_size, &int8_gemm, &int8_gemm_describe, &int8_gemm_candidates,
    &no_packed_form,           nullptr,    &quantize,           &dequantize,
    &describe_backend,
};

[[maybe_unused]] const bool registered = register_backend(DeviceType::kCuda, kBackend);

}  // namespace
}  // namespace fastq::cuda
