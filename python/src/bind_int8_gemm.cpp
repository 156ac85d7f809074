#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

#include "tensor.hpp"

namespace fastq_python {
namespace {

struct Call {
  fastq_weight b = {};
  fastq_int8_gemm_args args = {};
};

// The arguments of a product as they come from Python, each None where it is absent.
struct Operands {
  py::handle a, b, sa, sb, bias, out;
  py::handle packed_shape;  // (K, N) when b is a packed weight
  bool b_is_constant;
  // All of them or none: a plain call has no more to look at.
  bool has_options;
  py::handle residual, activation, zero_point, column_sums, out_scale;
};

void fill(Call& call, const Operands& from) {
  const char* op = "int8_gemm";
  call.b.struct_size = sizeof(call.b);
  call.b.data = view_of(from.b, op, "b");
  call.b.scale = view_of(from.sb, op, "sb");
  if (!from.packed_shape.is_none()) {
    call.b.layout = FASTQ_WEIGHT_PACKED;
    call.b.k = py::cast<int64_t>(from.packed_shape[py::int_(0)]);
    call.b.n = py::cast<int64_t>(from.packed_shape[py::int_(1)]);
  }
  call.args.struct_size = sizeof(call.args);
  call.args.b = &call.b;
  call.args.a = view_of(from.a, op, "a");
  call.args.scale_a = view_of(from.sa, op, "sa");
  call.args.bias = view_of(from.bias, op, "bias");
  call.args.out = view_of(from.out, op, "out");
  call.args.b_is_constant = from.b_is_constant;
  call.args.stream = current_stream(call.args.a, from.a);
  if (!from.has_options) return;
  call.b.column_sums = view_of(from.column_sums, op, "column_sums");
  call.args.zero_point = view_of(from.zero_point, op, "zero_point");
  call.args.residual = view_of(from.residual, op, "residual");
  call.args.out_scale = view_of(from.out_scale, op, "out_scale");
  call.args.activation = activation_of(from.activation, op);
}

void run(const Operands& operands) {
  Call call;
  fill(call, operands);
  TorchWorkspace workspace{"int8_gemm", operands.a, {}};
  call.args.allocate = &TorchWorkspace::allocate;
  call.args.allocate_context = &workspace;
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_int8_gemm(&call.args);
  }
  check(status);
}

void int8_gemm(py::handle a, py::handle b, py::handle sa, py::handle sb, py::handle bias,
               py::handle out, py::handle packed_shape, bool b_is_constant, py::handle residual,
               py::handle activation, py::handle zero_point, py::handle column_sums,
               py::handle out_scale) {
  run({a, b, sa, sb, bias, out, packed_shape, b_is_constant, true, residual, activation, zero_point,
       column_sums, out_scale});
}

// A new tensor for the product, or null where the arguments cannot have one: the caller's slower
// path knows the error.
py::object new_output(const Operands& from, py::handle out_dtype) {
  const fastq_tensor a = view_of(from.a, "int8_gemm", "a"), b = view_of(from.b, "int8_gemm", "b");
  fastq_dtype dtype = from.has_options && !from.out_scale.is_none() ? FASTQ_INT8 : FASTQ_BFLOAT16;
  if (!out_dtype.is_none()) dtype = dtype_of(out_dtype);
  const bool packed = !from.packed_shape.is_none();
  if (a.rank < 2 || (!packed && b.rank != 2)) return {};
  if (dtype == FASTQ_DTYPE_NONE || dtype == FASTQ_UINT8) return {};
  int64_t sizes[FASTQ_MAX_RANK];
  std::copy_n(a.sizes, a.rank, sizes);
  sizes[a.rank - 1] = packed ? py::cast<int64_t>(from.packed_shape[py::int_(1)]) : b.sizes[1];
  return sizes[a.rank - 1] < 0 ? py::object() : allocate(sizes, a.rank, dtype, from.a);
}

// int8_gemm_direct(a, b, sa, sb, bias, out, out_dtype, packed_shape, b_is_constant[, residual,
// activation, zero_point, column_sums, out_scale]) -> Tensor | None: runs the product and returns
// out, a new one when it is None; or returns None where torch's dispatcher has to see the call. A
// plain C function: pybind11's own call costs 0.3 us.
PyObject* int8_gemm_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kPlain = 9, kWithOptions = 14;
  try {
    if (count != kPlain && count != kWithOptions) {
      throw py::type_error("int8_gemm_direct takes 9 or 14 arguments");
    }
    Operands from{};
    from.a = args[0], from.b = args[1], from.sa = args[2], from.sb = args[3];
    from.bias = args[4], from.out = args[5], from.packed_shape = args[7];
    if (!PyBool_Check(args[8])) {
      throw py::type_error(std::string("int8_gemm: b_is_constant is a ") +
                           Py_TYPE(args[8])->tp_name + ", expected a bool");
    }
    from.b_is_constant = args[8] == Py_True;
    from.has_options = count == kWithOptions;
    if (from.has_options) {
      from.residual = args[9], from.activation = args[10], from.zero_point = args[11];
      from.column_sums = args[12], from.out_scale = args[13];
    }
    const py::handle tensors[] = {from.a,           from.b,        from.sa,       from.sb,
                                  from.bias,        from.out,      from.residual, from.zero_point,
                                  from.column_sums, from.out_scale};
    if (from.b.is_none()) Py_RETURN_NONE;
    if (!is_direct(tensors, from.has_options ? std::size(tensors) : 6)) Py_RETURN_NONE;
    py::object out = py::reinterpret_borrow<py::object>(from.out);
    if (out.is_none()) {
      out = new_output(from, args[6]);
      if (!out) Py_RETURN_NONE;
      from.out = out;
    }
    run(from);
    return out.release().ptr();
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
                               py::handle out, py::handle packed_shape, py::handle out_scale,
                               bool b_is_constant) {
  const py::none none;
  Call call;
  fill(call, {a, b, sa, sb, none, out, packed_shape, b_is_constant, true, none, none, none, none,
              out_scale});
  char text[128];
  check(fastq_int8_gemm_describe(&call.args, text, sizeof(text)));
  return text;
}

// Names of configurations, one a line.
std::string int8_gemm_candidates(py::handle a, py::handle b, py::handle sa, py::handle sb,
                                 py::handle out, bool b_is_constant) {
  const py::none none;
  Call call;
  fill(call, {a, b, sa, sb, none, out, none, b_is_constant, false, none, none, none, none, none});
  char text[8192];
  check(fastq_int8_gemm_candidates(&call.args, text, sizeof(text)));
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
  module.def("int8_gemm_candidates", &int8_gemm_candidates);
  module.def("pack_weight", &pack_weight);
}

}  // namespace fastq_python
