#include "core/tensor.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>

#include "core/error.hpp"

namespace fastq {

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt8:
    case DType::kUInt8:
      return 1;
    case DType::kNone:
      break;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kNone:
      return "none";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt8:
      return "int8";
    case DType::kInt32:
      return "int32";
    case DType::kUInt8:
      return "uint8";
  }
  return "unknown";
}

std::string device_name(const TensorView& t) {
  return device_of(t) == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(t.device_index);
}

std::string shape_text(const TensorView& t) {
  std::string text = "(";
  for (int i = 0; i < t.rank; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(t.sizes[i]);
  }
  if (t.rank == 1) text += ",";
  return text + ")";
}

int64_t numel(const TensorView& t) {
  int64_t count = 1;
  for (int i = 0; i < t.rank; ++i) count *= t.sizes[i];
  return count;
}

ByteRange byte_range(const TensorView& t) {
  const auto base = reinterpret_cast<uintptr_t>(t.data);
  if (numel(t) == 0) return {base, base};
  int64_t low = 0, high = 0;
  for (int i = 0; i < t.rank; ++i) {
    const int64_t reach = (t.sizes[i] - 1) * t.strides[i];
    (reach < 0 ? low : high) += reach;
  }
  const int64_t size = element_size(dtype_of(t));
  return {base + static_cast<uintptr_t>(low * size),
          base + static_cast<uintptr_t>((high + 1) * size)};
}

namespace {

// Whether two views with the same strides, y's first element `apart` elements after x's, are parts
// of one larger view without a common element: q, k and v of a fused projection, or keys and values
// that alternate in one cache. `apart` is then a step of so many indices along each dimension, and
// the parts' indices do not meet along one of them.
bool are_apart(const TensorView& x, const TensorView& y, int64_t apart) {
  TensorView whole = x;
  std::array<bool, FASTQ_MAX_RANK> done{};
  bool meet = true;
  for (int n = 0; n < x.rank; ++n) {
    int next = -1;  // the largest stride not yet taken
    for (int i = 0; i < x.rank; ++i) {
      if (!done[i] && (next < 0 || whole.strides[i] > whole.strides[next])) next = i;
    }
    done[next] = true;
    if (x.sizes[next] == 1 && y.sizes[next] == 1) continue;
    const int64_t stride = x.sizes[next] > 1 ? x.strides[next] : y.strides[next];
    const bool same = x.sizes[next] == 1 || y.sizes[next] == 1 || stride == y.strides[next];
    if (!same || stride <= 0) return false;
    const int64_t step = apart / stride;
    apart -= step * stride;
    whole.strides[next] = stride;
    whole.sizes[next] = std::max(x.sizes[next], step + y.sizes[next]);
    meet = meet && step < x.sizes[next];
  }
  return apart == 0 && !meet && !overlaps_itself(whole);
}

}  // namespace

bool may_overlap(const TensorView& x, const TensorView& y) {
  if (x.device_type != y.device_type || x.device_index != y.device_index) return false;
  const ByteRange a = byte_range(x), b = byte_range(y);
  if (a.begin >= b.end || b.begin >= a.end) return false;
  if (x.dtype != y.dtype || x.rank != y.rank) return true;
  const auto at_x = reinterpret_cast<uintptr_t>(x.data), at_y = reinterpret_cast<uintptr_t>(y.data);
  const auto bytes = static_cast<int64_t>(at_x < at_y ? at_y - at_x : at_x - at_y);
  const int64_t size = element_size(dtype_of(x));
  if (bytes % size != 0) return true;
  return at_x < at_y ? !are_apart(x, y, bytes / size) : !are_apart(y, x, bytes / size);
}

bool is_same_view(const TensorView& x, const TensorView& y) {
  bool same = x.data == y.data && x.dtype == y.dtype && x.rank == y.rank;
  for (int i = 0; same && i < x.rank; ++i) {
    same = x.sizes[i] == y.sizes[i] && (x.sizes[i] == 1 || x.strides[i] == y.strides[i]);
  }
  return same;
}

bool overlaps_itself(const TensorView& t) {
  if (numel(t) < 2) return false;
  // (|stride|, size), sorted by insertion: there are at most eight.
  std::array<std::pair<int64_t, int64_t>, FASTQ_MAX_RANK> dims;
  int count = 0;
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] == 1) continue;
    const std::pair<int64_t, int64_t> dim{std::llabs(t.strides[i]), t.sizes[i]};
    int at = count++;
    for (; at > 0 && dim < dims[at - 1]; --at) dims[at] = dims[at - 1];
    dims[at] = dim;
  }
  int64_t reach = 0;  // the largest offset that the smaller dimensions come to
  for (int i = 0; i < count; ++i) {
    if (dims[i].first <= reach) return true;
    reach += dims[i].first * (dims[i].second - 1);
  }
  return false;
}

}  // namespace fastq
