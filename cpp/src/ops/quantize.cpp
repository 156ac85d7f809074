#include "ops/quantize.hpp"

#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/checks.hpp"

namespace fastq {
namespace {

constexpr int kMaxRotation = 32;
// The size of the struct in fastq 0.1.
constexpr size_t kLeastArgs = offsetof(fastq_quantize_args, rotation);

void check_rotation(const char* op, const NamedTensor& x, int rotation) {
  if (rotation == 0) return;
  if (rotation < 2 || rotation > kMaxRotation || (rotation & (rotation - 1)) != 0) {
    invalid_value(std::string(op) + ": rotation is " + std::to_string(rotation) +
                  ", expected 0, 2, 4, 8, 16 or 32");
  }
  if (x.view->sizes[x.view->rank - 1] % rotation != 0) {
    invalid_value(
        std::string(op) + ": " + x.name + " has shape " + shape_text(*x.view) +
        ", expected a last size that is a multiple of rotation = " + std::to_string(rotation));
  }
}

// The operands that have rows, in the order of their strides.
enum Operand { kX, kQ, kScale, kZeroPoint, kResidual, kResidualOut, kUp, kOperands };

// One call: a problem, and the strides of its operands along x's leading dimensions.
struct Call {
  Call(const char* op_name, const char* x_name, const fastq_quantize_args& caller)
      : op(op_name), args(known_struct(op, caller, kLeastArgs, space_)), x{x_name, &args.x} {
    for (const NamedTensor& tensor : {x, q, scale}) check_well_formed(op, tensor);
    for (const NamedTensor& tensor : {zero_point, smooth}) {
      if (is_present(*tensor.view)) check_well_formed(op, tensor);
    }
    check_dtype(op, x, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    check_dtype(op, q, {DType::kInt8});
    check_dtype(op, scale, {DType::kFloat32});
    if (is_present(args.zero_point)) check_dtype(op, zero_point, {DType::kInt32});
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  fastq_quantize_args space_;

 public:
  const char* const op;
  const fastq_quantize_args& args;
  const NamedTensor x, q{"q", &args.q}, scale{"scale", &args.scale};
  const NamedTensor zero_point{"zero_point", &args.zero_point}, smooth{"smooth", &args.smooth};
  QuantizeProblem problem;
  RowStrides strides[kOperands] = {};

  int last() const { return args.x.rank - 1; }
  void set_strides(Operand operand, const TensorView& t) {
    std::copy_n(t.strides, last(), strides[operand].strides);
  }
  // A vector along x's columns, in float32 or x's dtype.
  VectorView columns(const NamedTensor& vector) const {
    if (!is_present(*vector.view)) return {};
    check_dtype(op, vector, {DType::kFloat32, dtype_of(args.x)});
    return column_vector(op, vector, args.x.sizes[last()], "K", false);
  }
  // A matrix like x.
  MatrixView matrix(const NamedTensor& tensor, Operand operand) {
    if (!is_present(*tensor.view)) return {};
    check_dtype(op, tensor, {dtype_of(args.x)});
    check_same_shape(op, tensor, x);
    set_strides(operand, *tensor.view);
    return {tensor.view->data, dtype_of(*tensor.view), 0, tensor.view->strides[last()]};
  }
};

RowStrides scale_strides(const Call& call, const NamedTensor& scale) {
  if (call.args.is_static == 0) return row_strides(call.op, scale, call.x, false);
  if (numel(*scale.view) != 1) {
    invalid_value(std::string(call.op) + ": " + scale.name + " has shape " +
                  shape_text(*scale.view) + ", expected one element of a static scale");
  }
  return {};
}

// What every call has: x, q, scale, zero_point, smooth and the rotation.
void set_quantization(Call& call, std::initializer_list<NamedTensor> others, int min_rank,
                      int max_rank) {
  const char* const op = call.op;
  const fastq_quantize_args& args = call.args;
  check_rank(op, call.x, min_rank, max_rank);
  check_same_device(op, {call.x, call.q, call.scale, call.zero_point, call.smooth});
  for (const NamedTensor& other : others) check_same_device(op, {call.x, other});
  check_same_shape(op, call.q, call.x);
  check_rotation(op, call.x, args.rotation);
  QuantizeProblem& p = call.problem;
  p.smooth = call.columns(call.smooth);
  call.set_strides(kX, args.x);
  call.set_strides(kQ, args.q);
  call.strides[kScale] = scale_strides(call, call.scale);
  if (is_present(args.zero_point)) call.strides[kZeroPoint] = scale_strides(call, call.zero_point);

  check_output(op, call.q, {call.x, call.scale, call.zero_point, call.smooth});
  for (const NamedTensor& other : others) check_output(op, call.q, {other});
  if (args.is_static == 0) {
    check_output(op, call.scale, {call.x, call.zero_point, call.smooth});
    for (const NamedTensor& other : others) check_output(op, call.scale, {other});
    if (is_present(args.zero_point)) {
      check_output(op, call.zero_point, {call.x, call.smooth});
      for (const NamedTensor& other : others) check_output(op, call.zero_point, {other});
    }
  }
  p.cols = args.x.sizes[call.last()];
  p.x_dtype = dtype_of(args.x);
  p.stride_xc = args.x.strides[call.last()];
  p.stride_qc = args.q.strides[call.last()];
  p.is_static = args.is_static != 0;
  p.rotation = args.rotation;
  p.device_index = args.x.device_index;
  p.stream = args.stream;
}

void run(Call& call) {
  const TensorView& x = call.args.x;
  QuantizeProblem& p = call.problem;
  int64_t rows = 1;
  for (int i = 0; i < call.last(); ++i) rows *= x.sizes[i];
  if (rows == 0) return;

  const Backend& backend = backend_for(device_of(x), call.op);
  const int64_t* strides[kOperands];
  for (int i = 0; i < kOperands; ++i) strides[i] = call.strides[i].strides;
  const MatrixView residual = p.residual, up = p.up;
  void* const residual_out = p.residual_out;
  const int64_t size = element_size(p.x_dtype);
  const auto moved = [](const auto* data, int64_t bytes) {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + bytes;
  };
  for_each_row_group(
      call.last(), x.sizes, strides,
      [&](const int64_t* offsets, int64_t group, const int64_t* row_stride) {
        p.rows = group;
        p.x = moved(x.data, offsets[kX] * size);
        p.q = static_cast<int8_t*>(call.args.q.data) + offsets[kQ];
        p.scale = static_cast<float*>(call.args.scale.data) + offsets[kScale];
        if (is_present(call.args.zero_point)) {
          p.zero_point = static_cast<int32_t*>(call.args.zero_point.data) + offsets[kZeroPoint];
        }
        p.residual.data = moved(residual.data, offsets[kResidual] * size);
        p.residual_out = const_cast<char*>(
            moved(static_cast<const void*>(residual_out), offsets[kResidualOut] * size));
        p.up.data = moved(up.data, offsets[kUp] * size);
        p.stride_xr = row_stride[kX], p.stride_qr = row_stride[kQ];
        p.stride_s = row_stride[kScale], p.stride_z = row_stride[kZeroPoint];
        p.residual.stride_m = row_stride[kResidual], p.stride_or = row_stride[kResidualOut];
        p.up.stride_m = row_stride[kUp];
        backend.quantize(p);
      });
}

const fastq_quantize_args& required(const char* op, const fastq_quantize_args* args) {
  if (args == nullptr) invalid_type(std::string(op) + ": quantize is missing");
  return *args;
}

}  // namespace

void quantize_per_token(const fastq_quantize_args& args) {
  Call call("quantize_per_token", "x", args);
  set_quantization(call, {}, 1, FASTQ_MAX_RANK);
  run(call);
}

void quantize_per_channel(const fastq_quantize_args& args) {
  Call call("quantize_per_channel", "w", args);
  for (const NamedTensor& tensor : {call.zero_point, call.smooth}) {
    if (is_present(*tensor.view)) {
      invalid_value(std::string(call.op) + ": " + tensor.name + " must be absent");
    }
  }
  if (call.args.is_static != 0) {
    invalid_value(std::string(call.op) + ": is_static is " + std::to_string(call.args.is_static) +
                  ", expected 0");
  }
  set_quantization(call, {}, 2, 2);
  run(call);
}

void norm_quant(const fastq_norm_quant_args& caller) {
  constexpr const char* kOp = "norm_quant";
  fastq_norm_quant_args space;
  const fastq_norm_quant_args& args = known_struct(kOp, caller, sizeof(space), space);
  Call call(kOp, "x", required(kOp, args.quantize));
  const NamedTensor weight{"weight", &args.weight}, bias{"bias", &args.bias};
  const NamedTensor residual{"residual", &args.residual};
  const NamedTensor residual_out{"residual_out", &args.residual_out};
  for (const NamedTensor& tensor : {weight, bias, residual, residual_out}) {
    if (is_present(*tensor.view)) check_well_formed(kOp, tensor);
  }
  if (is_present(args.residual) != is_present(args.residual_out)) {
    invalid_value(std::string(kOp) + ": only one of residual and residual_out is given");
  }
  if (args.norm != FASTQ_RMS_NORM && args.norm != FASTQ_LAYER_NORM) {
    invalid_value(std::string(kOp) + ": norm is " + std::to_string(args.norm) +
                  ", expected a fastq_norm, 0 or 1");
  }
  if (!(args.eps >= 0)) {
    invalid_value(std::string(kOp) + ": eps is " + std::to_string(args.eps) +
                  ", expected a number that is not negative");
  }
  set_quantization(call, {weight, bias, residual, residual_out}, 1, FASTQ_MAX_RANK);
  QuantizeProblem& p = call.problem;
  p.norm = args.norm == FASTQ_RMS_NORM ? Norm::kRms : Norm::kLayer;
  p.eps = args.eps;
  p.weight = call.columns(weight), p.bias = call.columns(bias);
  p.residual = call.matrix(residual, kResidual);
  if (is_present(args.residual)) {
    call.matrix(residual_out, kResidualOut);
    check_output(kOp, residual_out,
                 {call.x, weight, bias, call.smooth, call.scale, call.zero_point});
    if (may_overlap(args.residual, args.residual_out) &&
        !is_same_view(args.residual, args.residual_out)) {
      invalid_value(std::string(kOp) +
                    ": residual_out overlaps residual in memory; it may be residual itself, with "
                    "the same strides, or lie apart from it");
    }
    p.residual_out = args.residual_out.data;
    p.stride_oc = args.residual_out.strides[call.last()];
  }
  run(call);
}

void activation_quant(const fastq_activation_quant_args& caller) {
  constexpr const char* kOp = "activation_quant";
  fastq_activation_quant_args space;
  const fastq_activation_quant_args& args = known_struct(kOp, caller, sizeof(space), space);
  Call call(kOp, "x", required(kOp, args.quantize));
  const NamedTensor up{"up", &args.up};
  if (is_present(args.up)) check_well_formed(kOp, up);
  if (args.activation < FASTQ_ACTIVATION_NONE || args.activation > FASTQ_ACTIVATION_SILU) {
    invalid_value(std::string(kOp) + ": activation is " + std::to_string(args.activation) +
                  ", expected a fastq_activation, 0 to " + std::to_string(FASTQ_ACTIVATION_SILU));
  }
  set_quantization(call, {up}, 1, FASTQ_MAX_RANK);
  call.problem.activation = static_cast<Activation>(args.activation);
  call.problem.up = call.matrix(up, kUp);
  run(call);
}

}  // namespace fastq
