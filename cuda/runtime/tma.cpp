#include "runtime/tma.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "core/error.hpp"
#include "runtime/device.hpp"

namespace fastq::cuda {
namespace {

// The driver is not linked: the runtime, which has opened it, gives the entry point.
auto encode_function() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found),
          "looking up cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      runtime_error("CUDA: the driver has no cuTensorMapEncodeTiled; update the NVIDIA driver");
    }
    return reinterpret_cast<Encode>(entry);
  }();
  return encode;
}

CUtensorMap encode(const TmaKey& operand) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(operand.cols),
                               static_cast<cuuint64_t>(operand.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(operand.ld)};  // of all but the first
  const cuuint32_t box[2] = {128, static_cast<cuuint32_t>(operand.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode_function()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(operand.data), sizes, strides, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    runtime_error("CUDA: cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  }
  return map;
}

}  // namespace

CUtensorMap cached_operand_map(const TmaKey& operand) {
  return cached_tma<CUtensorMap>(operand, [&] { return encode(operand); });
}

}  // namespace fastq::cuda
