#include "ops/int8_gemm.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/checks.hpp"

namespace fastq {
namespace {

// With |a|, |b| <= 128 a sum of more than 131071 products may leave int32.
constexpr int64_t kMaxK = 131071;
constexpr int64_t kMaxKWithZeroPoint = 65535;  // |a - zero_point| <= 255

// The sizes of the structs in fastq 0.1.
constexpr size_t kLeastArgs = offsetof(fastq_int8_gemm_args, zero_point);
constexpr size_t kLeastWeight = offsetof(fastq_weight, column_sums);

const fastq_weight& required(const char* op, const fastq_weight* b) {
  if (b == nullptr) invalid_type(std::string(op) + ": b is missing");
  return *b;
}

// The argument structs of one call as this library knows them.
class Arguments {
 public:
  Arguments(const char* op_name, const fastq_int8_gemm_args& caller)
      : op(op_name),
        args(known_struct(op, caller, kLeastArgs, args_space_)),
        b(known_struct(op, required(op, args.b), kLeastWeight, weight_space_)) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  bool is_packed() const { return b.layout == FASTQ_WEIGHT_PACKED; }

 private:
  fastq_int8_gemm_args args_space_;
  fastq_weight weight_space_;

 public:
  const char* const op;
  const fastq_int8_gemm_args& args;
  const fastq_weight& b;
  const NamedTensor a{"a", &args.a}, weight{"b", &b.data}, out{"out", &args.out};
  const NamedTensor scale_a{"sa", &args.scale_a}, scale_b{"sb", &b.scale}, bias{"bias", &args.bias};
  const NamedTensor zero_point{"zero_point", &args.zero_point};
  const NamedTensor column_sums{"column_sums", &b.column_sums};
  const NamedTensor residual{"residual", &args.residual}, out_scale{"out_scale", &args.out_scale};
};

void check_weight(const char* op, const fastq_weight& b) {
  check_well_formed(op, {"b", &b.data});
  if (b.group_size != 0) not_implemented(std::string(op) + ": b.group_size other than 0");
  if (b.layout == FASTQ_WEIGHT_PACKED) {
    check_dtype(op, {"b", &b.data}, {DType::kUInt8});
    check_rank(op, {"b", &b.data}, 1, 1);
    if (b.k < 0 || b.n < 0) invalid_value(std::string(op) + ": b has a negative size");
  } else if (b.layout == FASTQ_WEIGHT_PLAIN) {
    check_dtype(op, {"b", &b.data}, {DType::kInt8});
    check_rank(op, {"b", &b.data}, 2, 2);
  } else {
    invalid_value(std::string(op) + ": b has an unknown layout " + std::to_string(b.layout));
  }
}

struct MatrixSizes {
  int64_t M, N, K;  // M: the product of a's leading dimensions
};

MatrixSizes check_shapes(const Arguments& call) {
  const char* op = call.op;
  const fastq_weight& b = call.b;
  const bool packed = call.is_packed();
  const int64_t b_k = packed ? b.k : b.data.sizes[0], N = packed ? b.n : b.data.sizes[1];
  const TensorView &a = call.args.a, &out = call.args.out;
  const int64_t K = a.sizes[a.rank - 1];
  if (K != b_k) {
    const std::string b_shape =
        packed ? "(" + std::to_string(b_k) + ", " + std::to_string(N) + ")" : shape_text(b.data);
    invalid_value(std::string(op) + ": a has shape " + shape_text(a) + " and b " + b_shape +
                  "; expected a (..., M, K) and b (K, N)" +
                  (!packed && K == N ? "; was b.t() meant?" : ""));
  }
  const bool shifted = is_present(call.args.zero_point);
  const int64_t most = shifted ? kMaxKWithZeroPoint : kMaxK;
  if (K > most) {
    invalid_value(std::string(op) + ": K = " + std::to_string(K) + ", expected at most " +
                  std::to_string(most) + (shifted ? " with zero_point" : "") +
                  " (a longer sum could overflow int32)");
  }
  bool fits = out.rank == a.rank && out.sizes[a.rank - 1] == N;
  int64_t M = 1;
  for (int i = 0; i + 1 < a.rank; ++i) {
    fits = fits && out.sizes[i] == a.sizes[i];
    M *= a.sizes[i];
  }
  if (!fits) {
    TensorView expected = a;
    expected.sizes[a.rank - 1] = N;
    invalid_value(std::string(op) + ": out has shape " + shape_text(out) + ", expected " +
                  shape_text(expected));
  }
  return {M, N, K};
}

void check_tensors(const Arguments& call) {
  const char* op = call.op;
  for (const NamedTensor* tensor : {&call.a, &call.out}) check_well_formed(op, *tensor);
  for (const NamedTensor* tensor : {&call.scale_a, &call.scale_b, &call.bias, &call.zero_point,
                                    &call.column_sums, &call.residual, &call.out_scale}) {
    if (is_present(*tensor->view)) check_well_formed(op, *tensor);
  }
  check_weight(op, call.b);
  check_dtype(op, call.a, {DType::kInt8});
  check_rank(op, call.a, 2, FASTQ_MAX_RANK);
  check_dtype(op, call.out,
              {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kInt32, DType::kInt8});
  check_same_device(op,
                    {call.a, call.weight, call.scale_a, call.scale_b, call.bias, call.zero_point,
                     call.column_sums, call.residual, call.out_scale, call.out});
}

// Strides along a's leading dimensions; zero for what is absent.
struct LeadingStrides {
  RowStrides scale_a{}, zero_point{}, residual{};
};

void refuse_all_but_zero_point(const Arguments& call) {
  const std::string reason = " must be absent when out is int32 (raw sums)";
  for (const NamedTensor* tensor :
       {&call.scale_a, &call.scale_b, &call.bias, &call.residual, &call.out_scale}) {
    if (is_present(*tensor->view)) {
      invalid_value(std::string(call.op) + ": " + tensor->name + reason);
    }
  }
  if (call.args.activation != FASTQ_ACTIVATION_NONE) {
    invalid_value(std::string(call.op) + ": activation" + reason);
  }
}

void set_scales(const Arguments& call, Int8GemmProblem& p, LeadingStrides& strides) {
  check_dtype(call.op, call.scale_a, {DType::kFloat32});
  check_dtype(call.op, call.scale_b, {DType::kFloat32});
  strides.scale_a = row_strides(call.op, call.scale_a, call.a, true);
  p.scale_a.data = call.args.scale_a.data;
  p.scale_b = column_vector(call.op, call.scale_b, p.N, "N", true);
  if (!is_present(call.args.bias)) return;
  const DType out = dtype_of(call.args.out);
  if (out == DType::kInt8) {
    check_dtype(call.op, call.bias, {DType::kFloat32});
  } else {
    check_dtype(call.op, call.bias, {out, DType::kFloat32});
  }
  p.bias = column_vector(call.op, call.bias, p.N, "N", false);
}

void set_zero_point(const Arguments& call, Int8GemmProblem& p, LeadingStrides& strides) {
  VectorView sums;
  if (is_present(call.b.column_sums)) {
    check_dtype(call.op, call.column_sums, {DType::kInt32});
    sums = column_vector(call.op, call.column_sums, p.N, "N", false);
  }
  if (!is_present(call.args.zero_point)) return;
  check_dtype(call.op, call.zero_point, {DType::kInt32});
  if (!is_present(call.b.column_sums)) {
    invalid_value(std::string(call.op) +
                  ": zero_point needs column_sums, the int32 sums of b over K");
  }
  strides.zero_point = row_strides(call.op, call.zero_point, call.a, true);
  p.zero_point = {call.args.zero_point.data, DType::kInt32, 0};
  p.column_sums = sums;
}

void set_residual(const Arguments& call, Int8GemmProblem& p, LeadingStrides& strides) {
  const TensorView& residual = call.args.residual;
  const TensorView& out = call.args.out;
  if (!is_present(residual)) return;
  check_dtype(call.op, call.residual, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_same_shape(call.op, call.residual, call.out);
  if (may_overlap(residual, out) && !is_same_view(residual, out)) {
    invalid_value(std::string(call.op) +
                  ": out overlaps residual in memory; residual may be out itself, with the same "
                  "dtype and strides, or lie apart from it");
  }
  const int last = residual.rank - 1;
  std::copy_n(residual.strides, last, strides.residual.strides);
  p.residual = {residual.data, dtype_of(residual), 0, residual.strides[last]};
}

void set_activation(const Arguments& call, Int8GemmProblem& p) {
  const int32_t activation = call.args.activation;
  if (activation < FASTQ_ACTIVATION_NONE || activation > FASTQ_ACTIVATION_SILU) {
    invalid_value(std::string(call.op) + ": activation is " + std::to_string(activation) +
                  ", expected a fastq_activation, 0 to " + std::to_string(FASTQ_ACTIVATION_SILU));
  }
  p.activation = static_cast<Activation>(activation);
}

void set_out_scale(const Arguments& call, Int8GemmProblem& p) {
  const TensorView& scale = call.args.out_scale;
  const DType out = dtype_of(call.args.out);
  if (!is_present(scale)) {
    if (out != DType::kInt8) return;
    invalid_value(std::string(call.op) + ": out_scale is missing; an int8 out needs it");
  }
  if (out != DType::kInt8) {
    invalid_value(std::string(call.op) + ": out_scale belongs to an int8 out, but out is " +
                  dtype_name(out));
  }
  check_dtype(call.op, call.out_scale, {DType::kFloat32});
  if (numel(scale) != 1) {
    invalid_value(std::string(call.op) + ": out_scale has shape " + shape_text(scale) +
                  ", expected one element");
  }
  p.out_scale = static_cast<const float*>(scale.data);
}

void set_operands(const Arguments& call, Int8GemmProblem& p) {
  const TensorView &a = call.args.a, &out = call.args.out, &b = call.b.data;
  p.a = static_cast<const int8_t*>(a.data);
  p.stride_ak = a.strides[a.rank - 1];
  if (call.is_packed()) {
    const Backend& backend = backend_for(device_of(a), call.op);
    const size_t need = backend.pack_weight_size(p.K, p.N);
    if (backend.pack_weight == nullptr || static_cast<size_t>(b.sizes[0]) < need ||
        b.strides[0] != 1) {
      invalid_value(std::string(call.op) + ": b is not a packed weight of (" + std::to_string(p.K) +
                    ", " + std::to_string(p.N) + ") for " + device_name(a));
    }
    p.b_packed = b.data;
  } else {
    p.b = static_cast<const int8_t*>(b.data);
    p.stride_bk = b.strides[0], p.stride_bn = b.strides[1];
  }
  p.b_is_constant = call.args.b_is_constant != 0;
  p.out = out.data;
  p.out_dtype = dtype_of(out);
  p.stride_on = out.strides[out.rank - 1];
  p.device_index = a.device_index;
  p.stream = call.args.stream;
}

// Checks everything, and lays the problem out but for what differs between row groups.
Int8GemmProblem checked_problem(const Arguments& call, LeadingStrides& strides) {
  check_tensors(call);
  const MatrixSizes sizes = check_shapes(call);
  Int8GemmProblem p;
  p.M = sizes.M, p.N = sizes.N, p.K = sizes.K;
  set_zero_point(call, p, strides);
  if (dtype_of(call.args.out) == DType::kInt32) {
    refuse_all_but_zero_point(call);
  } else {
    set_scales(call, p, strides);
    set_activation(call, p);
    set_residual(call, p, strides);
    set_out_scale(call, p);
  }
  check_output(call.op, call.out,
               {call.a, call.weight, call.scale_a, call.scale_b, call.bias, call.zero_point,
                call.column_sums, call.out_scale});
  set_operands(call, p);
  return p;
}

const void* advance(const void* data, int64_t elements, DType dtype) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

// Walks the row groups that a, out and everything along M share: one for anything contiguous.
template <class Visit>
void for_each_problem(const char* op, const fastq_int8_gemm_args& caller, const Visit& visit) {
  const Arguments call(op, caller);
  LeadingStrides rows;
  const Int8GemmProblem first = checked_problem(call, rows);
  if (first.M == 0 || first.N == 0) return;
  const TensorView &a = call.args.a, &out = call.args.out;
  const int64_t* const strides[5] = {a.strides, out.strides, rows.scale_a.strides,
                                     rows.zero_point.strides, rows.residual.strides};
  Int8GemmProblem p = first;
  for_each_row_group(
      a.rank - 1, a.sizes, strides,
      [&](const int64_t* offsets, int64_t group, const int64_t* row_stride) {
        p.M = group;
        p.a = first.a + offsets[0];
        p.stride_am = row_stride[0];
        p.out = const_cast<void*>(advance(first.out, offsets[1], first.out_dtype));
        p.stride_om = row_stride[1];
        // A null pointer has offset 0.
        p.scale_a.data = advance(first.scale_a.data, offsets[2], first.scale_a.dtype);
        p.scale_a.stride = row_stride[2];
        p.zero_point.data = advance(first.zero_point.data, offsets[3], first.zero_point.dtype);
        p.zero_point.stride = row_stride[3];
        p.residual.data = advance(first.residual.data, offsets[4], first.residual.dtype);
        p.residual.stride_m = row_stride[4];
        visit(p);
      });
}

// FASTQ_LOG=dispatch: one line a call, with the kernel taken and why.
bool logs_dispatch() {
  const char* log = std::getenv("FASTQ_LOG");
  return log != nullptr && std::strcmp(log, "dispatch") == 0;
}

// "bfloat16+zero_point+silu+residual"
std::string epilogue_text(const Int8GemmProblem& p) {
  constexpr const char* kActivations[] = {"", "+relu", "+gelu", "+gelu_tanh", "+silu"};
  std::string text = dtype_name(p.out_dtype);
  if (p.zero_point.data != nullptr) text += "+zero_point";
  text += kActivations[static_cast<int>(p.activation)];
  if (p.residual.data != nullptr) text += "+residual";
  return text;
}

void log_dispatch(const Backend& backend, const Int8GemmProblem& p) {
  std::fprintf(stderr, "fastq: int8_gemm M=%lld N=%lld K=%lld %s -> %s\n",
               static_cast<long long>(p.M), static_cast<long long>(p.N),
               static_cast<long long>(p.K), epilogue_text(p).c_str(),
               backend.int8_gemm_describe(p).c_str());
}

}  // namespace

size_t int8_gemm_workspace_size(const fastq_int8_gemm_args& args) {
  size_t bytes = 0;
  const Backend& backend = backend_for(device_of(args.a), "int8_gemm");
  for_each_problem("int8_gemm", args, [&](const Int8GemmProblem& p) {
    bytes = std::max(bytes, backend.int8_gemm_workspace_size(p));
  });
  return bytes;
}

void int8_gemm(const fastq_int8_gemm_args& args) {
  const Backend& backend = backend_for(device_of(args.a), "int8_gemm");
  Workspace workspace(args.workspace, args.workspace_size, args.allocate, args.allocate_context);
  for_each_problem("int8_gemm", args, [&](const Int8GemmProblem& p) {
    if (logs_dispatch()) log_dispatch(backend, p);
    backend.int8_gemm(p, workspace);
  });
}

std::string int8_gemm_describe(const fastq_int8_gemm_args& args) {
  const Backend& backend = backend_for(device_of(args.a), "int8_gemm");
  std::string text = "none (an empty product)";
  for_each_problem("int8_gemm", args,
                   [&](const Int8GemmProblem& p) { text = backend.int8_gemm_describe(p); });
  return text;
}

std::vector<std::string> int8_gemm_candidates(const fastq_int8_gemm_args& args) {
  const Backend& backend = backend_for(device_of(args.a), "int8_gemm_candidates");
  if (backend.int8_gemm_candidates == nullptr) {
    not_implemented("int8_gemm_candidates: a is on " + device_name(args.a) +
                    ", expected a CUDA device; only its kernels have configurations to choose");
  }
  std::vector<std::string> names;
  for_each_problem("int8_gemm_candidates", args,
                   [&](const Int8GemmProblem& p) { names = backend.int8_gemm_candidates(p); });
  return names;
}

size_t pack_weight_size(const fastq_weight& caller) {
  fastq_weight space;
  const fastq_weight& weight = known_struct("pack_weight", caller, kLeastWeight, space);
  check_weight("pack_weight", weight);
  const Backend& backend = backend_for(device_of(weight.data), "pack_weight");
  if (weight.layout != FASTQ_WEIGHT_PLAIN) invalid_value("pack_weight: b is packed already");
  if (backend.pack_weight == nullptr) {
    not_implemented("pack_weight: b is on " + device_name(weight.data) +
                    ", where the plain (K, N) form is the fastest; only the CPU has a packed form");
  }
  return backend.pack_weight_size(weight.data.sizes[0], weight.data.sizes[1]);
}

void pack_weight(const fastq_weight& weight, const fastq_tensor& packed) {
  const size_t need = pack_weight_size(weight);
  const NamedTensor b{"b", &weight.data}, out{"packed", &packed};
  check_well_formed("pack_weight", out);
  check_dtype("pack_weight", out, {DType::kUInt8});
  check_rank("pack_weight", out, 1, 1);
  check_same_device("pack_weight", {b, out});
  check_output("pack_weight", out, {b});
  if (static_cast<size_t>(packed.sizes[0]) < need || (need > 0 && packed.strides[0] != 1)) {
    invalid_value("pack_weight: packed holds " + std::to_string(packed.sizes[0]) +
                  " bytes, expected " + std::to_string(need) + ", contiguous");
  }
  const TensorView& w = weight.data;
  backend_for(device_of(w), "pack_weight")
      .pack_weight(static_cast<const int8_t*>(w.data), w.strides[0], w.strides[1], w.sizes[0],
                   w.sizes[1], packed.data);
}

}  // namespace fastq
