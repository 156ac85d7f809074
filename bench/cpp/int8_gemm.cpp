// INT8 GEMM from C++: what the kernels take without Python, on the shapes and in the JSON lines of
// `python -m bench.int8_gemm`.
//
//   bench_int8_gemm [--device cpu|cuda] [--shapes FILE] [--out FILE] [--commit ID] [--rounds N]
//                   [--M 1,16,64] [--NK 4096x4096,11008x4096]
//
// --M and --NK leave only these of the file's shapes.
//
// Inputs are drawn from N(0, 1), quantised by absmax, and copied often enough to spill the caches.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef FASTQ_BENCH_CUDA
#include <cuda_runtime_api.h>
#endif

#include "fastq/fastq.hpp"

namespace {

constexpr char kDigits[] = "0123456789";

struct Options {
  bool cuda = false;
  std::string shapes = "bench/shapes/int8_gemm.json";
  std::string out;
  std::string commit = "unknown";
  int rounds = 25;
  std::vector<int64_t> m, nk;  // nk: N, K, N, K, ...; empty: all
};

struct Shape {
  int64_t M, N, K;
  std::string tag;

  bool operator==(const Shape& s) const { return M == s.M && N == s.N && K == s.K; }
};

struct Timing {
  double p10_us, p50_us, p90_us;
};

#ifdef FASTQ_BENCH_CUDA
void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
#endif

// Memory of the device that is measured.
class Buffer {
 public:
  Buffer(size_t bytes, bool cuda) : bytes_(std::max<size_t>(bytes, 256)), cuda_(cuda) {
#ifdef FASTQ_BENCH_CUDA
    if (cuda_) {
      check_cuda(cudaMalloc(&data_, bytes_));
      return;
    }
#endif
    data_ = std::aligned_alloc(256, (bytes_ + 255) / 256 * 256);
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#ifdef FASTQ_BENCH_CUDA
    if (cuda_) {
      cudaFree(data_);
      return;
    }
#endif
    std::free(data_);
  }

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

  void copy_from(const void* source, size_t bytes) {
#ifdef FASTQ_BENCH_CUDA
    if (cuda_) {
      check_cuda(cudaMemcpy(data_, source, bytes, cudaMemcpyDefault));
      return;
    }
#endif
    std::memcpy(data_, source, bytes);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
  bool cuda_;
};
using BufferPtr = std::shared_ptr<Buffer>;

BufferPtr copy_of(const Buffer& source, bool cuda) {
  auto copy = std::make_shared<Buffer>(source.bytes(), cuda);
  copy->copy_from(source.data(), source.bytes());
  return copy;
}

fastq::Device device_of(bool cuda) { return {cuda ? FASTQ_CUDA : FASTQ_CPU, 0}; }

// A quantised matrix, one scale a row.
struct Quantized {
  BufferPtr q, scale;
};

Quantized draw(int64_t rows, int64_t cols, bool cuda, std::mt19937& generator) {
  // Drawing takes longer than any product: a large matrix repeats what was drawn, in another column
  // of each row.
  constexpr int64_t kDrawn = 4194301;  // a prime
  std::normal_distribution<float> normal;
  std::vector<float> host(rows * cols);
  for (int64_t i = 0; i < rows * cols; ++i) {
    host[i] = i < kDrawn ? normal(generator) : host[i - kDrawn];
  }
  Buffer x(host.size() * sizeof(float), cuda);
  x.copy_from(host.data(), host.size() * sizeof(float));
  const Quantized result{std::make_shared<Buffer>(rows * cols, cuda),
                         std::make_shared<Buffer>(rows * sizeof(float), cuda)};
  const fastq::Device device = device_of(cuda);
  fastq::quantize_per_token(
      fastq::tensor_view(x.data(), FASTQ_FLOAT32, {rows, cols}, device),
      fastq::tensor_view(result.q->data(), FASTQ_INT8, {rows, cols}, device),
      fastq::tensor_view(result.scale->data(), FASTQ_FLOAT32, {rows, 1}, device));
#ifdef FASTQ_BENCH_CUDA
  if (cuda) check_cuda(cudaDeviceSynchronize());  // before x is freed
#endif
  return result;
}

size_t cache_bytes(bool cuda) {
#ifdef FASTQ_BENCH_CUDA
  if (cuda) {
    int bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, 0));
    return bytes;
  }
#endif
  (void)cuda;
  return std::max(sysconf(_SC_LEVEL3_CACHE_SIZE), 32L << 20);
}

// One product on its own copy of the operands. The struct stays where it is: `args` points into it.
struct Product {
  BufferPtr a, b, out, workspace;
  fastq_weight weight;
  fastq_int8_gemm_args args;

  void run() const { fastq::int8_gemm(args, workspace->data(), workspace->bytes()); }
};
using Products = std::vector<std::unique_ptr<Product>>;

