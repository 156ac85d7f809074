#include "ops/llm_int8_matmul.hpp"

#include <optional>
#include <string>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/checks.hpp"

namespace fastq {
namespace {

constexpr const char* kOp = "llm_int8_matmul";
// With |q|, |b| <= 128 a sum of more products may leave int32.
constexpr int64_t kMaxK = 131071;

const fastq_weight& required(const fastq_weight* b) {
  if (b == nullptr) invalid_type(std::string(kOp) + ": b is missing");
  return *b;
}

// The argument structs of one call as this library knows them.
class Arguments {
 public:
  explicit Arguments(const fastq_llm_int8_matmul_args& caller)
      : args(known_struct(kOp, caller, sizeof(caller), args_space_)),
        b(known_struct(kOp, required(args.b), sizeof(fastq_weight), weight_space_)) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

 private:
  fastq_llm_int8_matmul_args args_space_;
  fastq_weight weight_space_;

 public:
  const fastq_llm_int8_matmul_args& args;
  const fastq_weight& b;
  const NamedTensor x{"x", &args.x}, weight{"b", &b.data}, scale_b{"sb", &b.scale};
  const NamedTensor columns{"outlier_columns", &args.outlier_columns};
  const NamedTensor kept{"outlier_weight", &args.outlier_weight};
  const NamedTensor bias{"bias", &args.bias}, out{"out", &args.out};
  const NamedTensor count{"outlier_count", &args.outlier_count};
};

void check_tensors(const Arguments& call) {
  for (const NamedTensor& tensor : {call.x, call.weight, call.scale_b, call.out}) {
    check_well_formed(kOp, tensor);
  }
  for (const NamedTensor& tensor : {call.columns, call.kept, call.bias, call.count}) {
    if (is_present(*tensor.view)) check_well_formed(kOp, tensor);
  }
  for (const NamedTensor& tensor : {call.x, call.out}) {
    check_dtype(kOp, tensor, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  }
  if (call.b.layout != FASTQ_WEIGHT_PLAIN || call.b.group_size != 0) {
    not_implemented(std::string(kOp) + ": b is packed or has groups, expected a plain weight");
  }
  check_dtype(kOp, call.weight, {DType::kInt8});
  check_rank(kOp, call.weight, 2, 2);
  check_dtype(kOp, call.scale_b, {DType::kFloat32});
  check_rank(kOp, call.x, 2, FASTQ_MAX_RANK);
  check_same_device(kOp, {call.x, call.weight, call.scale_b, call.columns, call.kept, call.bias,
                          call.out, call.count});
}

void set_sizes(const Arguments& call, LlmInt8MatmulProblem& p) {
  const TensorView &x = call.args.x, &out = call.args.out, &b = call.b.data;
  p.K = x.sizes[x.rank - 1], p.N = b.sizes[1];
  if (p.K != b.sizes[0]) {
    invalid_value(std::string(kOp) + ": x has shape " + shape_text(x) + " and b " + shape_text(b) +
                  "; expected x (..., M, K) and b (K, N)");
  }
  if (p.K > kMaxK) {
    invalid_value(std::string(kOp) + ": K = " + std::to_string(p.K) + ", expected at most " +
                  std::to_string(kMaxK) + " (a longer sum could overflow int32)");
  }
  TensorView expected = x;
  expected.sizes[x.rank - 1] = p.N;
  bool fits = out.rank == x.rank;
  for (int i = 0; fits && i < x.rank; ++i) fits = out.sizes[i] == expected.sizes[i];
  if (!fits) {
    invalid_value(std::string(kOp) + ": out has shape " + shape_text(out) + ", expected " +
                  shape_text(expected));
  }
}

// x's rows and out's, with one stride each.
void set_rows(const Arguments& call, LlmInt8MatmulProblem& p) {
  const TensorView &x = call.args.x, &out = call.args.out;
  const int last = x.rank - 1;
  const int64_t* const strides[2] = {x.strides, out.strides};
  p.M = 1;
  for (int i = 0; i < last; ++i) p.M *= x.sizes[i];
  if (p.M > 0) {
    for_each_row_group(
        last, x.sizes, strides, [&](const int64_t*, int64_t group, const int64_t* row_stride) {
          if (group == p.M) {
            p.split.x.stride_m = row_stride[0], p.stride_om = row_stride[1];
            return;
          }
          invalid_value(std::string(kOp) + ": the rows of x or of out have no stride " +
                        "in common, expected leading dimensions that can be one");
        });
  }
  p.split.x.data = x.data, p.split.x.dtype = dtype_of(x);
  p.split.x.stride_n = x.strides[last];
  p.out = out.data, p.out_dtype = dtype_of(out);
  p.stride_on = out.strides[last];
}

void set_kept(const Arguments& call, LlmInt8MatmulProblem& p) {
  const TensorView &columns = call.args.outlier_columns, &kept = call.args.outlier_weight;
  if (is_present(columns) != is_present(kept)) {
    invalid_value(std::string(kOp) + ": only one of outlier_columns and outlier_weight is given");
  }
  if (!is_present(columns)) return;
  check_dtype(kOp, call.columns, {DType::kInt32});
  check_rank(kOp, call.columns, 1, 1);
  check_dtype(kOp, call.kept, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  const int64_t count = columns.sizes[0];
  if (kept.rank != 2 || kept.sizes[0] != count || kept.sizes[1] != p.N) {
    wrong_shape(kOp, call.kept,
                "(" + std::to_string(count) + ", " + std::to_string(p.N) + "), (C, N)");
  }
  if (count > p.K) {
    invalid_value(std::string(kOp) + ": outlier_columns holds " + std::to_string(count) +
                  " columns, expected at most K = " + std::to_string(p.K));
  }
  p.split.kept_columns = static_cast<const int32_t*>(columns.data);
  p.split.stride_columns = columns.strides[0];
  p.split.num_kept = count;
  p.split.kept = {kept.data, dtype_of(kept), kept.strides[0], kept.strides[1]};
}

// Of memory that the host can read.
void check_columns(const LlmInt8MatmulProblem& p) {
  int64_t before = -1;
  for (int64_t i = 0; i < p.split.num_kept; ++i) {
    const int64_t column = p.split.kept_columns[i * p.split.stride_columns];
    if (column <= before || column >= p.K) {
      invalid_value(std::string(kOp) + ": outlier_columns[" + std::to_string(i) + "] is " +
                    std::to_string(column) + ", expected ascending columns from 0 to " +
                    std::to_string(p.K - 1));
    }
    before = column;
  }
}

const Backend& backend_of(const TensorView& x) {
  const Backend& backend = backend_for(device_of(x), kOp);
  if (backend.llm_int8_matmul == nullptr) {
    not_implemented(std::string(kOp) + ": x is on " + device_name(x) +
                    ", expected a CPU tensor; there is no kernel for this device yet");
  }
  return backend;
}

// Nothing where there is nothing to write.
std::optional<LlmInt8MatmulProblem> checked(const Arguments& call) {
  check_tensors(call);
  LlmInt8MatmulProblem p;
  set_sizes(call, p);
  set_rows(call, p);
  p.scale_b = column_vector(kOp, call.scale_b, p.N, "N", true);
  if (is_present(call.args.bias)) {
    check_dtype(kOp, call.bias, {p.out_dtype, DType::kFloat32});
    p.bias = column_vector(kOp, call.bias, p.N, "N", false);
  }
  set_kept(call, p);
  if (!(call.args.threshold >= 0)) {
    invalid_value(std::string(kOp) + ": threshold is " + std::to_string(call.args.threshold) +
                  ", expected a number that is not negative");
  }
  check_output(kOp, call.out,
               {call.x, call.weight, call.scale_b, call.columns, call.kept, call.bias, call.count});
  if (is_present(call.args.outlier_count)) {
    check_dtype(kOp, call.count, {DType::kInt32});
    if (numel(call.args.outlier_count) != 1) wrong_shape(kOp, call.count, "one element");
    check_output(kOp, call.count,
                 {call.x, call.weight, call.scale_b, call.columns, call.kept, call.bias});
    p.outlier_count = static_cast<int32_t*>(call.args.outlier_count.data);
  }
  const TensorView& b = call.b.data;
  p.split.threshold = call.args.threshold;
  p.b = static_cast<const int8_t*>(b.data);
  p.stride_bk = b.strides[0], p.stride_bn = b.strides[1];
  p.b_is_constant = call.args.b_is_constant != 0;
  p.device_index = call.args.x.device_index;
  p.stream = call.args.stream;
  if (device_of(call.args.x) == DeviceType::kCpu) check_columns(p);
  if ((p.M == 0 || p.N == 0) && p.outlier_count == nullptr) return std::nullopt;
  return p;
}

}  // namespace

size_t llm_int8_matmul_workspace_size(const fastq_llm_int8_matmul_args& caller) {
  const Arguments call(caller);
  const std::optional<LlmInt8MatmulProblem> p = checked(call);
  return p ? backend_of(call.args.x).llm_int8_matmul_workspace_size(*p) : 0;
}

void llm_int8_matmul(const fastq_llm_int8_matmul_args& caller) {
  const Arguments call(caller);
  const std::optional<LlmInt8MatmulProblem> p = checked(call);
  if (!p) return;
  const fastq_llm_int8_matmul_args& args = call.args;
  Workspace workspace(args.workspace, args.workspace_size, args.allocate, args.allocate_context);
  backend_of(args.x).llm_int8_matmul(*p, workspace);
}

}  // namespace fastq
