#include <exception>
#include <iterator>

#include "tensor.hpp"

namespace fastq_python {
namespace {

struct Call {
  fastq_weight b = {};
  fastq_int8_gemm_args args = {};
};

// `packed_shape` is (K, N) when b is a packed weight, else None.
void fill(Call& call, py::handle a, py::handle b, py::handle sa, py::handle sb, py::handle bias,
          py::handle out, py::handle packed_shape) {
  const char* op = "int8_gemm";
  call.b.struct_size = sizeof(call.b);
  call.b.data = view_of(b, op, "b");
  call.b.scale = view_of(sb, op, "sb");
  if (!packed_shape.is_none()) {
    call.b.layout = FASTQ_WEIGHT_PACKED;
    call.b.k = py::cast<int64_t>(packed_shape[py::int_(0)]);
    call.b.n = py::cast<int64_t>(packed_shape[py::int_(1)]);
  }
  call.args.struct_size = sizeof(call.args);
  call.args.b = &call.b;
  call.args.a = view_of(a, op, "a");
  call.args.scale_a = view_of(sa, op, "sa");
  call.args.bias = view_of(bias, op, "bias");
  call.args.out = view_of(out, op, "out");
  call.args.stream = current_stream(call.args.a, a);
}

// The workspace comes from torch's allocator, in the order of the current stream. The library asks
// while the GIL is released.
struct TorchWorkspace {
  py::handle like;
  py::object held;

  static void* allocate(void* context, size_t bytes) noexcept {
    const py::gil_scoped_acquire acquire;
    auto& self = *static_cast<TorchWorkspace*>(context);
    try {
      self.held = fastq_python::allocate(bytes, self.like);
      return view_of(self.held, "int8_gemm", "workspace").data;
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("fastq.int8_gemm");
      return nullptr;
    }
  }
};

void int8_gemm(py::handle a, py::handle b, py::handle sa, py::handle sb, py::handle bias,
               py::handle out, py::handle packed_shape) {
  Call call;
  fill(call, a, b, sa, sb, bias, out, packed_shape);
  TorchWorkspace workspace{a, {}};
  call.args.allocate = &TorchWorkspace::allocate;
  call.args.allocate_context = &workspace;
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_int8_gemm(&call.args);
  }
  check(status);
}

// int8_gemm_direct(a, b, sa, sb, bias, out, packed_shape) -> bool: runs the product and returns
// True, or returns False where torch's dispatcher has to see the call. A plain C function:
// pybind11's own call costs 0.3 us.
PyObject* int8_gemm_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count != 7) throw py::type_error("int8_gemm_direct takes 7 arguments");
    const py::handle a = args[0], b = args[1], sa = args[2], sb = args[3], bias = args[4];
    const py::handle out = args[5], packed_shape = args[6];
    const py::handle tensors[] = {a, b, sa, sb, bias, out};
    if (b.is_none() || out.is_none() || !is_direct(tensors, std::size(tensors))) Py_RETURN_FALSE;
    int8_gemm(a, b, sa, sb, bias, out, packed_shape);
    Py_RETURN_TRUE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

std::string int8_gemm_describe(py::handle a, py::handle b, py::handle sa, py::handle sb,
                               py::handle bias, py::handle out, py::handle packed_shape) {
  Call call;
  fill(call, a, b, sa, sb, bias, out, packed_shape);
  char text[128];
  check(fastq_int8_gemm_describe(&call.args, text, sizeof(text)));
  return text;
}

// Returns the packed form of b, (K, N) int8, as (bytes,) uint8.
py::object pack_weight(py::handle b) {
  fastq_weight weight = {};
  weight.struct_size = sizeof(weight);
  weight.data = view_of(b, "pack_weight", "b");
  size_t bytes = 0;
  check(fastq_pack_weight_size(&weight, &bytes));
  py::object packed = allocate(bytes, b);
  const fastq_tensor view = view_of(packed, "pack_weight", "packed");
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_pack_weight(&weight, &view);
  }
  check(status);
  return packed;
}

}  // namespace

void bind_int8_gemm(py::module_& module) {
  module.def("int8_gemm", &int8_gemm);
  static PyMethodDef methods[] = {
      {"int8_gemm_direct",
       reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&int8_gemm_direct)),
       METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  module.def("int8_gemm_describe", &int8_gemm_describe);
  module.def("pack_weight", &pack_weight);
}

}  // namespace fastq_python
