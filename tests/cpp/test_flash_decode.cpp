// flash_decode and kv_append on the CPU from C++, every instruction set of this machine, against
// whole rows of scores in double. Each operand is a heap block of exactly its own size, so that the
// preset `asan` sees a read or write one element too far, which the Python tests cannot.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/isa.hpp"
#include "expect.hpp"
#include "fastq/fastq.hpp"

namespace {

using fastq::cpu::Isa;

struct Case {
  std::vector<int32_t> lengths;
  int64_t seqlen_q, heads, heads_k, head_dim;
  int64_t page_size;  // 0: a contiguous cache of the longest sequence's size
  bool is_int8;
};
// Around the edges of blocks of keys, parts, pages, panels and few rows; nothing at all.
const Case kCases[] = {{{1}, 1, 1, 1, 1, 0, false},         {{63, 0, 65}, 1, 2, 1, 15, 0, false},
                       {{600, 513}, 1, 4, 4, 64, 0, false}, {{600, 513}, 1, 4, 4, 64, 16, true},
                       {{1200}, 3, 8, 2, 33, 32, false},    {{100, 16}, 17, 6, 3, 72, 16, true},
                       {{70, 3}, 70, 2, 2, 80, 0, false},   {{0}, 4, 2, 1, 16, 0, false},
                       {{0}, 4, 2, 1, 16, 16, true},        {{130, 64}, 40, 3, 3, 256, 64, false},
                       {{40}, 0, 2, 1, 16, 0, false},       {{90, 91}, 1, 32, 1, 128, 16, true}};

uint32_t random_state = 1;
float random_float() {  // about normal
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    random_state = random_state * 1664525u + 1013904223u;
    sum += static_cast<float>(random_state >> 8) / (1 << 24) - 0.5f;
  }
  return 1.7f * sum;
}

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = random_float();
  return values;
}

// A cache with all of its tokens appended, and the k and v that they were.
struct Cache {
  explicit Cache(const Case& c) : batch(c.lengths.size()), lengths(c.lengths) {
    longest = *std::max_element(lengths.begin(), lengths.end());
    int64_t outer = batch, rows = longest, max_pages = 0;
    if (c.page_size > 0) {
      max_pages = (longest + c.page_size - 1) / c.page_size;
      outer = batch * max_pages, rows = c.page_size;
      for (int64_t i = 0; i < outer; ++i) table.push_back(static_cast<int32_t>(outer - 1 - i));
    }
    const int64_t count = outer * rows * c.heads_k;
    const auto allocate = [&](std::vector<float>& floats, std::vector<int8_t>& bytes,
                              std::vector<float>& scale) {
      if (c.is_int8) {
        bytes.resize(count * c.head_dim), scale.resize(count);
        return fastq::tensor_view(bytes.data(), {outer, rows, c.heads_k, c.head_dim});
      }
      floats.resize(count * c.head_dim, NAN);
      return fastq::tensor_view(floats.data(), {outer, rows, c.heads_k, c.head_dim});
    };
    const fastq_tensor k_view = allocate(k_floats, k_bytes, k_scale);
    const fastq_tensor v_view = allocate(v_floats, v_bytes, v_scale);
    view = fastq::kv_cache(k_view, v_view, fastq::tensor_view(lengths.data(), {batch}));
    if (c.is_int8) {
      view.k_scale = fastq::tensor_view(k_scale.data(), {outer, rows, c.heads_k});
      view.v_scale = fastq::tensor_view(v_scale.data(), {outer, rows, c.heads_k});
    }
    if (c.page_size > 0) view.block_table = fastq::tensor_view(table.data(), {batch, max_pages});
    // The last `longest` tokens of each sequence; those before its first are left out.
    k = random_floats(batch * longest * c.heads_k * c.head_dim);
    v = random_floats(k.size());
    const auto rows_view = [&](const std::vector<float>& x) {
      return fastq::tensor_view(x.data(), {batch, longest, c.heads_k, c.head_dim});
    };
    fastq::kv_append(fastq::kv_append_args(rows_view(k), rows_view(v), view));
  }

