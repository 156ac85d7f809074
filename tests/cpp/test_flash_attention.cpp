// flash_attention on the CPU from C++, every instruction set of this machine, against whole rows of
// scores in double. Each operand is a heap block of exactly its own size, so that the preset `asan`
// sees a read or write one element too far, which the Python tests cannot.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "core/float16.hpp"
#include "cpu/isa.hpp"
#include "expect.hpp"
#include "fastq/fastq.hpp"

namespace {

using fastq::cpu::Isa;

struct Case {
  int64_t batch, seqlen_q, seqlen_k, heads, heads_k, head_dim;
  bool causal;
  int64_t window_left;  // -1: none
};
// Around the edges of blocks of keys, panels of rows and tiles of head_dim; nothing at all.
const Case kCases[] = {{1, 1, 1, 1, 1, 1, false, -1},     {1, 31, 63, 2, 1, 15, true, -1},
                       {2, 33, 65, 3, 3, 17, true, -1},   {1, 130, 129, 4, 2, 64, true, 40},
                       {2, 5, 200, 8, 2, 33, false, 100}, {1, 70, 3, 1, 1, 128, true, -1},
                       {1, 300, 300, 2, 2, 80, true, -1}, {1, 4, 0, 2, 1, 16, false, -1},
                       {1, 0, 4, 2, 1, 16, false, -1},    {1, 40, 70, 1, 1, 256, false, -1}};

uint32_t random_state = 1;
float random_float() {  // about normal
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    random_state = random_state * 1664525u + 1013904223u;
    sum += static_cast<float>(random_state >> 8) / (1 << 24) - 0.5f;
  }
  return 1.7f * sum;
}

// Numbers of one dtype, and what they are worth.
struct Values {
  std::vector<double> exact;
  std::vector<float> floats;
  std::vector<uint16_t> halves;

  Values(int64_t count, fastq_dtype dtype) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = random_float();
      if (dtype == FASTQ_FLOAT32) {
        floats.push_back(value);
        exact.push_back(value);
        continue;
      }
      const bool wide = dtype == FASTQ_BFLOAT16;
      halves.push_back(wide ? fastq::float_to_bfloat16(value) : fastq::float_to_float16(value));
      exact.push_back(wide ? fastq::bfloat16_to_float(halves.back())
                           : fastq::float16_to_float(halves.back()));
    }
    floats.shrink_to_fit();
    halves.shrink_to_fit();
  }
  void* data() { return floats.empty() ? static_cast<void*>(halves.data()) : floats.data(); }
  double at(int64_t i, fastq_dtype dtype) const {
    if (dtype == FASTQ_FLOAT32) return floats[i];
    return dtype == FASTQ_BFLOAT16 ? fastq::bfloat16_to_float(halves[i])
                                   : fastq::float16_to_float(halves[i]);
  }
};

// The largest error of out and of lse.
struct Errors {
  double out = 0, lse = 0;
};

void take(double& worst, double error) {
  worst = std::fmax(worst, std::isnan(error) ? HUGE_VAL : error);
}

