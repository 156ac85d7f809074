// TensorView, and the few questions the ops ask of it.
#pragma once

#include <cstdint>
#include <string>

#include "fastq/fastq.h"

namespace fastq {

using TensorView = ::fastq_tensor;

enum class DType : int32_t {
  kNone = FASTQ_DTYPE_NONE,
  kFloat32 = FASTQ_FLOAT32,
  kFloat16 = FASTQ_FLOAT16,
  kBFloat16 = FASTQ_BFLOAT16,
  kInt8 = FASTQ_INT8,
  kInt32 = FASTQ_INT32,
  kUInt8 = FASTQ_UINT8,
};

enum class DeviceType : int32_t { kCpu = FASTQ_CPU, kCuda = FASTQ_CUDA };

inline DType dtype_of(const TensorView& t) { return static_cast<DType>(t.dtype); }
inline DeviceType device_of(const TensorView& t) { return static_cast<DeviceType>(t.device_type); }
inline bool is_present(const TensorView& t) { return t.dtype != FASTQ_DTYPE_NONE; }

int64_t element_size(DType dtype);  // bytes
const char* dtype_name(DType dtype);
std::string device_name(const TensorView& t);  // "cpu", "cuda:1"
std::string shape_text(const TensorView& t);   // "(2, 3)"
int64_t numel(const TensorView& t);

// The bytes [begin, end) that any element of the view may touch; begin == end when it is empty.
struct ByteRange {
  uintptr_t begin, end;
};
ByteRange byte_range(const TensorView& t);
// Whether the two may have a byte in common. Exact for parts of one tensor that have its strides.
bool may_overlap(const TensorView& x, const TensorView& y);
// Whether every index names the same element, of the same dtype, in both.
bool is_same_view(const TensorView& x, const TensorView& y);

// Whether two different indices may name the same element. Exact for what real programs pass
// (views and slices); a layout that interleaves its dimensions is taken for overlapping.
bool overlaps_itself(const TensorView& t);

}  // namespace fastq
