// llm_int8_matmul on the CPU from C++, every instruction set of this machine, bit for bit against
// the formula in plain loops. Each operand is a heap block of exactly its own size, so that the
// preset `asan` sees a read or write one element too far, which the Python tests cannot.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/float16.hpp"
#include "cpu/isa.hpp"
#include "expect.hpp"
#include "fastq/fastq.hpp"

namespace {

using fastq::cpu::Isa;

struct Case {
  int64_t M, N, K;
  int64_t outlier_columns;  // of x, spread over K
  int64_t kept;             // columns that have a float weight, every other one without outliers
  float threshold = 6.0f;
  bool strided = false;  // x, out, kept columns and their weights with gaps, b row-major
  bool has_bias = true;
  fastq_dtype x_dtype = FASTQ_FLOAT32, out_dtype = FASTQ_FLOAT32, kept_dtype = FASTQ_FLOAT32;
};
constexpr fastq_dtype kF32 = FASTQ_FLOAT32, kF16 = FASTQ_FLOAT16, kBf16 = FASTQ_BFLOAT16;
// Around the edges of tiles, runs, words of the mask and chunks of outlier columns; none at all.
const Case kCases[] = {{1, 1, 1, 1, 0},
                       {1, 33, 129, 3, 2},
                       {5, 40, 64, 0, 2},
                       {7, 17, 65, 4, 0, 0.0f},
                       {3, 5, 0, 0, 0},
                       {0, 5, 8, 0, 2},
                       {4, 0, 70, 3, 0},
                       {17, 31, 130, 5, 4, 6.0f, true},
                       {33, 65, 70, 64, 10, 6.0f, false, false, kF16, kBf16, kF16},
                       {40, 50, 200, 65, 130, 6.0f, true, true, kBf16, kF16, kBf16},
                       {133, 40, 600, 131, 40, 6.0f, false, true, kF16, kF32, kF32},
                       {130, 100, 1030, 9, 6, 6.25f, false, false, kBf16, kBf16, kF16},
                       {200, 36, 128, 128, 0, 1e-3f, true, false, kF16, kF16, kF32},
                       {9, 20, 96, 4, 2, 1e30f, false, true, kF16, kF32, kF32},
                       {9, 20, 96, 4, 2, INFINITY, false, true, kF32, kF32, kF32}};

uint32_t random_state = 1;
int32_t random_below(int32_t bound) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<int32_t>((random_state >> 8) % static_cast<uint32_t>(bound));
}
float random_float() {  // about normal, below 4 in magnitude
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<float>(random_below(1 << 20)) / (1 << 20) - 0.5f;
  return 1.7f * sum;
}

// Floats in a dtype and with strides of their own, in a block of exactly their size.
struct Matrix {
  Matrix(int64_t rows, int64_t cols, fastq_dtype type, bool strided)
      : dtype(type), stride_c(strided ? 2 : 1), stride_r(cols * stride_c + (strided ? 3 : 0)) {
    const int64_t count =
        rows > 0 && cols > 0 ? (rows - 1) * stride_r + (cols - 1) * stride_c + 1 : 0;
    bytes.assign(count * size(), 0x55);
    view = fastq::tensor_view(bytes.data(), dtype, {rows, cols});
    view.strides[0] = stride_r, view.strides[1] = stride_c;
  }
  int64_t size() const { return dtype == kF32 ? 4 : 2; }
  uint8_t* at(int64_t r, int64_t c) {
    return bytes.data() + (r * stride_r + c * stride_c) * size();
  }
  float get(int64_t r, int64_t c) {
    float value;
    uint16_t bits;
    if (dtype == kF32) return std::memcpy(&value, at(r, c), 4), value;
    std::memcpy(&bits, at(r, c), 2);
    return dtype == kF16 ? fastq::float16_to_float(bits) : fastq::bfloat16_to_float(bits);
  }
  void set(int64_t r, int64_t c, float value) {
    if (dtype == kF32) {
      std::memcpy(at(r, c), &value, 4);
      return;
    }
    const uint16_t bits =
        dtype == kF16 ? fastq::float_to_float16(value) : fastq::float_to_bfloat16(value);
    std::memcpy(at(r, c), &bits, 2);
  }

