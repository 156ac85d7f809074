#include "ops/flash_decode.hpp"

#include <optional>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "ops/attention.hpp"
#include "ops/checks.hpp"
#include "ops/kv_cache.hpp"

namespace fastq {
namespace {

constexpr const char* kOp = "flash_decode";
constexpr size_t kLeastArgs = sizeof(fastq_flash_decode_args);

void check_queries(const NamedTensor& q, const NamedTensor& out) {
  check_well_formed(kOp, q);
  check_well_formed(kOp, out);
  check_dtype(kOp, q, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
  check_dtype(kOp, out, {dtype_of(*q.view)});
  const TensorView& t = *q.view;
  if (t.rank != 4) wrong_shape(kOp, q, "(batch, seqlen, heads, head_dim)");
  check_same_shape(kOp, out, q);
  check_head_dim_stride(kOp, q);
  check_head_dim_stride(kOp, out);
  check_head_dim(kOp, q, t.sizes[3]);
  if (t.sizes[1] > INT32_MAX) wrong_shape(kOp, q, "at most 2147483647 rows");
}

// Nothing where there is nothing to write.
std::optional<FlashDecodeProblem> checked(const fastq_flash_decode_args& args) {
  const NamedTensor q{"q", &args.q}, out{"out", &args.out};
  const NamedTensor lse{"lse", &args.lse}, slopes{"alibi_slopes", &args.alibi_slopes};
  fastq_kv_cache space;
  const NamedCache c(known_cache(kOp, args.cache, space));
  check_queries(q, out);
  FlashDecodeProblem p;
  p.batch = args.q.sizes[0], p.seqlen_q = args.q.sizes[1];
  p.num_heads = args.q.sizes[2], p.head_dim = args.q.sizes[3];
  p.dtype = dtype_of(args.q);
  p.cache = check_cache(kOp, c, q, p.num_heads);
  p.num_heads_k = c.cache.k.sizes[2];
  check_same_device(kOp, {q, out, lse, slopes});
  check_output(kOp, out, {q, c.k, c.v, c.k_scale, c.v_scale, c.seqlens, c.block_table, slopes});
  p.q = attention_tensor(args.q), p.out = attention_tensor(args.out);
  set_scores(kOp, args, p);
  set_alibi_slopes(kOp, slopes, p);
  set_lse(kOp, lse, false, p.seqlen_q,
          {q, out, c.k, c.v, c.k_scale, c.v_scale, c.seqlens, c.block_table, slopes}, p);
  p.device_index = args.q.device_index;
  p.stream = args.stream;
  if (p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0) return std::nullopt;
  if (device_of(args.q) == DeviceType::kCpu) check_seqlens(kOp, p.cache, p.batch, -1);
  return p;
}

}  // namespace

size_t flash_decode_workspace_size(const fastq_flash_decode_args& caller) {
  fastq_flash_decode_args space;
  const auto& args = known_struct(kOp, caller, kLeastArgs, space);
  const std::optional<FlashDecodeProblem> p = checked(args);
  return p ? backend_for(device_of(args.q), kOp).flash_decode_workspace_size(*p) : 0;
}

void flash_decode(const fastq_flash_decode_args& caller) {
  fastq_flash_decode_args space;
  const auto& args = known_struct(kOp, caller, kLeastArgs, space);
  const std::optional<FlashDecodeProblem> p = checked(args);
  if (!p) return;
  Workspace workspace(args.workspace, args.workspace_size, args.allocate, args.allocate_context);
  backend_for(device_of(args.q), kOp).flash_decode(*p, workspace);
}

}  // namespace fastq
