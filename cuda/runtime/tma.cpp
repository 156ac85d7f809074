#include "runtime/tma.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "core/error.hpp"
#include "runtime/device.hpp"
#include "runtime/tma_cache.hpp"

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

// `strides` are bytes, of all dimensions but the first.
template <cuuint32_t kRank>
CUtensorMap encode(CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[kRank],
                   const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  CUtensorMap map;
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult result =
      encode_function()(&map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    runtime_error("CUDA: cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  }
  return map;
}

// A stride that no address needs may be anything, such as 0: TMA wants it to be valid all the same.
cuuint64_t stride_bytes(int64_t size, int64_t stride) {
  return size == 1 ? 16 : static_cast<cuuint64_t>(2 * stride);
}

}  // namespace

CUtensorMap cached_operand_map(const void* data, int64_t rows, int64_t cols, int64_t ld,
                               int box_rows) {
  return cached_tma<CUtensorMap>({data, rows, cols, ld, box_rows}, [&] {
    return encode<2>(CU_TENSOR_MAP_DATA_TYPE_UINT8, data,
                     {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)},
                     {static_cast<cuuint64_t>(ld)}, {128, static_cast<cuuint32_t>(box_rows)});
  });
}

CUtensorMap cached_heads_map(const void* data, const HeadsLayout& t, int box_rows) {
  const TmaKey key{data,           t.batch,       t.heads,      t.rows,  t.cols,
                   t.stride_batch, t.stride_head, t.stride_row, box_rows};
  return cached_tma<CUtensorMap>(key, [&] {
    return encode<4>(CU_TENSOR_MAP_DATA_TYPE_UINT16, data,
                     {static_cast<cuuint64_t>(t.cols), static_cast<cuuint64_t>(t.rows),
                      static_cast<cuuint64_t>(t.heads), static_cast<cuuint64_t>(t.batch)},
                     {stride_bytes(t.rows, t.stride_row), stride_bytes(t.heads, t.stride_head),
                      stride_bytes(t.batch, t.stride_batch)},
                     {64, static_cast<cuuint32_t>(box_rows), 1, 1});
  });
}

}  // namespace fastq::cuda
