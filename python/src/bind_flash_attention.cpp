#include "tensor.hpp"

namespace fastq_python {
namespace {

constexpr const char* kOp = "flash_attention";

// Writes out, and lse where it is not None.
void flash_attention(py::handle q, py::handle k, py::handle v, py::handle out, py::handle lse,
                     float softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                     float softcap, py::handle alibi_slopes, py::handle cu_seqlens_q,
                     py::handle cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  fastq_flash_attention_args args = {};
  args.struct_size = sizeof(args);
  args.q = view_of(q, kOp, "q"), args.k = view_of(k, kOp, "k"), args.v = view_of(v, kOp, "v");
  args.out = view_of(out, kOp, "out");
  args.lse = view_of(lse, kOp, "lse");
  args.cu_seqlens_q = view_of(cu_seqlens_q, kOp, "cu_seqlens_q");
  args.cu_seqlens_k = view_of(cu_seqlens_k, kOp, "cu_seqlens_k");
  args.alibi_slopes = view_of(alibi_slopes, kOp, "alibi_slopes");
  args.max_seqlen_q = max_seqlen_q, args.max_seqlen_k = max_seqlen_k;
  args.has_window = 1;
  args.window_left = window_left, args.window_right = window_right;
  args.causal = causal;
  args.softmax_scale = softmax_scale, args.softcap = softcap;
  args.stream = current_stream(args.q, q);
  TorchWorkspace workspace{kOp, q, {}};
  args.allocate = &TorchWorkspace::allocate;
  args.allocate_context = &workspace;
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_flash_attention(&args);
  }
  check(status);
}

}  // namespace

void bind_flash_attention(py::module_& module) { module.def("flash_attention", &flash_attention); }

}  // namespace fastq_python