  fastq_dtype dtype;
  int64_t stride_c, stride_r;
  std::vector<uint8_t> bytes;
  fastq_tensor view;
};

struct Operands {
  explicit Operands(const Case& c)
      : x(c.M, c.K, c.x_dtype, c.strided),
        kept(c.kept, c.N, c.kept_dtype, c.strided),
        bias(1, c.N, c.out_dtype, false),
        b(c.K * c.N),
        scale_b(c.N),
        columns(c.kept > 0 ? c.kept * 2 - 1 : 0, -1) {
    for (int64_t m = 0; m < c.M; ++m) {
      for (int64_t k = 0; k < c.K; ++k) x.set(m, k, random_float());
    }
    for (int64_t i = 0; i < c.outlier_columns && c.M > 0; ++i) {
      const int64_t k = i * c.K / c.outlier_columns;
      for (int64_t m = 0; m < c.M; m += 1 + random_below(3)) x.set(m, k, 20.0f * random_float());
      const float edge = c.threshold > 1e4f ? INFINITY : c.threshold;
      x.set(random_below(c.M), k, i % 2 == 0 ? edge : -edge);
    }
    for (int8_t& value : b) value = static_cast<int8_t>(random_below(255) - 127);
    for (float& value : scale_b) value = 0.01f * random_float();
    for (int64_t i = 0; i < c.kept; ++i) {
      columns[2 * i] = static_cast<int32_t>(i * c.K / c.kept);
      for (int64_t n = 0; n < c.N; ++n) kept.set(i, n, random_float());
    }
    for (int64_t n = 0; n < c.N; ++n) bias.set(0, n, random_float());
    const fastq_tensor plain = c.strided
                                   ? fastq::tensor_view(b.data(), {c.K, c.N})
                                   : fastq::transposed(fastq::tensor_view(b.data(), {c.N, c.K}));
    weight = fastq::weight(plain, fastq::tensor_view(scale_b.data(), {c.N}));
  }

  int8_t weight_at(int64_t k, int64_t n) const {
    return b[k * weight.data.strides[0] + n * weight.data.strides[1]];
  }
  fastq_llm_int8_matmul_args args(const Case& c, const fastq_tensor& out) const {
    fastq_llm_int8_matmul_args args = fastq::llm_int8_matmul_args(x.view, weight, out, c.threshold);
    if (c.has_bias) {
      args.bias = fastq::tensor_view(bias.bytes.data(), bias.dtype, {c.N});
    }
    if (c.kept > 0) {
      args.outlier_columns = fastq::tensor_view(columns.data(), {c.kept});
      args.outlier_columns.strides[0] = 2;
      args.outlier_weight = kept.view;
    }
    return args;
  }

  Matrix x, kept, bias;
  std::vector<int8_t> b;
  std::vector<float> scale_b;
  std::vector<int32_t> columns;  // every other one
  fastq_weight weight;
};

bool is_outlier(const Case& c, float x) { return c.threshold > 0 && std::fabs(x) >= c.threshold; }

// fastq.h's formula, a row at a time.
void expect_row(const Case& c, Operands& of, int64_t m, Matrix& out) {
  float absmax = 0;
  bool has_nan = false;
  for (int64_t k = 0; k < c.K; ++k) {
    const float x = of.x.get(m, k);
    has_nan |= std::isnan(x);
    if (!is_outlier(c, x)) absmax = std::fmax(absmax, std::fabs(x));
  }
  const float least = std::numeric_limits<float>::min();
  float scale = absmax == 0 ? 1.0f : std::fmax(absmax / 127.0f, least);
  if (has_nan) scale = NAN;
  for (int64_t n = 0; n < c.N; ++n) {
    int64_t sum = 0;
    for (int64_t k = 0; k < c.K && std::isfinite(scale); ++k) {
      const float x = of.x.get(m, k);
      if (is_outlier(c, x)) continue;
      const double q = std::nearbyint(x / scale);
      sum += static_cast<int64_t>(std::fmin(std::fmax(q, -127), 127)) * of.weight_at(k, n);
    }
    float y = static_cast<float>(sum) * scale * of.scale_b[n];
    for (int64_t k = 0; k < c.K; ++k) {
      const float x = of.x.get(m, k);
      if (!is_outlier(c, x)) continue;
      float v = static_cast<float>(of.weight_at(k, n)) * of.scale_b[n];
      for (int64_t i = 0; i < c.kept; ++i) {
        if (of.columns[2 * i] == k) v = of.kept.get(i, n);
      }
      y = std::fma(x, v, y);
    }
    if (c.has_bias) y += of.bias.get(0, n);
    out.set(m, n, y);
  }
}

