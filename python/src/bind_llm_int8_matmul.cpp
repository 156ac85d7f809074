#include <utility>

#include "tensor.hpp"

namespace fastq_python {
namespace {

// torch keeps a weight as (N, K), the library takes (K, N).
fastq_tensor transposed(fastq_tensor view) {
  if (view.rank == 2) {
    std::swap(view.sizes[0], view.sizes[1]);
    std::swap(view.strides[0], view.strides[1]);
  }
  return view;
}

void llm_int8_matmul(py::handle x, py::handle w, py::handle sw, float threshold, py::handle bias,
                     py::handle outlier_columns, py::handle outlier_weight, bool w_is_constant,
                     py::handle out, py::handle outlier_count) {
  constexpr const char* kOp = "llm_int8_matmul";
  fastq_weight b = {};
  b.struct_size = sizeof(b);
  b.data = transposed(view_of(w, kOp, "w"));
  b.scale = view_of(sw, kOp, "sw");
  fastq_llm_int8_matmul_args args = {};
  args.struct_size = sizeof(args);
  args.x = view_of(x, kOp, "x");
  args.b = &b;
  args.outlier_columns = view_of(outlier_columns, kOp, "outlier_columns");
  args.outlier_weight = transposed(view_of(outlier_weight, kOp, "outlier_weight"));
  args.bias = view_of(bias, kOp, "bias");
  args.out = view_of(out, kOp, "out");
  args.outlier_count = view_of(outlier_count, kOp, "outlier_count");
  args.threshold = threshold;
  args.b_is_constant = w_is_constant;
  args.stream = current_stream(args.x, x);
  TorchWorkspace workspace{kOp, x, {}};
  args.allocate = &TorchWorkspace::allocate;
  args.allocate_context = &workspace;
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_llm_int8_matmul(&args);
  }
  check(status);
}

}  // namespace

void bind_llm_int8_matmul(py::module_& module) { module.def("llm_int8_matmul", &llm_int8_matmul); }

}  // namespace fastq_python
