// INT8 GEMM from C++: what the kernels take without Python, on the shapes and in the JSON lines of
// `python -m bench.int8_gemm`.
//
//   bench_int8_gemm [--device cpu|cuda] [--shapes FILE] [--out FILE] [--commit ID] [--rounds N]
//                   [--M 1,16,64] [--NK 4096x4096,11008x4096]
//
// --M and --NK leave only these of the file's shapes.
//
// Inputs are drawn from N(0, 1), quantised by absmax, and copied often enough to spill the caches.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device.hpp"
#include "draw.hpp"
#include "fastq/fastq.hpp"
#include "results.hpp"
#include "shapes.hpp"
#include "timing.hpp"

namespace {

using bench::Buffer;
using bench::BufferPtr;

// Those of the file's shapes that are wanted; empty: all.
struct Wanted {
  std::vector<int64_t> m, nk;  // nk: N, K, N, K, ...
};

struct Gemm {
  int64_t M, N, K;
};

// A quantised matrix, one scale a row.
struct Quantized {
  BufferPtr q, scale;
};

Quantized draw(int64_t rows, int64_t cols, bool cuda, std::mt19937& generator) {
  const BufferPtr x = bench::draw(rows * cols, FASTQ_FLOAT32, cuda, generator);
  const Quantized result{std::make_shared<Buffer>(rows * cols, cuda),
                         std::make_shared<Buffer>(rows * sizeof(float), cuda)};
  const fastq::Device device = bench::device_of(cuda);
  fastq::quantize_per_token(
      fastq::tensor_view(x->data(), FASTQ_FLOAT32, {rows, cols}, device),
      fastq::tensor_view(result.q->data(), FASTQ_INT8, {rows, cols}, device),
      fastq::tensor_view(result.scale->data(), FASTQ_FLOAT32, {rows, 1}, device));
  bench::synchronize(cuda);  // before x is freed
  return result;
}

// One product on its own copy of the operands. The struct stays where it is: `args` points into it.
struct Product {
  BufferPtr a, b, out, workspace;
  fastq_weight weight;
  fastq_int8_gemm_args args;

  void run() const { fastq::int8_gemm(args, workspace->data(), workspace->bytes()); }
};
using Products = std::vector<std::unique_ptr<Product>>;

Products make_products(const Gemm& s, const Quantized& x, const Quantized& w, bool packed,
                       bool cuda, void* stream) {
  const fastq::Device device = bench::device_of(cuda);
  const fastq_tensor sw = fastq::tensor_view(w.scale->data(), FASTQ_FLOAT32, {s.N}, device);
  const auto plain = [&](const Buffer& q) {
    return fastq::weight(
        fastq::transposed(fastq::tensor_view(q.data(), FASTQ_INT8, {s.N, s.K}, device)), sw);
  };
  BufferPtr b = w.q;
  if (packed) {
    const auto bytes = static_cast<int64_t>(fastq::pack_weight_size(plain(*w.q)));
    b = std::make_shared<Buffer>(bytes, cuda);
    fastq::pack_weight(plain(*w.q), fastq::tensor_view(b->data(), FASTQ_UINT8, {bytes}, device));
  }
  const size_t count = bench::spilling_copies(s.M * s.K + s.N * s.K, cuda);
  Products products;
  for (size_t i = 0; i < count; ++i) {
    auto p = std::make_unique<Product>();
    p->a = bench::copy_of(*x.q, cuda), p->b = bench::copy_of(*b, cuda);
    p->out = std::make_shared<Buffer>(s.M * s.N * 2, cuda);
    p->weight = plain(*p->b);
    if (packed) {
      const auto bytes = static_cast<int64_t>(b->bytes());
      p->weight = fastq::packed_weight(
          fastq::tensor_view(p->b->data(), FASTQ_UINT8, {bytes}, device), s.K, s.N, sw);
    }
    p->args = fastq::int8_gemm_args(
        fastq::tensor_view(p->a->data(), FASTQ_INT8, {s.M, s.K}, device), p->weight,
        fastq::tensor_view(x.scale->data(), FASTQ_FLOAT32, {s.M, 1}, device),
        fastq::tensor_view(p->out->data(), FASTQ_BFLOAT16, {s.M, s.N}, device), {}, stream);
    p->args.b_is_constant = 1;
    p->workspace = std::make_shared<Buffer>(fastq::int8_gemm_workspace_size(p->args), cuda);
    products.push_back(std::move(p));
  }
  return products;
}

bool is_chosen(const Wanted& wanted, const Gemm& s) {
  const bool m =
      wanted.m.empty() || std::find(wanted.m.begin(), wanted.m.end(), s.M) != wanted.m.end();
  bool nk = wanted.nk.empty();
  for (size_t i = 0; i + 1 < wanted.nk.size(); i += 2) {
    nk = nk || (wanted.nk[i] == s.N && wanted.nk[i + 1] == s.K);
  }
  return m && nk;
}

void report(const bench::Options& options, const Gemm& s, const bench::Result& result) {
  std::printf("%6ldx%ldx%ld %-18s %11.2f us %9.3f TOP/s  %s\n", static_cast<long>(s.M),
              static_cast<long>(s.N), static_cast<long>(s.K), result.implementation.c_str(),
              result.timing.p50_us, result.rate, result.config.c_str());
  bench::append(options, result);
}

void bench_gemm(const bench::Options& options, const Gemm& s, const std::string& tag,
                void* stream) {
  const bench::Shape shape = {{{"M", s.M}, {"N", s.N}, {"K", s.K}}, tag};
  std::mt19937 generator(0);
  const Quantized x = draw(s.M, s.K, options.cuda, generator);
  const Quantized w = draw(s.N, s.K, options.cuda, generator);
  for (const bool packed : {false, true}) {
    if (packed && options.cuda) continue;
    const Products products = make_products(s, x, w, packed, options.cuda, stream);
    const std::string config = fastq::int8_gemm_describe(products[0]->args);
    bench::Calls calls;
    for (const auto& product : products) {
      calls.push_back([p = product.get()] { p->run(); });
    }
    const bench::Timing timing = bench::measure(calls, options.rounds, options.cuda, stream);
    const double rate = 2e-6 * static_cast<double>(s.M) * s.N * s.K / timing.p50_us;
    report(options, s,
           {shape, "int8 -> bfloat16", packed ? "fastq[c++, packed]" : "fastq[c++]", config, timing,
            products.size(), rate, "TOP/s"});
  }
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run_program("int8_gemm", [&] {
    Wanted wanted;
    const bench::Options options = bench::parse(
        "int8_gemm", argc, argv, [&](const std::string& name, const std::string& value) {
          if (name == "--M") wanted.m = bench::integers(value);
          if (name == "--NK") wanted.nk = bench::integers(value);
          return name == "--M" || name == "--NK";
        });
    void* const stream = bench::make_stream(options.cuda);
    for (const bench::Shape& shape : bench::read_shapes(options.shapes, options.cuda)) {
      const Gemm s = {bench::size_of(shape, "M"), bench::size_of(shape, "N"),
                      bench::size_of(shape, "K")};
      if (is_chosen(wanted, s)) bench_gemm(options, s, shape.tag, stream);
    }
  });
}
