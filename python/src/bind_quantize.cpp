#include "tensor.hpp"

namespace fastq_python {
namespace {

using Entry = fastq_status (*)(const fastq_quantize_args*);

void quantize(Entry entry, const char* op, const char* x_name, py::handle x, py::handle q,
              py::handle scale, int rotation) {
  fastq_quantize_args args = {};
  args.struct_size = sizeof(args);
  args.x = view_of(x, op, x_name);
  args.q = view_of(q, op, "q");
  args.scale = view_of(scale, op, "scale");
  args.stream = current_stream(args.x, x);
  args.rotation = rotation;
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = entry(&args);
  }
  check(status);
}

}  // namespace

void bind_quantize(py::module_& module) {
  module.def("quantize_per_token", [](py::handle x, py::handle q, py::handle scale, int rotation) {
    quantize(&fastq_quantize_per_token, "quantize_per_token", "x", x, q, scale, rotation);
  });
  module.def(
      "quantize_per_channel", [](py::handle w, py::handle q, py::handle scale, int rotation) {
        quantize(&fastq_quantize_per_channel, "quantize_per_channel", "w", w, q, scale, rotation);
      });
}

}  // namespace fastq_python
