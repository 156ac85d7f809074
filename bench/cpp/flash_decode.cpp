// Attention of one new token to a cache, from C++: what the kernels take without Python, on the
// shapes and in the JSON lines of `python -m bench.flash_decode`.
//
//   bench_flash_decode [--device cpu|cuda] [--shapes FILE] [--out FILE] [--commit ID] [--rounds N]
//                      [--filter TEXT]
//
// --filter leaves only the shapes whose "4x2048x32x8x128 decode" (sizes in the file's order, tag)
// holds the text.
//
// Inputs are drawn from N(0, 1), every sequence has `seqlen` tokens, and there are copies enough to
// spill the caches. A cache is of q's dtype or int8. The rate counts its bytes, scales included.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "attention.hpp"

namespace {

using bench::AttentionSizes;
using bench::BufferPtr;

// A cache of this size leaves no other in any L2, and memory may not hold two of the largest.
constexpr int64_t kLargeBytes = 1 << 30;

// Keys or values of a cache; the scales of an int8 one are (batch, heads_k, seqlen).
struct CacheTensor {
  BufferPtr data, scale;
};

struct Case {
  AttentionSizes sizes;
  fastq_dtype dtype;  // of q
  bool cuda;
  void* stream;
  BufferPtr seqlens;

  fastq_tensor view(const bench::Buffer& data, fastq_dtype type, int64_t seqlen,
                    int64_t heads) const {
    return fastq::tensor_view(data.data(), type, {sizes.batch, seqlen, heads, sizes.head_dim},
                              bench::device_of(cuda));
  }
  fastq_tensor view_scale(const bench::Buffer& scale) const {
    return fastq::tensor_view(scale.data(), FASTQ_FLOAT32,
                              {sizes.batch, sizes.heads_k, sizes.seqlen}, bench::device_of(cuda));
  }
  // Of keys: a row is one token of one head.
  int64_t rows() const { return sizes.batch * sizes.seqlen * sizes.heads_k; }
};

// One attention to its own copy of the cache. The struct stays where it is: `args` points into it.
struct Decode {
  BufferPtr q, out, workspace;
  CacheTensor k, v;
  fastq_kv_cache cache;
  fastq_flash_decode_args args;

  void run() const { fastq::flash_decode(args, workspace->data(), workspace->bytes()); }
};

// (batch, seqlen, heads, head_dim) as (batch, heads, seqlen, head_dim).
fastq_tensor heads_first(fastq_tensor view) {
  std::swap(view.sizes[1], view.sizes[2]);
  std::swap(view.strides[1], view.strides[2]);
  return view;
}

CacheTensor quantized(const Case& c, const bench::Buffer& x) {
  const AttentionSizes& s = c.sizes;
  const CacheTensor result{bench::make_buffer(c.rows() * s.head_dim, c.cuda),
                           bench::make_buffer(c.rows() * sizeof(float), c.cuda)};
  fastq::quantize_per_token(heads_first(c.view(x, c.dtype, s.seqlen, s.heads_k)),
                            heads_first(c.view(*result.data, FASTQ_INT8, s.seqlen, s.heads_k)),
                            c.view_scale(*result.scale));
  bench::synchronize(c.cuda);  // before x is freed
  return result;
}

// The first attention takes the operands as they are, the others copies: the largest caches fit
// into memory once.
bench::Calls make_calls(const Case& c, const BufferPtr& q, const CacheTensor& k,
                        const CacheTensor& v, size_t copies) {
  const AttentionSizes& s = c.sizes;
  bench::Calls calls;
  for (size_t i = 0; i < copies; ++i) {
    const auto own = [&](const BufferPtr& buffer) {
      return i == 0 || buffer == nullptr ? buffer : bench::copy_of(*buffer, c.cuda);
    };
    const auto d = std::make_shared<Decode>();
    d->q = own(q);
    d->k = {own(k.data), own(k.scale)}, d->v = {own(v.data), own(v.scale)};
    d->out = bench::make_buffer(q->bytes(), c.cuda);
    const fastq_dtype type = k.scale == nullptr ? c.dtype : FASTQ_INT8;
    d->cache = fastq::kv_cache(
        c.view(*d->k.data, type, s.seqlen, s.heads_k),
        c.view(*d->v.data, type, s.seqlen, s.heads_k),
        fastq::tensor_view(c.seqlens->data(), FASTQ_INT32, {s.batch}, bench::device_of(c.cuda)));
    if (type == FASTQ_INT8) {
      d->cache.k_scale = fastq::transposed(c.view_scale(*d->k.scale));
      d->cache.v_scale = fastq::transposed(c.view_scale(*d->v.scale));
    }
    d->args = fastq::flash_decode_args(c.view(*d->q, c.dtype, 1, s.heads), d->cache,
                                       c.view(*d->out, c.dtype, 1, s.heads), true, c.stream);
    d->workspace = bench::make_buffer(fastq::flash_decode_workspace_size(d->args), c.cuda);
    calls.push_back([d] { d->run(); });
  }
  return calls;
}

void bench_shape(const bench::Options& options, const bench::Shape& shape, fastq_dtype dtype,
                 void* stream) {
  const AttentionSizes s(shape);
  const bool cuda = options.cuda;
  const std::vector<int32_t> lengths(s.batch, static_cast<int32_t>(s.seqlen));
  const Case c = {s, dtype, cuda, stream, bench::make_buffer(s.batch * sizeof(int32_t), cuda)};
  c.seqlens->copy_from(lengths.data(), s.batch * sizeof(int32_t));
  std::mt19937 generator(0);
  const auto draw = [&](int64_t count) { return bench::draw(count, dtype, cuda, generator); };
  const BufferPtr q = draw(s.batch * s.heads * s.head_dim);
  CacheTensor k{draw(c.rows() * s.head_dim), nullptr}, v{draw(c.rows() * s.head_dim), nullptr};

  const int64_t cache_bytes = 2 * c.rows() * s.head_dim * bench::element_size(dtype);
  const int64_t int8_bytes = 2 * c.rows() * (s.head_dim + sizeof(float));
  const size_t copies = cache_bytes >= kLargeBytes ? 1 : bench::spilling_copies(int8_bytes, cuda);
  bench::report(options, shape, dtype, "fastq[c++]", make_calls(c, q, k, v, copies), cache_bytes,
                "GB/s", stream);
  k = quantized(c, *k.data);
  v = quantized(c, *v.data);
  bench::report(options, shape, dtype, "fastq[c++, int8 cache]", make_calls(c, q, k, v, copies),
                int8_bytes, "GB/s", stream);
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run_attention("flash_decode", argc, argv, bench_shape);
}