Errors errors(const Case& c, const Values& q, const Values& k, const Values& v, const Values& out,
              const std::vector<float>& lse, fastq_dtype dtype) {
  Errors worst;
  const auto scale = 1 / std::sqrt(static_cast<double>(c.head_dim));
  for (int64_t b = 0; b < c.batch; ++b) {
    for (int64_t h = 0; h < c.heads; ++h) {
      const int64_t h_k = h / (c.heads / c.heads_k);
      for (int64_t i = 0; i < c.seqlen_q; ++i) {
        const int64_t position = i + c.seqlen_k - c.seqlen_q;
        const int64_t begin =
            c.window_left < 0 ? 0 : std::max<int64_t>(position - c.window_left, 0);
        const int64_t end = c.causal ? std::min(position + 1, c.seqlen_k) : c.seqlen_k;
        const double* row = &q.exact[((b * c.seqlen_q + i) * c.heads + h) * c.head_dim];
        std::vector<double> weights, expected(c.head_dim, 0.0);
        double sum = 0;
        for (int64_t j = begin; j < end; ++j) {
          const double* key = &k.exact[((b * c.seqlen_k + j) * c.heads_k + h_k) * c.head_dim];
          double s = 0;
          for (int64_t d = 0; d < c.head_dim; ++d) s += row[d] * key[d];
          weights.push_back(std::exp(scale * s));
          sum += weights.back();
        }
        for (int64_t j = begin; j < end; ++j) {
          const double* value = &v.exact[((b * c.seqlen_k + j) * c.heads_k + h_k) * c.head_dim];
          for (int64_t d = 0; d < c.head_dim; ++d) {
            expected[d] += weights[j - begin] / sum * value[d];
          }
        }
        for (int64_t d = 0; d < c.head_dim; ++d) {
          const int64_t at = ((b * c.seqlen_q + i) * c.heads + h) * c.head_dim + d;
          take(worst.out, std::fabs(out.at(at, dtype) - expected[d]));
        }
        const double got = lse[(b * c.heads + h) * c.seqlen_q + i];
        const bool is_right = sum > 0 ? std::isfinite(got) : got == -HUGE_VAL;
        take(worst.lse, !is_right ? HUGE_VAL : sum > 0 ? std::fabs(got - std::log(sum)) : 0.0);
      }
    }
  }
  return worst;
}

void check(const Case& c, fastq_dtype dtype, const std::string& about) {
  Values q(c.batch * c.seqlen_q * c.heads * c.head_dim, dtype);
  Values k(c.batch * c.seqlen_k * c.heads_k * c.head_dim, dtype);
  Values v(c.batch * c.seqlen_k * c.heads_k * c.head_dim, dtype);
  Values out(c.batch * c.seqlen_q * c.heads * c.head_dim, dtype);
  std::vector<float> lse(c.batch * c.heads * c.seqlen_q, 7.0f);
  const auto view = [&](Values& values, int64_t seqlen, int64_t heads, bool read_only) {
    return fastq::tensor_view(values.data(), dtype, {c.batch, seqlen, heads, c.head_dim}, {},
                              read_only);
  };
  fastq_flash_attention_args args = fastq::flash_attention_args(
      view(q, c.seqlen_q, c.heads, true), view(k, c.seqlen_k, c.heads_k, true),
      view(v, c.seqlen_k, c.heads_k, true), view(out, c.seqlen_q, c.heads, false), c.causal);
  args.lse = fastq::tensor_view(lse.data(), {c.batch, c.heads, c.seqlen_q});
  args.has_window = c.window_left >= 0;
  args.window_left = c.window_left, args.window_right = -1;
  const size_t size = fastq::flash_attention_workspace_size(args);
  void* const workspace = std::aligned_alloc(64, (size + 64) / 64 * 64);
  fastq::flash_attention(args, workspace, size);
  std::free(workspace);
  const Errors worst = errors(c, q, k, v, out, lse, dtype);
  const double limit = dtype == FASTQ_FLOAT32 ? 2e-5 : dtype == FASTQ_FLOAT16 ? 2e-3 : 2e-2;
  EXPECT(worst.out <= limit, about + ": " + std::to_string(worst.out));
  EXPECT(worst.lse <= 1e-4, about + ": " + std::to_string(worst.lse));
}

}  // namespace

int main() {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeon}) {
    if (!fastq::cpu::isa_supported(isa)) continue;
    setenv("FASTQ_CPU_ISA", fastq::cpu::isa_name(isa), 1);
    for (const fastq_dtype dtype : {FASTQ_FLOAT32, FASTQ_FLOAT16, FASTQ_BFLOAT16}) {
      for (const Case& c : kCases) {
        check(c, dtype,
              std::string(fastq::cpu::isa_name(isa)) + ", dtype " + std::to_string(dtype) + ", " +
                  std::to_string(c.seqlen_q) + " x " + std::to_string(c.seqlen_k) + " x " +
                  std::to_string(c.head_dim));
      }
    }
  }
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
