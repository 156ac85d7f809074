// int8_gemm on the CPU from C++, every instruction set of this machine, against plain loops. Each
// operand is a heap block of exactly its own size, so that the preset `asan` sees a read or write
// one element too far, which the Python tests cannot.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/isa.hpp"
#include "fastq/fastq.hpp"

namespace {

using fastq::cpu::Isa;

struct Case {
  int64_t M, N, K;
};
// Around every tile edge: one less, exact, one more; one row; nothing at all.
const std::vector<Case> kCases = {
    {1, 1, 1},     {1, 16, 64},  {1, 33, 129}, {2, 15, 63}, {7, 17, 65}, {16, 16, 64}, {17, 31, 4},
    {32, 48, 128}, {33, 65, 70}, {5, 100, 1},  {3, 5, 0},   {0, 4, 8},   {4, 0, 8}};
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
void run(const fastq_tensor& a, const fastq_weight& b, const fastq_tensor& scale_a,
         const fastq_tensor& bias, std::vector<Out>& out, const Case& c) {
  const auto view = fastq::tensor_view(out.data(), {c.M, c.N});
  const auto args = fastq::int8_gemm_args(a, b, scale_a, view, bias);
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
  std::vector<float> scale_a(c.M), scale_b(c.N), bias(c.N);
  for (float& s : scale_a) s = 1e-3f * static_cast<float>(random_int8());
  for (float& s : scale_b) s = 1e-2f * static_cast<float>(random_int8());
  for (float& s : bias) s = 0.1f * static_cast<float>(random_int8());

  std::vector<int32_t> sums(c.M * c.N);
  std::vector<float> scaled(c.M * c.N);
  for (int64_t m = 0; m < c.M; ++m) {
    for (int64_t n = 0; n < c.N; ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < c.K; ++k) sum += element(view_a, m, k) * element(view_b, k, n);
      sums[m * c.N + n] = sum;
      const float product = static_cast<float>(sum) * scale_a[m] * scale_b[n];
      scaled[m * c.N + n] = product + bias[n];
    }
  }

  fastq_weight weight = fastq::weight(view_b);
  std::vector<uint8_t> packed;
  if (layout == Layout::kPacked) {
    packed.resize(fastq::pack_weight_size(weight) + 64);
    auto* start = packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64) % 64;
    const auto view = fastq::tensor_view(start, {static_cast<int64_t>(packed.size() - 64)});
    fastq::pack_weight(weight, view);
    weight = fastq::packed_weight(view, c.K, c.N);
  }
  std::vector<int32_t> out_sums(c.M * c.N, INT32_MIN);
  run(view_a, weight, {}, {}, out_sums, c);
  compare(out_sums, sums, about + " int32");

  weight.scale = fastq::tensor_view(scale_b.data(), {c.N});
  std::vector<float> out_scaled(c.M * c.N, -1e30f);
  run(view_a, weight, fastq::tensor_view(scale_a.data(), {c.M}),
      fastq::tensor_view(bias.data(), {c.N}), out_scaled, c);
  compare(out_scaled, scaled, about + " float32");
}

}  // namespace

int main() try {
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx}) {
    const std::string name = fastq::cpu::isa_name(isa);
    if (!fastq::cpu::isa_supported(isa)) {
      std::printf("%s: this machine does not offer it\n", name.c_str());
      continue;
    }
    setenv("FASTQ_CPU_ISA", name.c_str(), 1);
    for (const Case& c : kCases) {
      for (Layout layout : kLayouts) {
        const std::string layouts[] = {"transposed", "row-major", "reversed", "packed"};
        test_case(c, layout,
                  name + " " + layouts[static_cast<int>(layout)] + " " + std::to_string(c.M) + "x" +
                      std::to_string(c.N) + "x" + std::to_string(c.K));
      }
    }
    std::printf("%s: done\n", name.c_str());
  }
  return failures == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
  return 1;
}
