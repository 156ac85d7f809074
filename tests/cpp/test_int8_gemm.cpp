// int8_gemm on the CPU from C++, every instruction set of this machine, against plain loops. Each
// operand is a heap block of exactly its own size, so that the preset `asan` sees a read or write
// one element too far, which the Python tests cannot.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/isa.hpp"
#include "fastq/fastq.hpp"

namespace {

using fastq::cpu::Isa;

struct Case {
  int64_t M, N, K;
};
// Around every tile edge: one less, exact, one more; one row; nothing at all.
const std::vector<Case> kCases = {{1, 1, 1},    {1, 16, 64},    {1, 33, 129},  {2, 15, 63},
                                  {7, 17, 65},  {16, 16, 64},   {17, 31, 4},   {32, 48, 128},
                                  {33, 65, 70}, {5, 100, 1},    {3, 5, 0},     {0, 4, 8},
                                  {4, 0, 8},    {19, 45, 1030}, {133, 40, 600}};
enum class Layout { kTransposed, kRowMajor, kReversed, kPacked };
const Layout kLayouts[] = {Layout::kTransposed, Layout::kRowMajor, Layout::kReversed,
                           Layout::kPacked};

uint32_t random_state = 1;
int8_t random_int8() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<int8_t>(random_state >> 24);
}

std::vector<int8_t> random_matrix(int64_t elements) {
  std::vector<int8_t> values(static_cast<size_t>(elements));
  for (int8_t& value : values) value = random_int8();
  return values;
}

std::vector<float> random_floats(int64_t count, float unit) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = unit * static_cast<float>(random_int8());
  return values;
}

std::vector<int32_t> random_ints(int64_t count) {
  std::vector<int32_t> values(static_cast<size_t>(count));
  for (int32_t& value : values) value = random_int8();
  return values;
}

// The (K, N) operand over (N, K) or (K, N) memory; `reversed` walks K from its last row back.
fastq_tensor operand_b(const std::vector<int8_t>& memory, const Case& c, Layout layout) {
  if (layout == Layout::kRowMajor || layout == Layout::kReversed) {
    fastq_tensor view = fastq::tensor_view(memory.data(), {c.K, c.N});
    if (layout == Layout::kReversed && c.K > 0) {
      view.data = const_cast<int8_t*>(memory.data() + (c.K - 1) * c.N);
      view.strides[0] = -c.N;
    }
    return view;
  }
  return fastq::transposed(fastq::tensor_view(memory.data(), {c.N, c.K}));
}

// `packed` holds what pack_weight wrote, where the layout asks for it.
fastq_weight weight_of(const fastq_tensor& b, const Case& c, Layout layout,
                       std::vector<uint8_t>& packed) {
  const fastq_weight plain = fastq::weight(b);
  if (layout != Layout::kPacked) return plain;
  packed.resize(fastq::pack_weight_size(plain) + 64);
  auto* start = packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64) % 64;
  const auto view = fastq::tensor_view(start, {static_cast<int64_t>(packed.size() - 64)});
  fastq::pack_weight(plain, view);
  return fastq::packed_weight(view, c.K, c.N);
}

int8_t element(const fastq_tensor& view, int64_t i, int64_t j) {
  return static_cast<const int8_t*>(view.data)[i * view.strides[0] + j * view.strides[1]];
}

int failures = 0;

void* allocate(void* context, size_t bytes) {
  auto& blocks = *static_cast<std::vector<std::vector<char>>*>(context);
  blocks.emplace_back(bytes + 64);
  char* start = blocks.back().data();
  return start + (64 - reinterpret_cast<uintptr_t>(start) % 64) % 64;
}

void* refuse(void*, size_t) { return nullptr; }

// The library may ask for the workspace instead of being given it.
template <class Out>
void run_with_allocator(fastq_int8_gemm_args args, size_t size, std::vector<Out>& out) {
  const std::vector<Out> expected = out;
  std::fill(out.begin(), out.end(), Out{});
  std::vector<std::vector<char>> blocks;
  args.allocate = allocate;
  args.allocate_context = &blocks;
  fastq::check(fastq_int8_gemm(&args));
  if (out != expected || blocks.size() != (size > 0 ? 1 : 0)) {
    ++failures;
    std::printf("with an allocator: other sums, or %zu blocks\n", blocks.size());
  }
  if (size == 0) return;
  args.allocate = refuse;
  if (fastq_int8_gemm(&args) != FASTQ_RUNTIME_ERROR) {
    ++failures;
    std::printf("an allocator that gives nothing went unnoticed\n");
  }
  args.allocate = nullptr;
  if (fastq_int8_gemm(&args) != FASTQ_INVALID_VALUE) {
    ++failures;
    std::printf("a missing workspace went unnoticed\n");
  }
  args.workspace_size = size;  // a size alone is no workspace
  if (fastq_int8_gemm(&args) != FASTQ_INVALID_VALUE) {
    ++failures;
    std::printf("a null workspace with a size went unnoticed\n");
  }
}

