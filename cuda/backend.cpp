// The CUDA backend's row of the backend table. Registering touches no driver.
#include "core/backend.hpp"
#include "dequantize/dequantize.hpp"
#include "int8_gemm/int8_gemm.hpp"
#include "quantize/quantize.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

size_t no_packed_form(int64_t, int64_t) { return 0; }

constexpr Backend kBackend = {
    &int8_gemm_workspace_size,
    &int8_gemm,
    &int8_gemm_describe,
    &no_packed_form,
    nullptr,
    &quantize,
    &dequantize,
    &describe,
};

[[maybe_unused]] const bool registered = register_backend(DeviceType::kCuda, kBackend);

}  // namespace
}  // namespace fastq::cuda
