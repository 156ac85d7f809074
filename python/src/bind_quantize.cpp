#include <string>

#include "tensor.hpp"

namespace fastq_python {
namespace {

// What every call has: how it quantises, and where to. With is_static scale and zero_point are
// read; smooth and zero_point may be None.
struct Quantization {
  py::handle q, scale;
  int rotation;
  py::handle smooth, zero_point;
  bool is_static;
};

fastq_quantize_args quantize_args(const char* op, const char* x_name, py::handle x,
                                  const Quantization& how) {
  fastq_quantize_args args = {};
  args.struct_size = sizeof(args);
  args.x = view_of(x, op, x_name);
  args.q = view_of(how.q, op, "q");
  args.scale = view_of(how.scale, op, "scale");
  args.stream = current_stream(args.x, x);
  args.rotation = how.rotation;
  args.is_static = how.is_static;
  args.zero_point = view_of(how.zero_point, op, "zero_point");
  args.smooth = view_of(how.smooth, op, "smooth");
  return args;
}

template <class Args>
void call(fastq_status (*entry)(const Args*), const Args& args) {
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = entry(&args);
  }
  check(status);
}

void quantize_per_token(py::handle x, py::handle q, py::handle scale, int rotation,
                        py::handle smooth, py::handle zero_point, bool is_static) {
  const Quantization how{q, scale, rotation, smooth, zero_point, is_static};
  call(&fastq_quantize_per_token, quantize_args("quantize_per_token", "x", x, how));
}

void quantize_per_channel(py::handle w, py::handle q, py::handle scale, int rotation) {
  const Quantization how{q, scale, rotation, py::none(), py::none(), false};
  call(&fastq_quantize_per_channel, quantize_args("quantize_per_channel", "w", w, how));
}

fastq_norm norm_of(const std::string& name) {
  if (name == "rms") return FASTQ_RMS_NORM;
  if (name == "layer") return FASTQ_LAYER_NORM;
  throw py::value_error("norm_quant: norm is " + name + ", expected rms or layer");
}

void norm_quant(py::handle x, py::handle q, py::handle scale, int rotation, py::handle smooth,
                py::handle zero_point, bool is_static, py::handle weight, py::handle bias,
                py::handle residual, py::handle residual_out, const std::string& norm, float eps) {
  constexpr const char* kOp = "norm_quant";
  const fastq_quantize_args quantize =
      quantize_args(kOp, "x", x, {q, scale, rotation, smooth, zero_point, is_static});
  fastq_norm_quant_args args = {};
  args.struct_size = sizeof(args);
  args.quantize = &quantize;
  args.weight = view_of(weight, kOp, "weight"), args.bias = view_of(bias, kOp, "bias");
  args.residual = view_of(residual, kOp, "residual");
  args.residual_out = view_of(residual_out, kOp, "residual_out");
  args.eps = eps;
  args.norm = norm_of(norm);
  call(&fastq_norm_quant, args);
}

void activation_quant(py::handle x, py::handle q, py::handle scale, int rotation, py::handle smooth,
                      py::handle zero_point, bool is_static, py::handle up, py::handle activation) {
  constexpr const char* kOp = "activation_quant";
  const fastq_quantize_args quantize =
      quantize_args(kOp, "x", x, {q, scale, rotation, smooth, zero_point, is_static});
  fastq_activation_quant_args args = {};
  args.struct_size = sizeof(args);
  args.quantize = &quantize;
  args.up = view_of(up, kOp, "up");
  args.activation = activation_of(activation, kOp);
  call(&fastq_activation_quant, args);
}

}  // namespace

void bind_quantize(py::module_& module) {
  module.def("quantize_per_token", &quantize_per_token);
  module.def("quantize_per_channel", &quantize_per_channel);
  module.def("norm_quant", &norm_quant);
  module.def("activation_quant", &activation_quant);
}

}  // namespace fastq_python