  int64_t batch, longest;
  std::vector<int32_t> lengths, table;
  std::vector<float> k_floats, v_floats, k_scale, v_scale, k, v;
  std::vector<int8_t> k_bytes, v_bytes;
  fastq_kv_cache view;
};

// The largest error of out and of lse.
struct Errors {
  double out = 0, lse = 0;
};

void take(double& worst, double error) {
  worst = std::fmax(worst, std::isnan(error) ? HUGE_VAL : error);
}

// One query's, against whole rows of scores.
void compare(const Case& c, const Cache& cache, int64_t b, int64_t h, int64_t i, const float* q,
             const float* out, double lse, Errors& worst) {
  const int64_t length = cache.lengths[b], keys = i + length - c.seqlen_q + 1;  // causal
  const int64_t h_k = h / (c.heads / c.heads_k);
  const auto row = [&](const std::vector<float>& x, int64_t j) {
    const int64_t token = cache.longest - length + j;
    return &x[((b * cache.longest + token) * c.heads_k + h_k) * c.head_dim];
  };
  std::vector<double> weights, expected(c.head_dim, 0.0);
  double sum = 0;
  for (int64_t j = 0; j < keys; ++j) {
    double s = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) s += double{q[d]} * row(cache.k, j)[d];
    weights.push_back(std::exp(s / std::sqrt(static_cast<double>(c.head_dim))));
    sum += weights.back();
  }
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t d = 0; d < c.head_dim; ++d) expected[d] += weights[j] / sum * row(cache.v, j)[d];
  }
  for (int64_t d = 0; d < c.head_dim; ++d) take(worst.out, std::fabs(out[d] - expected[d]));
  const bool is_right = sum > 0 ? std::isfinite(lse) : lse == -HUGE_VAL;
  take(worst.lse, !is_right ? HUGE_VAL : sum > 0 ? std::fabs(lse - std::log(sum)) : 0.0);
}

// The last tokens once more, appended by the call itself.
void check_append(const Case& c, const Cache& cache, fastq_flash_decode_args args,
                  const std::string& about) {
  std::vector<float> again(cache.batch * c.seqlen_q * c.heads * c.head_dim, 7.0f);
  const auto* const out = static_cast<const float*>(args.out.data);
  const auto last = [&](const std::vector<float>& x) {
    const int64_t token = c.heads_k * c.head_dim;
    fastq_tensor view = fastq::tensor_view(&x[(cache.longest - c.seqlen_q) * token],
                                           {cache.batch, c.seqlen_q, c.heads_k, c.head_dim});
    view.strides[0] = cache.longest * token;
    return view;
  };
  if (cache.longest < c.seqlen_q) return;
  const auto append = fastq::kv_append_args(last(cache.k), last(cache.v), cache.view);
  args.append = &append;
  args.out.data = again.data();
  const size_t size = fastq::flash_decode_workspace_size(args);
  void* const workspace = std::aligned_alloc(64, (size + 64) / 64 * 64);
  fastq::flash_decode(args, workspace, size);
  std::free(workspace);
  EXPECT(std::equal(again.begin(), again.end(), out), about + ": other bits by append");
  args.append = nullptr, args.struct_size = offsetof(fastq_flash_decode_args, append);
  EXPECT(fastq::flash_decode_workspace_size(args) == size, about + ": a shorter struct");
}

