#include "tensor.hpp"

namespace fastq_python {
namespace {

void dequantize(py::handle q, py::handle scale, py::handle out) {
  fastq_dequantize_args args = {};
  args.struct_size = sizeof(args);
  args.q = view_of(q, "dequantize", "q");
  args.scale = view_of(scale, "dequantize", "s");
  args.out = view_of(out, "dequantize", "out");
  args.stream = current_stream(args.q, q);
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_dequantize(&args);
  }
  check(status);
}

}  // namespace

void bind_dequantize(py::module_& module) { module.def("dequantize", &dequantize); }

}  // namespace fastq_python