Products make_products(const Shape& s, const Quantized& x, const Quantized& w, bool packed,
                       bool cuda, void* stream) {
  const fastq::Device device = device_of(cuda);
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
  const size_t wanted = (cuda ? 4 : 2) * cache_bytes(cuda);
  const size_t count =
      std::clamp<size_t>((wanted + s.M * s.K + s.N * s.K - 1) / (s.M * s.K + s.N * s.K), 2, 256);
  Products products;
  for (size_t i = 0; i < count; ++i) {
    auto p = std::make_unique<Product>();
    p->a = copy_of(*x.q, cuda), p->b = copy_of(*b, cuda);
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

Timing quantiles(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto at = [&](double part) { return samples[std::lround(part * (samples.size() - 1))]; };
  return {at(0.1), at(0.5), at(0.9)};
}

Timing time_cpu(const Products& products, int rounds) {
  using Clock = std::chrono::steady_clock;
  size_t next = 0;
  const auto run = [&](int count) {
    const auto begin = Clock::now();
    for (int i = 0; i < count; ++i) products[next++ % products.size()]->run();
    return std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / count;
  };
  run(2);
  const int count = std::max(1, static_cast<int>(5e3 / run(2)));
  std::vector<double> samples;
  for (int i = 0; i < rounds; ++i) samples.push_back(run(count));
  return quantiles(samples);
}

#ifdef FASTQ_BENCH_CUDA
Timing time_cuda(const Products& products, int rounds, cudaStream_t stream) {
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin));
  check_cuda(cudaEventCreate(&end));
  const auto elapsed_us = [&](const std::function<void()>& work) {
    check_cuda(cudaEventRecord(begin, stream));
    work();
    check_cuda(cudaEventRecord(end, stream));
    check_cuda(cudaEventSynchronize(end));
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin, end));
    return 1e3 * ms;
  };
  const auto run_all = [&] {
    for (const auto& product : products) product->run();
  };
  run_all();
  const double once = elapsed_us(run_all);
  const int repeats = std::max(1, static_cast<int>(1500 / once));

  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < repeats; ++i) run_all();
  check_cuda(cudaStreamEndCapture(stream, &graph));
  check_cuda(cudaGraphInstantiate(&executable, graph, 0));
  const auto replay = [&] { check_cuda(cudaGraphLaunch(executable, stream)); };
  std::vector<double> samples;
  for (int i = -5; i < rounds; ++i) {  // the first ones bring the clocks to where they stay
    replay();                          // keeps the GPU busy until the timed one is enqueued
    const double us = elapsed_us(replay) / (static_cast<double>(repeats) * products.size());
    if (i >= 0) samples.push_back(us);
  }
  check_cuda(cudaGraphExecDestroy(executable));
  check_cuda(cudaGraphDestroy(graph));
  check_cuda(cudaEventDestroy(begin));
  check_cuda(cudaEventDestroy(end));
  return quantiles(samples);
}
#endif

// The integers of a text, whatever stands between them.
std::vector<int64_t> integers(const std::string& text) {
  std::vector<int64_t> found;
  for (size_t at = text.find_first_of(kDigits); at != std::string::npos;
       at = text.find_first_of(kDigits, at)) {
    found.push_back(std::stoll(text.substr(at)));
    at = text.find_first_not_of(kDigits, at);
  }
  return found;
}

// What follows a name in an entry of the shapes file: up to the end of its list, or to the comma.
// Empty where the entry has no such name.
std::string field(const std::string& entry, const std::string& name) {
  size_t begin = entry.find("\"" + name + "\":");
  if (begin == std::string::npos) return "";
  begin = entry.find_first_not_of(' ', begin + name.size() + 3);
  size_t end = begin;
  int depth = 0;
  do {
    depth += entry[end] == '[';
    depth -= entry[end] == ']';
    ++end;
  } while (end < entry.size() && (depth > 0 || (entry[end] != ',' && entry[end] != '}')));
  return entry.substr(begin, end - begin);
}

// The sizes that an entry of the shapes file stands for, as bench/results.py expands it: a list is
// one size after the other, NK holds pairs.
std::vector<Shape> expand(const std::string& entry) {
  const std::vector<int64_t> m = integers(field(entry, "M"));
  std::vector<int64_t> nk = integers(field(entry, "NK"));
  if (nk.empty()) {
    for (const int64_t n : integers(field(entry, "N"))) {
      for (const int64_t k : integers(field(entry, "K"))) nk.insert(nk.end(), {n, k});
    }
  }
  const std::string quoted = field(entry, "tag");
  if (m.empty() || nk.empty() || nk.size() % 2 != 0 || quoted.size() < 2) {
    throw std::runtime_error("not a shape: " + entry);
  }
  std::vector<Shape> shapes;
  for (const int64_t M : m) {
    for (size_t i = 0; i < nk.size(); i += 2) {
      shapes.push_back({M, nk[i], nk[i + 1], quoted.substr(1, quoted.size() - 2)});
    }
  }
  return shapes;
}

bool is_chosen(const Options& options, const Shape& s) {
  const bool m =
      options.m.empty() || std::find(options.m.begin(), options.m.end(), s.M) != options.m.end();
  bool nk = options.nk.empty();
  for (size_t i = 0; i + 1 < options.nk.size(); i += 2) {
    nk = nk || (options.nk[i] == s.N && options.nk[i + 1] == s.K);
  }
  return m && nk;
}

