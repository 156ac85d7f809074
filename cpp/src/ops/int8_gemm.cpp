#include "ops/int8_gemm.hpp"

#include <algorithm>
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

void check_weight(const char* op, const fastq_weight& b) {
  check_struct_size(op, b.struct_size, sizeof(fastq_weight));
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

MatrixSizes check_shapes(const char* op, const fastq_int8_gemm_args& args) {
  const fastq_weight& b = *args.b;
  const bool packed = b.layout == FASTQ_WEIGHT_PACKED;
  const int64_t b_k = packed ? b.k : b.data.sizes[0], N = packed ? b.n : b.data.sizes[1];
  const TensorView& a = args.a;
  const int64_t K = a.sizes[a.rank - 1];
  if (K != b_k) {
    const std::string b_shape =
        packed ? "(" + std::to_string(b_k) + ", " + std::to_string(N) + ")" : shape_text(b.data);
    invalid_value(std::string(op) + ": a has shape " + shape_text(a) + " and b " + b_shape +
                  "; expected a (..., M, K) and b (K, N)" +
                  (!packed && K == N ? "; was b.t() meant?" : ""));
  }
  if (K > kMaxK) {
    invalid_value(std::string(op) + ": K = " + std::to_string(K) + ", expected at most " +
                  std::to_string(kMaxK) + " (a longer sum could overflow int32)");
  }
  bool fits = args.out.rank == a.rank && args.out.sizes[a.rank - 1] == N;
  int64_t M = 1;
  std::string expected = "(";
  for (int i = 0; i + 1 < a.rank; ++i) {
    fits = fits && args.out.sizes[i] == a.sizes[i];
    M *= a.sizes[i];
    expected += std::to_string(a.sizes[i]) + ", ";
  }
  if (!fits) {
    invalid_value(std::string(op) + ": out has shape " + shape_text(args.out) + ", expected " +
                  expected + std::to_string(N) + ")");
  }
  return {M, N, K};
}

// Checks everything, and lays the problem out for the first row group.
Int8GemmProblem checked_problem(const char* op, const fastq_int8_gemm_args& args,
                                RowStrides& scale_rows) {
  check_struct_size(op, args.struct_size, sizeof(fastq_int8_gemm_args));
  if (args.b == nullptr) invalid_type(std::string(op) + ": b is missing");
  const fastq_weight& b = *args.b;
  const NamedTensor a{"a", &args.a}, weight{"b", &b.data}, out{"out", &args.out};
  const NamedTensor scale_a{"sa", &args.scale_a}, scale_b{"sb", &b.scale}, bias{"bias", &args.bias};
  for (const NamedTensor& tensor : {a, out}) check_well_formed(op, tensor);
  for (const NamedTensor& tensor : {scale_a, scale_b, bias}) {
    if (is_present(*tensor.view)) check_well_formed(op, tensor);
  }
  check_weight(op, b);
  check_dtype(op, a, {DType::kInt8});
  check_rank(op, a, 2, FASTQ_MAX_RANK);
  check_dtype(op, out, {DType::kBFloat16, DType::kFloat16, DType::kFloat32, DType::kInt32});
  check_same_device(op, {a, weight, scale_a, scale_b, bias, out});
  const MatrixSizes sizes = check_shapes(op, args);

  Int8GemmProblem p;
  p.M = sizes.M, p.N = sizes.N, p.K = sizes.K;
  if (dtype_of(args.out) == DType::kInt32) {
    for (const NamedTensor& tensor : {scale_a, scale_b, bias}) {
      if (is_present(*tensor.view)) {
        invalid_value(std::string(op) + ": " + tensor.name +
                      " must be absent when out is int32 (raw sums)");
      }
    }
    scale_rows = RowStrides{};
  } else {
    check_dtype(op, scale_a, {DType::kFloat32});
    check_dtype(op, scale_b, {DType::kFloat32});
    scale_rows = row_strides(op, scale_a, a, true);
    p.scale_a.data = args.scale_a.data;
    p.scale_b = column_vector(op, scale_b, p.N, "N", true);
    if (is_present(args.bias)) {
      check_dtype(op, bias, {dtype_of(args.out), DType::kFloat32});
      p.bias = column_vector(op, bias, p.N, "N", false);
    }
  }
  check_output(op, out, {a, weight, scale_a, scale_b, bias});

  p.a = static_cast<const int8_t*>(args.a.data);
  p.stride_ak = args.a.strides[args.a.rank - 1];
  if (b.layout == FASTQ_WEIGHT_PACKED) {
    const Backend& backend = backend_for(device_of(args.a), op);
    const size_t need = backend.pack_weight_size(p.K, p.N);
    if (backend.pack_weight == nullptr || static_cast<size_t>(b.data.sizes[0]) < need ||
        b.data.strides[0] != 1) {
      invalid_value(std::string(op) + ": b is not a packed weight of (" + std::to_string(p.K) +
                    ", " + std::to_string(p.N) + ") for " + device_name(args.a));
    }
    p.b_packed = b.data.data;
  } else {
    p.b = static_cast<const int8_t*>(b.data.data);
    p.stride_bk = b.data.strides[0], p.stride_bn = b.data.strides[1];
  }
  p.out = args.out.data;
  p.out_dtype = dtype_of(args.out);
  p.stride_on = args.out.strides[args.out.rank - 1];
  p.device_index = args.a.device_index;
  p.stream = args.stream;
  return p;
}

// Walks the row groups that a, scale_a and out share: one for anything contiguous.
template <class Visit>
void for_each_problem(const char* op, const fastq_int8_gemm_args& args, const Visit& visit) {
  RowStrides scale_rows;
  Int8GemmProblem p = checked_problem(op, args, scale_rows);
  if (p.M == 0 || p.N == 0) return;
  const auto* a = p.a;
  const auto* scale_a = static_cast<const float*>(p.scale_a.data);
  auto* out = static_cast<char*>(p.out);
  const int64_t out_size = element_size(p.out_dtype);
  const int64_t* const strides[3] = {args.a.strides, scale_rows.strides, args.out.strides};
  for_each_row_group(args.a.rank - 1, args.a.sizes, strides,
                     [&](const int64_t* offsets, int64_t rows, const int64_t* row_stride) {
                       p.M = rows;
                       p.a = a + offsets[0];
                       p.stride_am = row_stride[0];
                       if (scale_a != nullptr) p.scale_a.data = scale_a + offsets[1];
                       p.scale_a.stride = row_stride[1];
                       p.out = out + offsets[2] * out_size;
                       p.stride_om = row_stride[2];
                       visit(p);
                     });
}

// FASTQ_LOG=dispatch: one line a call, with the kernel taken and why.
bool logs_dispatch() {
  const char* log = std::getenv("FASTQ_LOG");
  return log != nullptr && std::strcmp(log, "dispatch") == 0;
}

void log_dispatch(const Backend& backend, const Int8GemmProblem& p) {
  std::fprintf(stderr, "fastq: int8_gemm M=%lld N=%lld K=%lld %s -> %s\n",
               static_cast<long long>(p.M), static_cast<long long>(p.N),
               static_cast<long long>(p.K), dtype_name(p.out_dtype),
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

size_t pack_weight_size(const fastq_weight& weight) {
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
