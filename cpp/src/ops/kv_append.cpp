#include "ops/kv_append.hpp"

#include <optional>
#include <string>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/attention.hpp"
#include "ops/checks.hpp"
#include "ops/kv_cache.hpp"

namespace fastq {
namespace {

constexpr const char* kOp = "kv_append";
constexpr size_t kLeastArgs = sizeof(fastq_kv_append_args);

void check_rows(const NamedTensor& k, const NamedTensor& v) {
  check_well_formed(kOp, k);
  check_well_formed(kOp, v);
  check_dtype(kOp, k, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_dtype(kOp, v, {dtype_of(*k.view)});
  if (k.view->rank != 4) wrong_shape(kOp, k, "(batch, seqlen, heads, head_dim)");
  check_same_shape(kOp, v, k);
  check_head_dim_stride(kOp, k);
  check_head_dim_stride(kOp, v);
  check_head_dim(kOp, k, k.view->sizes[3]);
  if (k.view->sizes[1] > INT32_MAX) wrong_shape(kOp, k, "at most 2147483647 rows");
}

// q and out, both or neither; with rotary tables only.
void check_queries(const fastq_kv_append_args& args, const NamedTensor& q, const NamedTensor& out,
                   const NamedTensor& k) {
  if (!is_present(args.q)) {
    if (is_present(args.out)) invalid_value(std::string(kOp) + ": out is given, but q is not");
    return;
  }
  if (!is_present(args.rotary_cos)) {
    invalid_value(std::string(kOp) + ": q is given, but there is no rotary_cos to rotate it");
  }
  for (const NamedTensor& tensor : {q, out}) {
    check_well_formed(kOp, tensor);
    check_dtype(kOp, tensor, {dtype_of(args.k)});
  }
  const TensorView& t = args.q;
  const int64_t *const got = t.sizes, *const wanted = args.k.sizes;
  if (t.rank != 4 || got[0] != wanted[0] || got[1] != wanted[1] || got[3] != wanted[3]) {
    wrong_shape(kOp, q,
                "(" + std::to_string(wanted[0]) + ", " + std::to_string(wanted[1]) + ", heads, " +
                    std::to_string(wanted[3]) + ") as " + k.name + " has");
  }
  check_same_shape(kOp, out, q);
  check_head_dim_stride(kOp, q);
  check_head_dim_stride(kOp, out);
}

void set_rotation(const fastq_kv_append_args& args, KvAppendProblem& p) {
  const NamedTensor cos{"rotary_cos", &args.rotary_cos}, sin{"rotary_sin", &args.rotary_sin};
  if (is_present(args.rotary_cos) != is_present(args.rotary_sin)) {
    invalid_value(std::string(kOp) + ": only one of rotary_cos and rotary_sin is given");
  }
  if (!is_present(args.rotary_cos)) return;
  check_well_formed(kOp, cos);
  check_well_formed(kOp, sin);
  check_dtype(kOp, cos, {DType::kFloat32, p.dtype});
  check_dtype(kOp, sin, {dtype_of(args.rotary_cos)});
  const TensorView& t = args.rotary_cos;
  if (t.rank != 2 || t.sizes[0] < 1 || t.sizes[1] < 1 || 2 * t.sizes[1] > p.head_dim) {
    wrong_shape(kOp, cos,
                "(max_seqlen, rotary_dim / 2) with a rotary_dim from 2 to head_dim = " +
                    std::to_string(p.head_dim));
  }
  check_same_shape(kOp, sin, cos);
  const auto matrix = [](const TensorView& table) {
    return MatrixView{table.data, dtype_of(table), table.strides[0], table.strides[1]};
  };
  p.rotary_cos = matrix(args.rotary_cos), p.rotary_sin = matrix(args.rotary_sin);
  p.max_seqlen = t.sizes[0], p.rotary_dim = 2 * t.sizes[1];
  p.rotary_interleaved = args.rotary_interleaved != 0;
}

// The cache and out are written, everything else is only read.
void check_outputs(const fastq_kv_append_args& args, const NamedCache& c, const NamedTensor& k,
                   const NamedTensor& v, const NamedTensor& q, const NamedTensor& out) {
  const NamedTensor cos{"rotary_cos", &args.rotary_cos}, sin{"rotary_sin", &args.rotary_sin};
  for (const NamedTensor& tensor : {c.k, c.v, c.k_scale, c.v_scale}) {
    if (!is_present(*tensor.view)) continue;
    check_output(kOp, tensor, {k, v, q, c.seqlens, c.block_table, cos, sin});
  }
  check_output(kOp, c.v, {c.k});
  if (is_present(c.cache.k_scale)) {
    check_output(kOp, c.k_scale, {c.k, c.v});
    check_output(kOp, c.v_scale, {c.k, c.v, c.k_scale});
  }
  if (!is_present(args.out)) return;
  check_output(kOp, out,
               {k, v, c.k, c.v, c.k_scale, c.v_scale, c.seqlens, c.block_table, cos, sin});
  if (!is_same_view(args.out, args.q)) check_output(kOp, out, {q});
}

void check_table_reach(const KvAppendProblem& p) {
  if (p.rotary_dim == 0) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.cache.seqlens[b * p.cache.stride_seqlens];
    if (length <= p.max_seqlen) continue;
    invalid_value(std::string(kOp) + ": cache_seqlens[" + std::to_string(b) + "] is " +
                  std::to_string(length) + ", but rotary_cos has rows for " +
                  std::to_string(p.max_seqlen) + " tokens");
  }
}

}  // namespace

std::optional<KvAppendProblem> checked_kv_append(const fastq_kv_append_args& caller) {
  fastq_kv_append_args args_space;
  const auto& args = known_struct(kOp, caller, kLeastArgs, args_space);
  const NamedTensor k{"k", &args.k}, v{"v", &args.v}, q{"q", &args.q}, out{"out", &args.out};
  fastq_kv_cache space;
  const NamedCache c(known_cache(kOp, args.cache, space));
  check_rows(k, v);
  check_queries(args, q, out, k);
  KvAppendProblem p;
  p.batch = args.k.sizes[0], p.seqlen_new = args.k.sizes[1];
  p.num_heads = is_present(args.q) ? args.q.sizes[2] : 0;
  p.num_heads_k = args.k.sizes[2], p.head_dim = args.k.sizes[3];
  p.dtype = dtype_of(args.k);
  p.cache = check_cache(kOp, c, k, p.num_heads);
  if (c.cache.k.sizes[2] != p.num_heads_k) {
    wrong_shape(kOp, c.k, std::to_string(p.num_heads_k) + " heads as k has");
  }
  set_rotation(args, p);
  check_same_device(kOp, {k, v, q, out, NamedTensor{"rotary_cos", &args.rotary_cos},
                          NamedTensor{"rotary_sin", &args.rotary_sin}});
  check_outputs(args, c, k, v, q, out);
  p.k = attention_tensor(args.k), p.v = attention_tensor(args.v);
  if (p.num_heads > 0) p.q = attention_tensor(args.q), p.out = attention_tensor(args.out);
  p.device_index = args.k.device_index;
  p.stream = args.stream;
  if (p.batch == 0 || p.seqlen_new == 0 || p.num_heads_k == 0) return std::nullopt;
  if (device_of(args.k) == DeviceType::kCpu) {
    check_seqlens(kOp, p.cache, p.batch, p.seqlen_new);
    check_table_reach(p);
  }
  return p;
}

void kv_append(const fastq_kv_append_args& args) {
  const std::optional<KvAppendProblem> p = checked_kv_append(args);
  if (!p) return;
  backend_for(device_of(args.k), kOp).kv_append(*p);
}

}  // namespace fastq
