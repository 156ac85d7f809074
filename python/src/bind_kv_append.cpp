#include "tensor.hpp"

namespace fastq_python {
namespace {

constexpr const char* kOp = "kv_append";

// Writes the cache, and out where it is not None.
void kv_append(py::handle k, py::handle v, py::handle k_cache, py::handle v_cache,
               py::handle cache_seqlens, py::handle block_table, py::handle k_scale,
               py::handle v_scale, py::handle rotary_cos, py::handle rotary_sin,
               bool rotary_interleaved, py::handle q, py::handle out) {
  const fastq_kv_cache cache =
      cache_of(kOp, k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale);
  fastq_kv_append_args args = {};
  args.struct_size = sizeof(args);
  args.k = view_of(k, kOp, "k"), args.v = view_of(v, kOp, "v");
  args.cache = &cache;
  args.rotary_cos = view_of(rotary_cos, kOp, "rotary_cos");
  args.rotary_sin = view_of(rotary_sin, kOp, "rotary_sin");
  args.rotary_interleaved = rotary_interleaved;
  args.q = view_of(q, kOp, "q"), args.out = view_of(out, kOp, "out");
  args.stream = current_stream(args.k, k);
  fastq_status status;
  {
    py::gil_scoped_release release;
    status = fastq_kv_append(&args);
  }
  check(status);
}

}  // namespace

void bind_kv_append(py::module_& module) { module.def("kv_append", &kv_append); }

}  // namespace fastq_python
