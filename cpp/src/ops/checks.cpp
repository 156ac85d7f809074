#include "ops/checks.hpp"

#include "core/error.hpp"

namespace fastq {
namespace {

std::string prefix(const char* op, const NamedTensor& tensor) {
  return std::string(op) + ": " + tensor.name;
}

}  // namespace

void check_struct_size(const char* op, const void* args, size_t got, size_t least, size_t known) {
  constexpr size_t kMost = 1 << 16;  // no struct will ever come near
  if (got < least || got > kMost) {
    const bool less = got < least;
    invalid_value(std::string(op) + ": struct_size is " + std::to_string(got) + ", expected at " +
                  (less ? "least " : "most ") + std::to_string(less ? least : kMost) +
                  "; set it to sizeof the argument struct");
  }
  const char* bytes = static_cast<const char*>(args);
  for (size_t i = known; i < got; ++i) {
    if (bytes[i] == 0) continue;
    not_implemented(std::string(op) + ": struct_size is " + std::to_string(got) +
                    ", and a field past the " + std::to_string(known) +
                    " bytes that this libfastq knows is set; the program needs a newer libfastq");
  }
}

void check_well_formed(const char* op, const NamedTensor& tensor) {
  const TensorView& t = *tensor.view;
  if (t.rank < 0 || t.rank > FASTQ_MAX_RANK) {
    invalid_value(prefix(op, tensor) + " has rank " + std::to_string(t.rank) +
                  ", expected at most " + std::to_string(FASTQ_MAX_RANK));
  }
  if (t.device_type != FASTQ_CPU && t.device_type != FASTQ_CUDA) {
    invalid_type(prefix(op, tensor) + " is on an unknown device type " +
                 std::to_string(t.device_type) + ", expected cpu or cuda");
  }
  if (element_size(dtype_of(t)) == 0) {
    invalid_type(prefix(op, tensor) + (is_present(t) ? " has an unknown dtype" : " is missing"));
  }
  for (int i = 0; i < t.rank; ++i) {
    if (t.sizes[i] < 0) invalid_value(prefix(op, tensor) + " has a negative size");
  }
  if (t.data == nullptr && numel(t) > 0) {
    invalid_value(prefix(op, tensor) + " of shape " + shape_text(t) + " has a null data pointer");
  }
}

void check_dtype(const char* op, const NamedTensor& tensor, std::initializer_list<DType> allowed) {
  for (const DType dtype : allowed) {
    if (dtype == dtype_of(*tensor.view)) return;
  }
  std::string names;
  for (const DType dtype : allowed) {
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  invalid_type(prefix(op, tensor) + " has dtype " + dtype_name(dtype_of(*tensor.view)) +
               ", expected " + names);
}

void check_rank(const char* op, const NamedTensor& tensor, int at_least, int at_most) {
  const int rank = tensor.view->rank;
  if (rank >= at_least && rank <= at_most) return;
  std::string expected = std::to_string(at_least);
  if (at_most == FASTQ_MAX_RANK) {
    expected = at_least == 0 ? "at most 8" : "at least " + expected;
  } else if (at_most != at_least) {
    expected += " to " + std::to_string(at_most);
  }
  invalid_value(prefix(op, tensor) + " has shape " + shape_text(*tensor.view) + " (rank " +
                std::to_string(rank) + "), expected rank " + expected);
}

void check_same_device(const char* op, std::initializer_list<NamedTensor> tensors) {
  const NamedTensor& first = *tensors.begin();
  for (const NamedTensor& tensor : tensors) {
    if (!is_present(*tensor.view)) continue;
    if (tensor.view->device_type != first.view->device_type ||
        tensor.view->device_index != first.view->device_index) {
      invalid_type(prefix(op, tensor) + " is on " + device_name(*tensor.view) + ", expected " +
                   device_name(*first.view) + " as " + first.name + " is");
    }
  }
}

void check_same_shape(const char* op, const NamedTensor& tensor, const NamedTensor& like) {
  bool same = tensor.view->rank == like.view->rank;
  for (int i = 0; same && i < like.view->rank; ++i) {
    same = tensor.view->sizes[i] == like.view->sizes[i];
  }
  if (!same) wrong_shape(op, tensor, shape_text(*like.view) + " as " + like.name + " has");
}

void wrong_shape(const char* op, const NamedTensor& tensor, const std::string& expected) {
  invalid_value(prefix(op, tensor) + " has shape " + shape_text(*tensor.view) + ", expected " +
                expected);
}

void check_output(const char* op, const NamedTensor& out,
                  std::initializer_list<NamedTensor> inputs) {
  if (out.view->flags & FASTQ_READ_ONLY) invalid_value(prefix(op, out) + " is read-only");
  if (overlaps_itself(*out.view)) {
    invalid_value(prefix(op, out) + " of shape " + shape_text(*out.view) +
                  " overlaps itself (an expanded tensor?): each element must have its own memory");
  }
  for (const NamedTensor& input : inputs) {
    if (is_present(*input.view) && may_overlap(*out.view, *input.view)) {
      invalid_value(prefix(op, out) + " overlaps " + input.name + " in memory");
    }
  }
}

RowStrides row_strides(const char* op, const NamedTensor& scale, const NamedTensor& rows,
                       bool scalar_allowed) {
  const TensorView& s = *scale.view;
  const TensorView& x = *rows.view;
  const int leading = x.rank - 1;
  RowStrides result{};
  if (scalar_allowed && numel(s) == 1) return result;

  const bool column = s.rank == leading + 1 && s.sizes[s.rank - 1] == 1;
  if (s.rank == leading || column) {
    bool same = true;
    for (int i = 0; i < leading; ++i) same = same && s.sizes[i] == x.sizes[i];
    if (same) {
      for (int i = 0; i < leading; ++i) result.strides[i] = s.strides[i];
      return result;
    }
  }
  int64_t flat = 1;
  for (int i = 0; i < leading; ++i) flat *= x.sizes[i];
  const bool is_flat = s.rank == 1 || (s.rank == 2 && s.sizes[1] == 1);
  if (is_flat && s.sizes[0] == flat) {
    int64_t stride = s.strides[0];
    for (int i = leading - 1; i >= 0; --i) {
      result.strides[i] = stride;
      stride *= x.sizes[i];
    }
    return result;
  }
  invalid_value(prefix(op, scale) + " has shape " + shape_text(s) + ", expected " +
                (scalar_allowed ? "a scalar, " : "") + rows.name +
                ".shape[:-1], that plus (1,), or flat (" + std::to_string(flat) + ",), for " +
                rows.name + " of shape " + shape_text(x));
}

VectorView column_vector(const char* op, const NamedTensor& vector, int64_t length,
                         const char* length_name, bool scalar_allowed) {
  const TensorView& v = *vector.view;
  const bool row = v.rank == 2 && v.sizes[0] == 1;
  const bool fits = (v.rank == 1 || row) && v.sizes[v.rank - 1] == length;
  const bool scalar = scalar_allowed && numel(v) == 1;
  if (!fits && !scalar) {
    const std::string n = std::to_string(length);
    invalid_value(prefix(op, vector) + " has shape " + shape_text(v) + ", expected " +
                  (scalar_allowed ? "a scalar, " : "") + "(" + n + ",) or (1, " + n + ") with " +
                  length_name + " = " + n);
  }
  return {v.data, dtype_of(v), fits && v.sizes[v.rank - 1] > 1 ? v.strides[v.rank - 1] : 0};
}

}  // namespace fastq