void check(const Case& c, const std::string& about) {
  const Cache cache(c);
  const std::vector<float> q = random_floats(cache.batch * c.seqlen_q * c.heads * c.head_dim);
  std::vector<float> out(q.size(), 7.0f), lse(cache.batch * c.heads * c.seqlen_q, 7.0f);
  fastq_flash_decode_args args = fastq::flash_decode_args(
      fastq::tensor_view(q.data(), {cache.batch, c.seqlen_q, c.heads, c.head_dim}), cache.view,
      fastq::tensor_view(out.data(), {cache.batch, c.seqlen_q, c.heads, c.head_dim}));
  args.lse = fastq::tensor_view(lse.data(), {cache.batch, c.heads, c.seqlen_q});
  const size_t size = fastq::flash_decode_workspace_size(args);
  void* const workspace = std::aligned_alloc(64, (size + 64) / 64 * 64);
  fastq::flash_decode(args, workspace, size);
  std::free(workspace);
  check_append(c, cache, args, about);
  Errors worst;
  for (int64_t b = 0; b < cache.batch; ++b) {
    for (int64_t i = 0; i < c.seqlen_q; ++i) {
      for (int64_t h = 0; h < c.heads; ++h) {
        const int64_t at = ((b * c.seqlen_q + i) * c.heads + h) * c.head_dim;
        compare(c, cache, b, h, i, &q[at], &out[at], lse[(b * c.heads + h) * c.seqlen_q + i],
                worst);
      }
    }
  }
  EXPECT(worst.out <= (c.is_int8 ? 5e-2 : 2e-5), about + ": " + std::to_string(worst.out));
  EXPECT(worst.lse <= (c.is_int8 ? 5e-2 : 1e-4), about + ": " + std::to_string(worst.lse));
}

template <class Call>
void expect_refusal(const Call& call, const std::string& message) {
  std::string got = "nothing";
  try {
    call();
  } catch (const fastq::Exception& error) {
    got = error.what();
  }
  EXPECT(got.find(message) != std::string::npos, message + ", got: " + got);
}

// What no Python program can pass.
void check_refusals() {
  const Cache cache(kCases[2]);
  const int64_t sizes[] = {2, 1, 4, 64};
  std::vector<float> q(2 * 4 * 64), out(q.size());
  const fastq_tensor q_view =
      fastq::tensor_view(q.data(), {sizes[0], sizes[1], sizes[2], sizes[3]});
  const fastq_tensor out_view =
      fastq::tensor_view(out.data(), {sizes[0], sizes[1], sizes[2], sizes[3]});
  fastq_flash_decode_args args = fastq::flash_decode_args(q_view, cache.view, out_view);
  expect_refusal([&] { fastq::flash_decode(args); }, "flash_decode: workspace holds 0 bytes");
  args.cache = nullptr;
  expect_refusal([&] { fastq::flash_decode(args); }, "flash_decode: cache is a null pointer");
  fastq_kv_cache changed = cache.view;
  changed.struct_size = 8;
  args.cache = &changed;
  expect_refusal([&] { fastq::flash_decode(args); }, "flash_decode: struct_size is 8");
  fastq_kv_append_args append = fastq::kv_append_args(q_view, q_view, cache.view);
  args.cache = &cache.view;
  args.append = &append;
  append.q = q_view;
  expect_refusal([&] { fastq::flash_decode(args); }, "flash_decode: append has a q or out");
  append.q = {};
  append.cache = nullptr;
  expect_refusal([&] { fastq::kv_append(append); }, "kv_append: cache is a null pointer");
  append.cache = &cache.view;
  append.q = q_view;
  expect_refusal([&] { fastq::kv_append(append); }, "kv_append: q is given, but there is no");
  append.rotary_cos = append.rotary_sin = fastq::tensor_view(q.data(), {8, 32});
  expect_refusal([&] { fastq::kv_append(append); }, "kv_append: out is missing");
  append.q = {};
  changed = cache.view;
  changed.k.flags = FASTQ_READ_ONLY;
  append.cache = &changed;
  expect_refusal([&] { fastq::kv_append(append); }, "kv_append: k_cache is read-only");
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeon}) {
    if (!fastq::cpu::isa_supported(isa)) continue;
    setenv("FASTQ_CPU_ISA", fastq::cpu::isa_name(isa), 1);
    int index = 0;
    for (const Case& c : kCases) {
      check(c, std::string(fastq::cpu::isa_name(isa)) + ", case " + std::to_string(index++));
    }
  }
  check_refusals();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
