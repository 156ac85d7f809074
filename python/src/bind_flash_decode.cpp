#include "tensor.hpp"

namespace fastq_python {
namespace {

constexpr const char* kOp = "flash_decode";

// Writes out, and lse where it is not None. With k and v the cache, too.
void flash_decode(py::handle q, py::handle k_cache, py::handle v_cache, py::handle cache_seqlens,
                  py::handle out, py::handle lse, py::handle block_table, py::handle k_scale,
                  py::handle v_scale, float softmax_scale, bool causal, int64_t window_left,
                  int64_t window_right, float softcap, py::handle alibi_slopes, py::handle k,
                  py::handle v, py::handle rotary_cos, py::handle rotary_sin,
                  bool rotary_interleaved) {
  const fastq_kv_cache cache =
      cache_of(kOp, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale);
  fastq_flash_decode_args args = {};
  args.struct_size = sizeof(args);
  args.q = view_of(q, kOp, "q");
  args.cache = &cache;
  args.out = view_of(out, kOp, "out");
  args.lse = view_of(lse, kOp, "lse");
  args.alibi_slopes = view_of(alibi_slopes, kOp, "alibi_slopes");
  args.has_window = 1;
  args.window_left = window_left, args.window_right = window_right;
  args.causal = causal;
  args.softmax_scale = softmax_scale, args.softcap = softcap;
  args.stream = current_stream(args.q, q);
  fastq_kv_append_args append = {};
  if (!k.is_none()) {
    append.struct_size = sizeof(append);
    append.k = view_of(k, kOp, "k"), append.v = view_of(v, kOp, "v");
    append.rotary_cos = view_of(rotary_cos, kOp, "rotary_cos");
    append.rotary_sin = view_of(rotary_sin, kOp, "rotary_sin");
    append.rotary_interleaved = rotary_interleaved;
    args.append = &append;
  }
  TorchWorkspace workspace{kOp, q, {}};
  args.allocate = &TorchWorkspace::allocate;
  args.allocate_context = &workspace;
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_flash_decode(&args);
  }
  check(status);
}

}  // namespace

void bind_flash_decode(py::module_& module) { module.def("flash_decode", &flash_decode); }

}  // namespace fastq_python