int32_t expected_count(const Case& c, Operands& of) {
  int32_t count = 0;
  for (int64_t k = 0; k < c.K; ++k) {
    bool any = false;
    for (int64_t m = 0; m < c.M; ++m) any |= is_outlier(c, of.x.get(m, k));
    count += any;
  }
  return count;
}

void call(const fastq_llm_int8_matmul_args& args) {
  const size_t size = fastq::llm_int8_matmul_workspace_size(args);
  void* const workspace = std::aligned_alloc(64, (size + 63) / 64 * 64);
  std::memset(workspace, 0x77, size);
  fastq::llm_int8_matmul(args, workspace, size);
  std::free(workspace);
}

// Gaps of `out` included; any NaN is as good as another.
void compare(const Case& c, Matrix& out, Matrix& expected, const std::string& about) {
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t n = 0; n < c.N; ++n) {
      if (std::isnan(expected.get(m, n)) && std::isnan(out.get(m, n))) out.set(m, n, 0);
      if (std::isnan(expected.get(m, n))) expected.set(m, n, 0);
    }
  }
  EXPECT(out.bytes == expected.bytes, about);
}

void check(const Case& c, Operands& of, const std::string& about) {
  Matrix out(c.M, c.N, c.out_dtype, c.strided), expected(c.M, c.N, c.out_dtype, c.strided);
  for (int64_t m = 0; m < c.M; ++m) expect_row(c, of, m, expected);
  int32_t count = -1;
  auto args = of.args(c, out.view);
  call(args);  // without a count
  args.outlier_count = fastq::tensor_view(&count, {1});
  call(args);
  compare(c, out, expected, about);
  const int32_t columns = expected_count(c, of);
  EXPECT(count == columns, about + ": " + std::to_string(count) + " columns");
}

// A NaN is no outlier and takes its row; an Inf is one and leaves the row's other elements alone.
void check_special(const std::string& about) {
  const Case c{6, 20, 70, 2, 3};
  Operands of(c);
  of.x.set(1, 5, NAN), of.x.set(2, 6, INFINITY), of.x.set(3, 7, -INFINITY);
  of.x.set(4, 8, NAN), of.x.set(4, 9, INFINITY);
  for (int64_t k = 0; k < c.K; ++k) of.x.set(5, k, 7.0f);  // nothing but outliers
  check(c, of, about + ", NaN and Inf");
}

// Without outliers: what quantize_per_token and int8_gemm make of it.
void check_without(float threshold, const std::string& about) {
  const Case c{37, 45, 300, 0, 3, threshold, false, true, kBf16, kBf16, kF32};
  Operands of(c);
  Matrix out(c.M, c.N, c.out_dtype, false), expected(c.M, c.N, c.out_dtype, false);
  call(of.args(c, out.view));
  std::vector<int8_t> q(c.M * c.K);
  std::vector<float> scale(c.M);
  const fastq_tensor q_view = fastq::tensor_view(q.data(), {c.M, c.K});
  const fastq_tensor scale_view = fastq::tensor_view(scale.data(), {c.M});
  fastq::quantize_per_token(of.x.view, q_view, scale_view);
  const auto args =
      fastq::int8_gemm_args(q_view, of.weight, scale_view, expected.view,
                            fastq::tensor_view(of.bias.bytes.data(), of.bias.dtype, {c.N}));
  const size_t size = fastq::int8_gemm_workspace_size(args);
  void* const workspace = std::aligned_alloc(64, (size + 63) / 64 * 64);
  fastq::int8_gemm(args, workspace, size);
  std::free(workspace);
  EXPECT(out.bytes == expected.bytes, about + ", threshold " + std::to_string(threshold));
}

