// The choice of a CPU algorithm for an INT8 GEMM is a pure function: every choice covers the
// output, fits its caches, and asks for a workspace that its own offsets stay within.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <string>

#include "cpu/int8_gemm/int8_gemm.hpp"
#include "expect.hpp"

namespace {

using namespace fastq;       // NOLINT
using namespace fastq::cpu;  // NOLINT

enum class Layout { kRowsOfK, kRowsOfN, kPacked };

Int8GemmProblem problem(int64_t M, int64_t N, int64_t K, Layout layout) {
  static const int8_t byte = 0;
  Int8GemmProblem p;
  p.M = M, p.N = N, p.K = K;
  p.a = &byte;
  p.stride_am = K, p.stride_ak = 1;
  if (layout == Layout::kPacked) {
    p.b_packed = &byte;
  } else {
    p.b = &byte;
    p.stride_bk = layout == Layout::kRowsOfK ? 1 : N;
    p.stride_bn = layout == Layout::kRowsOfK ? K : 1;
  }
  return p;
}

void every_choice_is_sound() {
  for (const int64_t M : {1, 2, 16, 17, 64, 65, 128, 1000, 100000}) {
    for (const int64_t N : {1, 15, 16, 33, 4096, 100000}) {
      for (const int64_t K : {0, 1, 63, 64, 4096, 131071}) {
        for (const Layout layout : {Layout::kRowsOfK, Layout::kRowsOfN, Layout::kPacked}) {
          for (const Isa isa :
               {Isa::kScalar, Isa::kAvx2, Isa::kAvx512Vnni, Isa::kAmx, Isa::kNeon}) {
            for (const int threads : {1, 2, 64}) {
              const GemmConfig c = select_gemm_config(problem(M, N, K, layout), isa, threads);
              const std::string about = std::to_string(M) + "x" + std::to_string(N) + "x" +
                                        std::to_string(K) + " " + isa_name(isa) + " " +
                                        std::to_string(threads);
              EXPECT(c.threads >= 1 && c.threads <= threads, about);
              EXPECT(c.tile_m >= 1 && c.tile_m <= 128, about);
              EXPECT(c.chunk_m >= 1 && c.chunk_n >= 1, about);
              EXPECT(c.chunk_n % 32 == 0, about);  // a chunk begins at a packed block
              EXPECT((c.algorithm == GemmAlgorithm::kPacked) == (layout == Layout::kPacked), about);
              EXPECT(c.algorithm != GemmAlgorithm::kSwapped || isa == Isa::kAmx, about);
              const int64_t padded = (K + 63) / 64 * 64;
              if (c.algorithm == GemmAlgorithm::kRepack) {
                EXPECT(static_cast<int64_t>(c.thread_bytes) >= c.chunk_n * padded, about);
                EXPECT(c.chunk_n * padded <= 1 << 20 || c.chunk_n == 32, about);
              }
              const bool copies_b = c.algorithm == GemmAlgorithm::kRepack;
              const bool blocks = copies_b || c.algorithm == GemmAlgorithm::kPacked;
              const bool panels = isa == Isa::kAvx512Vnni || isa == Isa::kAmx;
              EXPECT(c.pack_a == (blocks && panels), about);
              EXPECT(c.slab_m >= std::min(c.chunk_m, M), about);
              if (c.pack_a) {
                EXPECT(c.chunk_m % 32 == 0 && c.slab_m % 32 == 0, about);  // whole panels
                EXPECT(static_cast<int64_t>(c.shared_bytes) >= std::min(c.slab_m, M) * padded,
                       about);
                EXPECT(c.slab_m * padded <= 16 << 20 || c.slab_m == 128, about);
              }
              if (c.pack_a && !copies_b) {
                const int64_t in_cache = isa == Isa::kAmx ? 9 << 17 : 1 << 19;
                EXPECT(c.chunk_m * padded <= in_cache || c.chunk_m == 32, about);
              }
              if (c.algorithm == GemmAlgorithm::kSwapped) {
                EXPECT(static_cast<int64_t>(c.shared_bytes) >= (M + 15) / 16 * 16 * padded, about);
              }
            }
          }
        }
      }
    }
  }
}

void known_choices() {
  const auto choice = [](int64_t M, int64_t N, int64_t K, Layout layout, Isa isa) {
    return select_gemm_config(problem(M, N, K, layout), isa, 2).algorithm;
  };
  EXPECT(choice(1, 4096, 4096, Layout::kRowsOfK, Isa::kAmx) == GemmAlgorithm::kDot, "M = 1");
  EXPECT(choice(16, 4096, 4096, Layout::kRowsOfK, Isa::kAmx) == GemmAlgorithm::kSwapped, "M = 16");
  EXPECT(choice(2048, 2048, 2048, Layout::kRowsOfK, Isa::kAmx) == GemmAlgorithm::kRepack, "2048");
  const GemmConfig tiny = select_gemm_config(problem(8, 16, 16, Layout::kRowsOfK), Isa::kAmx, 64);
  EXPECT(tiny.threads == 1 && tiny.workspace_bytes() == 0, "8x16x16");
}

void a_strided_a_is_copied() {
  Int8GemmProblem p = problem(8, 16, 100, Layout::kRowsOfK);
  p.stride_ak = 2;
  const GemmConfig c = select_gemm_config(p, Isa::kAvx2, 1);
  EXPECT(c.copy_a && c.shared_bytes >= 8 * 100, "stride_ak = 2");
  p.stride_ak = 0;
  EXPECT(select_gemm_config(p, Isa::kAvx2, 1).copy_a, "stride_ak = 0");
}

}  // namespace

int main() {
  every_choice_is_sound();
  known_choices();
  a_strided_a_is_copied();
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
