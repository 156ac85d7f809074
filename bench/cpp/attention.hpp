// What the benchmarks of attention share: shapes, dtypes, the command line and the printed line.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "device.hpp"
#include "draw.hpp"
#include "fastq/fastq.hpp"
#include "results.hpp"
#include "shapes.hpp"
#include "timing.hpp"

namespace bench {

struct AttentionSizes {
  explicit AttentionSizes(const Shape& s)
      : batch(size_of(s, "batch")),
        seqlen(size_of(s, "seqlen")),
        heads(size_of(s, "heads")),
        heads_k(size_of(s, "heads_k")),
        head_dim(size_of(s, "head_dim")) {}

  int64_t batch, seqlen, heads, heads_k, head_dim;
};

inline int64_t element_size(fastq_dtype dtype) { return dtype == FASTQ_FLOAT32 ? 4 : 2; }

inline BufferPtr make_buffer(int64_t bytes, bool cuda) {
  return std::make_shared<Buffer>(bytes, cuda);
}

// One implementation on copies of its operands, timed, printed and written.
inline void report(const Options& options, const Shape& shape, fastq_dtype dtype,
                   const std::string& implementation, const Calls& calls, double work,
                   const std::string& unit, void* stream) {
  Result result = {shape,
                   dtype == FASTQ_FLOAT32 ? "float32" : "bfloat16",
                   implementation,
                   "",
                   {},
                   calls.size(),
                   0,
                   unit};
  result.timing = measure(calls, options.rounds, options.cuda, stream);
  result.rate = 1e-3 * work / result.timing.p50_us;
  std::printf("%-24s %-8s %-22s %11.2f us %9.1f %s\n", shape_text(shape.sizes).c_str(),
              result.dtype.c_str(), implementation.c_str(), result.timing.p50_us, result.rate,
              unit.c_str());
  std::fflush(stdout);
  append(options, result);
}

using BenchShape = std::function<void(const Options&, const Shape&, fastq_dtype, void* stream)>;

// The whole program: `bench_shape` with each dtype of each shape that the device and the filter
// leave.
inline int run_attention(const std::string& op, int argc, char** argv,
                         const BenchShape& bench_shape) {
  return run_program(op, [&] {
    std::string filter;
    const Options options =
        parse(op, argc, argv, [&](const std::string& name, const std::string& value) {
          if (name == "--filter") filter = value;
          return name == "--filter";
        });
    void* const stream = make_stream(options.cuda);
    for (const Shape& shape : read_shapes(options.shapes, options.cuda)) {
      const std::string text = shape_text(shape.sizes) + " " + shape.tag;
      if (text.find(filter) == std::string::npos) continue;
      if (!options.cuda) bench_shape(options, shape, FASTQ_FLOAT32, stream);
      bench_shape(options, shape, FASTQ_BFLOAT16, stream);
    }
  });
}

}  // namespace bench
