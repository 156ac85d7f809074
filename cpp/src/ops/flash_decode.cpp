#include "ops/flash_decode.hpp"

#include <cstddef>
#include <optional>
#include <string>

#include "core/backend.hpp"
#include "core/error.hpp"
#include "core/integers.hpp"
#include "ops/attention.hpp"
#include "ops/checks.hpp"
#include "ops/kv_append.hpp"
#include "ops/kv_cache.hpp"

namespace fastq {
namespace {

constexpr const char* kOp = "flash_decode";
// The size of the struct without `append`.
constexpr size_t kLeastArgs = offsetof(fastq_flash_decode_args, append);

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

// The new tokens, whose queries are rotated into a place that is still to be found. Nothing where
// there are none.
std::optional<KvAppendProblem> checked_append(const fastq_flash_decode_args& args,
                                              const NamedCache& c) {
  if (args.append == nullptr) return std::nullopt;
  fastq_kv_append_args append, space;
  append = known_struct(kOp, *args.append, sizeof(fastq_kv_append_args), space);
  if (is_present(append.q) || is_present(append.out)) {
    invalid_value(std::string(kOp) + ": append has a q or out of its own, expected none");
  }
  const NamedTensor q{"q", &args.q}, out{"out", &args.out}, lse{"lse", &args.lse};
  const NamedTensor k{"k", &append.k}, v{"v", &append.v};
  check_well_formed(kOp, k);
  check_dtype(kOp, k, {dtype_of(args.q)});
  const TensorView& t = append.k;
  if (t.rank != 4 || t.sizes[0] != args.q.sizes[0] || t.sizes[1] != args.q.sizes[1]) {
    wrong_shape(kOp, k,
                "(" + std::to_string(args.q.sizes[0]) + ", " + std::to_string(args.q.sizes[1]) +
                    ", heads, head_dim) as q has");
  }
  check_same_device(kOp, {q, k, v});
  check_output(kOp, out, {k, v});
  if (is_present(args.lse)) check_output(kOp, lse, {k, v});
  for (const NamedTensor& written : {c.k, c.v, c.k_scale, c.v_scale}) {
    if (is_present(*written.view)) check_output(kOp, written, {q});
  }
  append.struct_size = sizeof(append);
  append.cache = args.cache;
  if (is_present(append.rotary_cos)) append.q = args.q, append.out = args.out;
  append.stream = args.stream;
  return checked_kv_append(append);
}

struct Checked {
  std::optional<FlashDecodeProblem> problem;  // nothing where there is nothing to attend
  std::optional<KvAppendProblem> append;
};

Checked checked(const fastq_flash_decode_args& args) {
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
  Checked its;
  its.append = checked_append(args, c);
  if (p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0) return its;
  if (device_of(args.q) == DeviceType::kCpu) check_seqlens(kOp, p.cache, p.batch, -1);
  its.problem = p;
  return its;
}

// The call of a backend that appends nothing itself: where the rotated queries lie in the
// workspace, in front of what attention needs.
class Apart {
 public:
  Apart(const Backend& backend, const Checked& its)
      : is_it(its.append && (backend.flash_decode_appends == nullptr ||
                             !backend.flash_decode_appends(*its.problem))) {
    const FlashDecodeProblem& p = *its.problem;
    const bool rotates = is_it && its.append->num_heads > 0;
    if (rotates) bytes = round_up(p.batch * token_bytes(p) * p.seqlen_q, kAlignment);
  }

  void set_queries(FlashDecodeProblem& p, KvAppendProblem& append, void* memory) const {
    if (bytes == 0) return;
    const int64_t token = p.num_heads * p.head_dim;
    p.q = append.out = {memory, token * p.seqlen_q, token, p.head_dim};
  }

  const bool is_it;
  size_t bytes = 0;

 private:
  static constexpr int64_t kAlignment = 256;
  static int64_t token_bytes(const FlashDecodeProblem& p) {
    return p.num_heads * p.head_dim * static_cast<int64_t>(element_size(p.dtype));
  }
};

}  // namespace

size_t flash_decode_workspace_size(const fastq_flash_decode_args& caller) {
  fastq_flash_decode_args space;
  const auto& args = known_struct(kOp, caller, kLeastArgs, space);
  const Checked its = checked(args);
  if (!its.problem) return 0;
  const Backend& backend = backend_for(device_of(args.q), kOp);
  return Apart(backend, its).bytes + backend.flash_decode_workspace_size(*its.problem);
}

void flash_decode(const fastq_flash_decode_args& caller) {
  fastq_flash_decode_args space;
  const auto& args = known_struct(kOp, caller, kLeastArgs, space);
  Checked its = checked(args);
  const Backend& backend = backend_for(device_of(args.q), kOp);
  if (!its.problem) {
    if (its.append) backend.kv_append(*its.append);
    return;
  }
  FlashDecodeProblem& p = *its.problem;
  Workspace workspace(args.workspace, args.workspace_size, args.allocate, args.allocate_context);
  const Apart apart(backend, its);
  if (!apart.is_it) {
    if (its.append) p.append = &*its.append;
    return backend.flash_decode(p, workspace);
  }
  const size_t rest = backend.flash_decode_workspace_size(p);
  auto* const memory = static_cast<char*>(workspace.get(kOp, apart.bytes + rest));
  apart.set_queries(p, *its.append, memory);
  backend.kv_append(*its.append);
  Workspace others(memory + apart.bytes, rest, nullptr, nullptr);
  backend.flash_decode(p, others);
}

}  // namespace fastq