// A shape that stands in the file twice has its first tag.
std::vector<Shape> read_shapes(const Options& options) {
  std::ifstream file(options.shapes);
  if (!file) throw std::runtime_error("cannot read " + options.shapes);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  const std::string device = options.cuda ? "\"cuda\"" : "\"cpu\"";
  std::vector<Shape> shapes;
  for (size_t at = text.find('{'); at != std::string::npos; at = text.find('{', at + 1)) {
    const std::string entry = text.substr(at, text.find('}', at) + 1 - at);
    if (field(entry, "devices").find(device) == std::string::npos) continue;
    for (const Shape& shape : expand(entry)) {
      const bool is_new = std::find(shapes.begin(), shapes.end(), shape) == shapes.end();
      if (is_new && is_chosen(options, shape)) shapes.push_back(shape);
    }
  }
  return shapes;
}

std::string device_name(bool cuda) {
#ifdef FASTQ_BENCH_CUDA
  if (cuda) {
    cudaDeviceProp props;
    check_cuda(cudaGetDeviceProperties(&props, 0));
    return props.name;
  }
#endif
  (void)cuda;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::runtime_error(name + " needs a value");
    const std::string value = argv[i + 1];
    if (name == "--device" && (value == "cpu" || value == "cuda")) {
      options.cuda = value == "cuda";
    } else if (name == "--shapes") {
      options.shapes = value;
    } else if (name == "--out") {
      options.out = value;
    } else if (name == "--commit") {
      options.commit = value;
    } else if (name == "--rounds") {
      options.rounds = std::stoi(value);
    } else if (name == "--M") {
      options.m = integers(value);
    } else if (name == "--NK") {
      options.nk = integers(value);
    } else {
      throw std::runtime_error("unknown option " + name + " " + value);
    }
  }
#ifndef FASTQ_BENCH_CUDA
  if (options.cuda) throw std::runtime_error("this build has no CUDA backend");
#endif
  return options;
}

void report(const Options& options, const Shape& s, const std::string& implementation,
            const std::string& config, const Timing& t, size_t copies) {
  const double rate = 2e-6 * static_cast<double>(s.M) * s.N * s.K / t.p50_us;
  std::printf("%6ldx%ldx%ld %-18s %11.2f us %9.3f TOP/s  %s\n", static_cast<long>(s.M),
              static_cast<long>(s.N), static_cast<long>(s.K), implementation.c_str(), t.p50_us,
              rate, config.c_str());
  if (options.out.empty()) return;
  char stamp[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  std::FILE* file = std::fopen(options.out.c_str(), "a");
  if (file == nullptr) throw std::runtime_error("cannot write " + options.out);
  std::fprintf(file,
               "{\"time\": \"%s\", \"commit\": \"%s\", \"device\": \"%s\", \"fastq\": \"%s\", "
               "\"threads\": %d, \"op\": \"int8_gemm\", \"tag\": \"%s\", "
               "\"shape\": {\"M\": %ld, \"N\": %ld, \"K\": %ld}, \"dtype\": \"int8 -> bfloat16\", "
               "\"implementation\": \"%s\", \"config\": \"%s\", \"p10_us\": %.3f, "
               "\"p50_us\": %.3f, \"p90_us\": %.3f, \"timer\": \"%s\", \"copies\": %zu, "
               "\"rate\": %.3f, \"unit\": \"TOP/s\", \"peer\": null, \"ratio\": null}\n",
               stamp, options.commit.c_str(), device_name(options.cuda).c_str(), fastq_version(),
               fastq::get_num_threads(), s.tag.c_str(), static_cast<long>(s.M),
               static_cast<long>(s.N), static_cast<long>(s.K), implementation.c_str(),
               config.c_str(), t.p10_us, t.p50_us, t.p90_us,
               options.cuda ? "cuda graph" : "steady_clock", copies, rate);
  std::fclose(file);
}

void bench(const Options& options, const Shape& s, void* stream) {
  std::mt19937 generator(0);
  const Quantized x = draw(s.M, s.K, options.cuda, generator);
  const Quantized w = draw(s.N, s.K, options.cuda, generator);
  for (const bool packed : {false, true}) {
    if (packed && options.cuda) continue;
    const Products products = make_products(s, x, w, packed, options.cuda, stream);
    const std::string config = fastq::int8_gemm_describe(products[0]->args);
    Timing timing;
#ifdef FASTQ_BENCH_CUDA
    if (options.cuda) {
      timing = time_cuda(products, options.rounds, static_cast<cudaStream_t>(stream));
    } else {
      timing = time_cpu(products, options.rounds);
    }
#else
    timing = time_cpu(products, options.rounds);
#endif
    report(options, s, packed ? "fastq[c++, packed]" : "fastq[c++]", config, timing,
           products.size());
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    void* stream = nullptr;
#ifdef FASTQ_BENCH_CUDA
    if (options.cuda) {
      cudaStream_t created;
      check_cuda(cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking));
      stream = created;
    }
#endif
    for (const Shape& shape : read_shapes(options)) {
      bench(options, shape, stream);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_int8_gemm: %s\n", error.what());
    return 1;
  }
  return 0;
}