// A row has the same bits in any batch, and the batch may have any leading dimensions.
void check_batch(const std::string& about) {
  const Case c{48, 70, 260, 6, 2};
  Operands of(c);
  Matrix out(c.M, c.N, kF32, false), one(c.M, c.N, kF32, false);
  auto args = of.args(c, fastq::tensor_view(out.bytes.data(), kF32, {4, 12, c.N}));
  args.x = fastq::tensor_view(of.x.bytes.data(), kF32, {4, 12, c.K});
  call(args);
  for (int64_t m = 0; m < c.M; ++m) {
    args.x = fastq::tensor_view(of.x.at(m, 0), kF32, {1, c.K});
    args.out = fastq::tensor_view(one.at(m, 0), kF32, {1, c.N});
    call(args);
  }
  EXPECT(out.bytes == one.bytes, about + ", row by row");
}

// Fewer threads were asked for the size than there are at the call.
void check_threads() {
  const Case c{70, 90, 3000, 9, 2};
  Operands of(c);
  Matrix out(c.M, c.N, kF32, false), expected(c.M, c.N, kF32, false);
  for (int64_t m = 0; m < c.M; ++m) expect_row(c, of, m, expected);
  const auto args = of.args(c, out.view);
  int32_t threads = 0;
  fastq::check(fastq_get_num_threads(&threads));
  fastq::check(fastq_set_num_threads(1));
  const size_t size = fastq::llm_int8_matmul_workspace_size(args);
  fastq::check(fastq_set_num_threads(5));
  void* const workspace = std::aligned_alloc(64, (size + 63) / 64 * 64);
  fastq::llm_int8_matmul(args, workspace, size);
  std::free(workspace);
  EXPECT(out.bytes == expected.bytes, "more threads than the workspace is for");
  call(args);
  EXPECT(out.bytes == expected.bytes, "five threads");
  fastq::check(fastq_set_num_threads(threads));
}

template <class Call>
void expect_refusal(const Call& refused, const std::string& message) {
  std::string got = "nothing";
  try {
    refused();
  } catch (const fastq::Exception& error) {
    got = error.what();
  }
  EXPECT(got.find(message) != std::string::npos, message + ", got: " + got);
}

void check_refusals() {
  const Case c{3, 8, 16, 2, 3};
  Operands of(c);
  Matrix out(c.M, c.N, kF32, false);
  const auto good = of.args(c, out.view);
  const auto refuse = [&](const fastq_llm_int8_matmul_args& args, const std::string& message) {
    expect_refusal([&] { fastq::llm_int8_matmul(args); }, "llm_int8_matmul: " + message);
  };
  refuse(good, "workspace holds 0 bytes");
  auto args = good;
  args.struct_size = 8;
  refuse(args, "struct_size is 8");
  args = good;
  args.b = nullptr;
  refuse(args, "b is missing");
  args = good;
  args.x.sizes[1] = c.K - 1;
  refuse(args, "x has shape");
  args = good;
  args.out.sizes[1] = c.N - 1;
  refuse(args, "out has shape");
  args = good;
  args.outlier_weight = {};
  refuse(args, "only one of outlier_columns and outlier_weight");
  for (const float threshold : {NAN, -1.0f}) {
    args = good;
    args.threshold = threshold;
    refuse(args, "threshold is");
  }
  fastq_weight packed = of.weight;
  packed.layout = FASTQ_WEIGHT_PACKED;
  args = good;
  args.b = &packed;
  refuse(args, "b is packed");
  packed = of.weight;
  packed.struct_size = 8;
  refuse(args, "struct_size is 8");
  for (const int32_t column : {of.columns[0], -1, static_cast<int32_t>(c.K)}) {
    const int32_t kept = of.columns[2];
    of.columns[2] = column;
    refuse(good, "outlier_columns[1] is " + std::to_string(column));
    of.columns[2] = kept;
  }
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeon}) {
    if (!fastq::cpu::isa_supported(isa)) continue;
    const std::string name = fastq::cpu::isa_name(isa);
    setenv("FASTQ_CPU_ISA", name.c_str(), 1);
    int index = 0;
    for (const Case& c : kCases) {
      Operands of(c);
      check(c, of, name + ", case " + std::to_string(index++));
    }
    check_special(name);
    check_without(0.0f, name);
    check_without(6.0f, name);
    check_batch(name);
    check_threads();
  }
  check_refusals();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
