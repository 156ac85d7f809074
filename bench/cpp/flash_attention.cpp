// Attention from C++: what the kernels take without Python, on the shapes and in the JSON lines of
// `python -m bench.flash_attention`.
//
//   bench_flash_attention [--device cpu|cuda] [--shapes FILE] [--out FILE] [--commit ID] [--rounds
//   N]
//                         [--filter TEXT]
//
// --filter leaves only the shapes whose "1x2048x16x16x128x1 prefill" (sizes in the file's order,
// tag) holds the text.
//
// Inputs are drawn from N(0, 1) and copied often enough to spill the caches. The rate counts 4 *
// batch * heads * seqlen^2 * head_dim operations, half of them with a causal mask.
#include <cstdint>
#include <memory>
#include <random>

#include "attention.hpp"

namespace {

using bench::BufferPtr;

// One attention on its own copy of the operands.
struct Attention {
  BufferPtr q, k, v, out, workspace;
  fastq_flash_attention_args args;

  void run() const { fastq::flash_attention(args, workspace->data(), workspace->bytes()); }
};

void bench_shape(const bench::Options& options, const bench::Shape& shape, fastq_dtype dtype,
                 void* stream) {
  const bench::AttentionSizes s(shape);
  const bool causal = bench::size_of(shape, "causal") != 0, cuda = options.cuda;
  std::mt19937 generator(0);
  const int64_t q_count = s.batch * s.seqlen * s.heads * s.head_dim;
  const int64_t k_count = s.batch * s.seqlen * s.heads_k * s.head_dim;
  const BufferPtr q = bench::draw(q_count, dtype, cuda, generator);
  const BufferPtr k = bench::draw(k_count, dtype, cuda, generator);
  const BufferPtr v = bench::draw(k_count, dtype, cuda, generator);
  const auto view = [&](const bench::Buffer& buffer, int64_t heads) {
    return fastq::tensor_view(buffer.data(), dtype, {s.batch, s.seqlen, heads, s.head_dim},
                              bench::device_of(cuda));
  };
  const int64_t bytes_each = (q_count + 2 * k_count) * bench::element_size(dtype);
  bench::Calls calls;
  for (size_t i = bench::spilling_copies(bytes_each, cuda); i > 0; --i) {
    const auto a = std::make_shared<Attention>();
    a->q = bench::copy_of(*q, cuda);
    a->k = bench::copy_of(*k, cuda), a->v = bench::copy_of(*v, cuda);
    a->out = bench::make_buffer(q_count * bench::element_size(dtype), cuda);
    a->args =
        fastq::flash_attention_args(view(*a->q, s.heads), view(*a->k, s.heads_k),
                                    view(*a->v, s.heads_k), view(*a->out, s.heads), causal, stream);
    a->workspace = bench::make_buffer(fastq::flash_attention_workspace_size(a->args), cuda);
    calls.push_back([a] { a->run(); });
  }
  const double operations =
      (causal ? 2.0 : 4.0) * s.batch * s.heads * s.seqlen * s.seqlen * s.head_dim;
  bench::report(options, shape, dtype, "fastq[c++]", calls, operations, "GFLOP/s", stream);
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run_attention("flash_attention", argc, argv, bench_shape);
}
