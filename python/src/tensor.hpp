// From torch tensors to fastq_tensor views, and from a status to a Python exception.
#pragma once

#include <pybind11/pybind11.h>

#include "fastq/fastq.h"

namespace fastq_python {

namespace py = pybind11;

// A view of `object` (a torch.Tensor; None gives an absent view). The view borrows: keep the tensor
// alive. `name` is the argument's, for the message of a TypeError.
fastq_tensor view_of(py::handle object, const char* op, const char* name);

// A view of a cache of keys and values, by the names that the ops on one give its tensors.
fastq_kv_cache cache_of(const char* op, py::handle k_cache, py::handle v_cache,
                        py::handle cache_seqlens, py::handle block_table, py::handle k_scale,
                        py::handle v_scale);

// The stream that torch currently uses on the tensor's device; null on the CPU.
void* current_stream(const fastq_tensor& tensor, py::handle object);

// Raises the Python exception of a failed call.
void check(fastq_status status);

// torch.empty(bytes, dtype=uint8) on the device of `like`.
py::object allocate(size_t bytes, py::handle like);

// torch.empty(sizes, dtype=dtype) on the device of `like`.
py::object allocate(const int64_t* sizes, int rank, fastq_dtype dtype, py::handle like);

// A workspace from torch's allocator, in the order of the current stream, for an op's `allocate`
// and `allocate_context`. The library asks while the GIL is released.
struct TorchWorkspace {
  const char* op;
  py::handle like;
  py::object held;

  static void* allocate(void* self, size_t bytes) noexcept;
};

// The fastq_dtype of a torch.dtype; FASTQ_DTYPE_NONE when there is none.
fastq_dtype dtype_of(py::handle torch_dtype);

// The fastq_activation of a name such as "silu"; None is none.
fastq_activation activation_of(py::handle name, const char* op);

// Whether a kernel may be called directly, past torch's dispatcher: each tensor is a plain
// torch.Tensor (or None) that asks for no gradient, the first has memory, and no probe finds a
// mode. The dispatcher costs as much as all the rest of a small call and does nothing for such a
// one.
bool is_direct(const py::handle* tensors, size_t count);

// is_grad_enabled: torch's; probes: callables that return something false in plain eager mode.
void set_mode_probes(py::object is_grad_enabled, py::tuple probes);

void bind_int8_gemm(py::module_& module);
void bind_quantize(py::module_& module);
void bind_dequantize(py::module_& module);
void bind_flash_attention(py::module_& module);
void bind_flash_decode(py::module_& module);
void bind_kv_append(py::module_& module);
void bind_llm_int8_matmul(py::module_& module);

}  // namespace fastq_python