template <class Out>
void run(fastq_int8_gemm_args args, std::vector<Out>& out, const Case& c) {
  args.out = fastq::tensor_view(out.data(), {c.M, c.N});
  const size_t size = fastq::int8_gemm_workspace_size(args);
  void* workspace = size > 0 ? std::aligned_alloc(256, (size + 255) / 256 * 256) : nullptr;
  fastq::int8_gemm(args, workspace, size);
  std::free(workspace);
  run_with_allocator(args, size, out);
}

template <class Out>
void compare(const std::vector<Out>& out, const std::vector<Out>& expected,
             const std::string& about) {
  for (size_t i = 0; i < out.size(); ++i) {
    if (out[i] == expected[i]) continue;
    ++failures;
    std::printf("%s: element %zu is %.9g, expected %.9g\n", about.c_str(), i,
                static_cast<double>(out[i]), static_cast<double>(expected[i]));
    return;
  }
}

void test_case(const Case& c, Layout layout, const std::string& about) {
  const auto a = random_matrix(c.M * c.K), b = random_matrix(c.K * c.N);
  const fastq_tensor view_a = fastq::tensor_view(a.data(), {c.M, c.K});
  const fastq_tensor view_b = operand_b(b, c, layout);
  const auto scale_a = random_floats(c.M, 1e-3f), scale_b = random_floats(c.N, 1e-2f);
  const auto bias = random_floats(c.N, 0.1f), residual = random_floats(c.M * c.N, 0.1f);
  const auto zero_point = random_ints(c.M);
  const float out_scale = 0.25f;

  const int64_t size = c.M * c.N;
  std::vector<int32_t> sums(size), shifted_sums(size), column_sums(c.N);
  std::vector<float> scaled(size), finished(size);
  std::vector<int8_t> quantized(size);
  for (int64_t n = 0; n < c.N; ++n) {
    for (int64_t k = 0; k < c.K; ++k) column_sums[n] += element(view_b, k, n);
  }
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t n = 0; n < c.N; ++n) {
      const int64_t i = m * c.N + n;
      for (int64_t k = 0; k < c.K; ++k) sums[i] += element(view_a, m, k) * element(view_b, k, n);
      shifted_sums[i] = sums[i] - zero_point[m] * column_sums[n];
      scaled[i] = static_cast<float>(sums[i]) * scale_a[m] * scale_b[n] + bias[n];
      const float y = static_cast<float>(shifted_sums[i]) * scale_a[m] * scale_b[n] + bias[n];
      finished[i] = (y < 0 ? 0.0f : y) + residual[i];
      const float rounded = std::nearbyint(finished[i] / out_scale);
      quantized[i] = static_cast<int8_t>(std::min(std::max(rounded, -127.0f), 127.0f));
    }
  }

  std::vector<uint8_t> packed;
  fastq_weight weight = weight_of(view_b, c, layout, packed);
  std::vector<int32_t> out_sums(size, INT32_MIN);
  std::vector<float> out_scaled(size, -1e30f);
  std::vector<int8_t> out_quantized(size, 77);
  run(fastq::int8_gemm_args(view_a, weight, {}, {}), out_sums, c);
  compare(out_sums, sums, about + " int32");
  weight.scale = fastq::tensor_view(scale_b.data(), {c.N});
  auto args = fastq::int8_gemm_args(view_a, weight, fastq::tensor_view(scale_a.data(), {c.M}), {},
                                    fastq::tensor_view(bias.data(), {c.N}));
  run(args, out_scaled, c);
  compare(out_scaled, scaled, about + " float32");

  weight.column_sums = fastq::tensor_view(column_sums.data(), {c.N});
  args.zero_point = fastq::tensor_view(zero_point.data(), {c.M});
  args.activation = FASTQ_ACTIVATION_RELU;
  args.residual = fastq::tensor_view(residual.data(), {c.M, c.N});
  run(args, out_scaled, c);
  compare(out_scaled, finished, about + " every option");
  args.out_scale = fastq::tensor_view(&out_scale, {1});
  run(args, out_quantized, c);
  compare(out_quantized, quantized, about + " int8");
  auto raw = fastq::int8_gemm_args(view_a, weight, {}, {});
  weight.scale = {};
  raw.zero_point = args.zero_point;
  run(raw, out_sums, c);
  compare(out_sums, shifted_sums, about + " int32 with a zero point");
}

std::vector<uint8_t> output_bytes(fastq_int8_gemm_args args, const Case& c, fastq_dtype dtype,
                                  Isa isa) {
  std::vector<uint8_t> out(static_cast<size_t>(c.M * c.N * 4), 0xab);
  std::vector<std::vector<char>> blocks;
  args.out = fastq::tensor_view(out.data(), dtype, {c.M, c.N});
  args.allocate = allocate;
  args.allocate_context = &blocks;
  setenv("FASTQ_CPU_ISA", fastq::cpu::isa_name(isa), 1);
  fastq::check(fastq_int8_gemm(&args));
  return out;
}

