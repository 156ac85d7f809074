#include "ops/flash_attention.hpp"

#include <cstdint>
#include <optional>
#include <string>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/attention.hpp"
#include "ops/checks.hpp"

namespace fastq {
namespace {

constexpr const char* kOp = "flash_attention";
constexpr size_t kLeastArgs = sizeof(fastq_flash_attention_args);

// The tensors' shapes, and what the sizes of one say of the others'.
struct Sizes {
  bool is_packed;
  int64_t batch, rows_q, rows_k;  // rows: a sequence's, or all sequences' together where packed
  int64_t num_heads, num_heads_k, head_dim;
};

Sizes check_shapes(const NamedTensor& q, const NamedTensor& k, const NamedTensor& v,
                   const NamedTensor& out, const fastq_flash_attention_args& args) {
  Sizes s{};
  s.is_packed = is_present(args.cu_seqlens_q);
  if (s.is_packed != is_present(args.cu_seqlens_k)) {
    invalid_value(std::string(kOp) + ": only one of cu_seqlens_q and cu_seqlens_k is given");
  }
  const int rank = s.is_packed ? 3 : 4;
  for (const NamedTensor& tensor : {q, k, v}) {
    if (tensor.view->rank != rank) {
      wrong_shape(kOp, tensor,
                  s.is_packed ? "(total, heads, head_dim), as cu_seqlens are given"
                              : "(batch, seqlen, heads, head_dim)");
    }
    check_head_dim_stride(kOp, tensor);
  }
  check_same_shape(kOp, v, k);
  check_same_shape(kOp, out, q);
  check_head_dim_stride(kOp, out);
  const int64_t* const q_sizes = q.view->sizes + rank - 3;  // rows, heads, head_dim
  const int64_t* const k_sizes = k.view->sizes + rank - 3;
  s.rows_q = q_sizes[0], s.rows_k = k_sizes[0];
  s.num_heads = q_sizes[1], s.num_heads_k = k_sizes[1];
  s.head_dim = q_sizes[2];
  if (k_sizes[2] != s.head_dim) {
    wrong_shape(kOp, k, "head_dim " + std::to_string(s.head_dim) + " as q has");
  }
  check_head_dim(kOp, q, s.head_dim);
  check_num_heads(kOp, k, s.num_heads, s.num_heads_k);
  if (s.rows_q > INT32_MAX) wrong_shape(kOp, q, "at most 2147483647 rows");
  if (s.rows_k > INT32_MAX) wrong_shape(kOp, k, "at most 2147483647 rows");
  if (s.is_packed) {
    const NamedTensor cu_q{"cu_seqlens_q", &args.cu_seqlens_q};
    for (const NamedTensor& cu : {cu_q, NamedTensor{"cu_seqlens_k", &args.cu_seqlens_k}}) {
      check_well_formed(kOp, cu);
      check_dtype(kOp, cu, {DType::kInt32});
      const TensorView& t = *cu.view;
      if (t.rank != 1 || t.sizes[0] < 1 || (t.sizes[0] > 1 && t.strides[0] != 1)) {
        wrong_shape(kOp, cu, "a contiguous (batch + 1,)");
      }
    }
    check_same_shape(kOp, {"cu_seqlens_k", &args.cu_seqlens_k}, cu_q);
    s.batch = args.cu_seqlens_q.sizes[0] - 1;
  } else {
    s.batch = q.view->sizes[0];
    if (k.view->sizes[0] != s.batch) {
      wrong_shape(kOp, k, "batch " + std::to_string(s.batch) + " as q has");
    }
  }
  return s;
}

// On the CPU what cu_seqlens hold is known.
void check_cu_seqlens(const NamedTensor& cu, int64_t rows, int64_t max_seqlen) {
  const auto* begin = static_cast<const int32_t*>(cu.view->data);
  const int64_t batch = cu.view->sizes[0] - 1;
  const std::string about = std::string(kOp) + ": " + cu.name;
  if (begin[0] != 0) {
    invalid_value(about + " begins with " + std::to_string(begin[0]) + ", expected 0");
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{begin[b + 1]} - begin[b];
    if (length < 0 || length > max_seqlen) {
      invalid_value(about + " gives sequence " + std::to_string(b) + " the length " +
                    std::to_string(length) +
                    ", expected 0 to max_seqlen = " + std::to_string(max_seqlen));
    }
  }
  if (begin[batch] > rows) {
    invalid_value(about + " ends with " + std::to_string(begin[batch]) + ", expected at most " +
                  std::to_string(rows) + ", the rows there are");
  }
}

void check_max_seqlens(const fastq_flash_attention_args& args) {
  if (is_present(args.cu_seqlens_q) && (args.max_seqlen_q < 0 || args.max_seqlen_k < 0)) {
    invalid_value(std::string(kOp) + ": max_seqlen is negative");
  }
}

// Nothing where there is nothing to write.
std::optional<FlashAttentionProblem> checked(const fastq_flash_attention_args& args) {
  const NamedTensor q{"q", &args.q}, k{"k", &args.k}, v{"v", &args.v}, out{"out", &args.out};
  const NamedTensor lse{"lse", &args.lse}, slopes{"alibi_slopes", &args.alibi_slopes};
  for (const NamedTensor& tensor : {q, k, v, out}) check_well_formed(kOp, tensor);
  check_dtype(kOp, q, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  for (const NamedTensor& tensor : {k, v, out}) check_dtype(kOp, tensor, {dtype_of(args.q)});
  const Sizes s = check_shapes(q, k, v, out, args);
  check_same_device(kOp,
                    {q, k, v, out, lse, slopes, NamedTensor{"cu_seqlens_q", &args.cu_seqlens_q},
                     NamedTensor{"cu_seqlens_k", &args.cu_seqlens_k}});
  check_max_seqlens(args);
  check_output(kOp, out, {q, k, v, slopes});

  FlashAttentionProblem p;
  p.batch = s.batch;
  p.seqlen_q = s.is_packed ? args.max_seqlen_q : s.rows_q;
  p.seqlen_k = s.is_packed ? args.max_seqlen_k : s.rows_k;
  p.rows_q = s.rows_q, p.rows_k = s.rows_k;
  p.num_heads = s.num_heads, p.num_heads_k = s.num_heads_k, p.head_dim = s.head_dim;
  p.dtype = dtype_of(args.q);
  p.q = attention_tensor(args.q), p.k = attention_tensor(args.k), p.v = attention_tensor(args.v);
  p.out = attention_tensor(args.out);
  if (s.is_packed) {
    p.cu_seqlens_q = static_cast<const int32_t*>(args.cu_seqlens_q.data);
    p.cu_seqlens_k = static_cast<const int32_t*>(args.cu_seqlens_k.data);
    if (device_of(args.q) == DeviceType::kCpu) {
      check_cu_seqlens({"cu_seqlens_q", &args.cu_seqlens_q}, s.rows_q, p.seqlen_q);
      check_cu_seqlens({"cu_seqlens_k", &args.cu_seqlens_k}, s.rows_k, p.seqlen_k);
    }
  }
  set_scores(kOp, args, p);
  set_alibi_slopes(kOp, slopes, p);
  set_lse(kOp, lse, s.is_packed, s.rows_q, {q, k, v, out, slopes}, p);
  p.device_index = args.q.device_index;
  p.stream = args.stream;
  if (p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0 || s.rows_q == 0) return std::nullopt;
  return p;
}

}  // namespace

size_t flash_attention_workspace_size(const fastq_flash_attention_args& caller) {
  fastq_flash_attention_args space;
  const auto& args = known_struct(kOp, caller, kLeastArgs, space);
  const std::optional<FlashAttentionProblem> p = checked(args);
  return p ? backend_for(device_of(args.q), kOp).flash_attention_workspace_size(*p) : 0;
}

void flash_attention(const fastq_flash_attention_args& caller) {
  fastq_flash_attention_args space;
  const auto& args = known_struct(kOp, caller, kLeastArgs, space);
  const std::optional<FlashAttentionProblem> p = checked(args);
  if (!p) return;
  Workspace workspace(args.workspace, args.workspace_size, args.allocate, args.allocate_context);
  backend_for(device_of(args.q), kOp).flash_attention(*p, workspace);
}

}  // namespace fastq