// Every kind of output after every activation has the bits that the scalar kernel gives it.
void test_bits(Isa isa, const Case& c, Layout layout, const std::string& about) {
  const auto a = random_matrix(c.M * c.K), b = random_matrix(c.K * c.N);
  const auto scale_a = random_floats(c.M, 1e-4f), scale_b = random_floats(c.N, 1e-3f);
  const auto bias = random_floats(c.N, 0.01f);
  const float out_scale = 0.02f;
  std::vector<uint8_t> packed;
  fastq_weight weight = weight_of(operand_b(b, c, layout), c, layout, packed);
  weight.scale = fastq::tensor_view(scale_b.data(), {c.N});
  auto args = fastq::int8_gemm_args(fastq::tensor_view(a.data(), {c.M, c.K}), weight,
                                    fastq::tensor_view(scale_a.data(), {c.M}), {},
                                    fastq::tensor_view(bias.data(), {c.N}));
  for (const auto dtype : {FASTQ_FLOAT32, FASTQ_FLOAT16, FASTQ_BFLOAT16, FASTQ_INT8}) {
    args.out_scale = dtype == FASTQ_INT8 ? fastq::tensor_view(&out_scale, {1}) : fastq_tensor{};
    for (const auto activation :
         {FASTQ_ACTIVATION_NONE, FASTQ_ACTIVATION_RELU, FASTQ_ACTIVATION_GELU,
          FASTQ_ACTIVATION_GELU_TANH, FASTQ_ACTIVATION_SILU}) {
      args.activation = activation;
      compare(output_bytes(args, c, dtype, isa), output_bytes(args, c, dtype, Isa::kScalar),
              about + " dtype " + std::to_string(dtype) + " activation " +
                  std::to_string(activation) + " byte for byte");
    }
  }
}

// A struct that ends where fastq 0.1's did, in a heap block of that size.
void test_older_structs() {
  const int8_t a[2] = {3, -4}, b[2] = {5, 6};
  int32_t out = 0;
  const auto weight = fastq::weight(fastq::tensor_view(b, {2, 1}));
  auto args = fastq::int8_gemm_args(fastq::tensor_view(a, {1, 2}), weight, {},
                                    fastq::tensor_view(&out, {1, 1}));
  constexpr size_t kArgs = offsetof(fastq_int8_gemm_args, zero_point);
  constexpr size_t kWeight = offsetof(fastq_weight, column_sums);
  auto* old_weight = static_cast<fastq_weight*>(std::malloc(kWeight));
  auto* old_args = static_cast<fastq_int8_gemm_args*>(std::malloc(kArgs));
  args.b = old_weight;
  std::memcpy(static_cast<void*>(old_weight), &weight, kWeight);
  std::memcpy(static_cast<void*>(old_args), &args, kArgs);
  old_weight->struct_size = kWeight;
  old_args->struct_size = kArgs;
  fastq::check(fastq_int8_gemm(old_args));
  if (out != -9) {
    ++failures;
    std::printf("older structs: %d, expected -9\n", out);
  }
  std::free(old_args);
  std::free(old_weight);
}

// The promise is a thread's and a scope's.
void test_settled_weights() {
  const auto expect_promise = [](int32_t expected) {
    int32_t are_settled = -1;
    fastq::check(fastq_get_settled_weights(&are_settled));
    if (are_settled == expected) return;
    ++failures;
    std::printf("settled weights: %d, expected %d\n", are_settled, expected);
  };
  expect_promise(0);
  {
    const fastq::SettledWeights outer;
    {
      const fastq::SettledWeights inner;
    }
    expect_promise(1);
    std::thread([&] { expect_promise(0); }).join();
  }
  expect_promise(0);
  if (fastq_get_settled_weights(nullptr) != FASTQ_INVALID_VALUE) {
    ++failures;
    std::printf("settled weights: null is taken\n");
  }
}

}  // namespace

int main() try {
  test_settled_weights();
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeon}) {
    const std::string name = fastq::cpu::isa_name(isa);
    if (!fastq::cpu::isa_supported(isa)) {
      std::printf("%s: this machine does not offer it\n", name.c_str());
      continue;
    }
    for (const Case& c : kCases) {
      for (Layout layout : kLayouts) {
        const std::string layouts[] = {"transposed", "row-major", "reversed", "packed"};
        const std::string about = name + " " + layouts[static_cast<int>(layout)] + " " +
                                  std::to_string(c.M) + "x" + std::to_string(c.N) + "x" +
                                  std::to_string(c.K);
        setenv("FASTQ_CPU_ISA", name.c_str(), 1);
        test_case(c, layout, about);
        test_bits(isa, c, layout, about);
      }
    }
    setenv("FASTQ_CPU_ISA", name.c_str(), 1);
    test_older_structs();
    std::printf("%s: done\n", name.c_str());
  }
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
