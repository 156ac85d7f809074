// The choice of a CUDA kernel for an INT8 GEMM is a pure function: it is tested without a GPU, and
// without CUDA. In a build with the CUDA backend each configuration must also have its instances.
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>
#include <vector>

#include "expect.hpp"
#include "int8_gemm/int8_gemm_config.hpp"
#ifdef FASTQ_TEST_CUDA_INSTANCES
#include "int8_gemm/int8_gemm_kernels.hpp"
#endif

namespace {

using namespace fastq::cuda;  // NOLINT

const GemmDevice kH200{9, 0, 132, true};
const GemmDevice kSmallHopper{9, 0, 78, true};
const GemmDevice kHopperWithoutItsCode{9, 0, 132, false};
const GemmDevice kA100{8, 0, 108, true};
const GemmDevice kBlackwell{10, 0, 148, true};
const std::vector<GemmDevice> kDevices = {kH200, kSmallHopper, kHopperWithoutItsCode, kA100,
                                          kBlackwell};
const std::vector<int64_t> kSizes = {1,   2,   16,   63,   64,   65,   100,   128,
                                     129, 256, 1000, 4096, 8192, 9999, 65536, INT32_MAX};

GemmShape shape(int64_t M, int64_t N, int64_t K) {
  GemmShape s;
  s.M = M, s.N = N, s.K = K;
  return s;
}

std::string text(const GemmShape& s, const GemmDevice& d) {
  return std::to_string(s.M) + "x" + std::to_string(s.N) + "x" + std::to_string(s.K) + " on " +
         std::to_string(d.cc_major) + "." + std::to_string(d.cc_minor) + " with " +
         std::to_string(d.sm_count) + " SMs";
}

bool is_listed(const TileConfig& tile) {
  for (const TileConfig& listed : tiles::kAll) {
    if (listed == tile) return true;
  }
  return false;
}

void every_choice_is_sound() {
  for (const GemmDevice& device : kDevices) {
    for (const int64_t M : kSizes) {
      for (const int64_t N : kSizes) {
        for (const int64_t K : {int64_t{0}, int64_t{1}, int64_t{96}, int64_t{131071}}) {
          for (int flags = 0; flags < 16; ++flags) {
            GemmShape s = shape(M, N, K);
            s.a_is_vectorizable = flags & 1;
            s.b_is_vectorizable = flags & 2;
            s.out_is_vectorizable = flags & 4;
            const bool forced_sm80 = flags & 8;
            const GemmChoice choice = select_config(s, device, forced_sm80);
            const std::string about = text(s, device) + ", flags " + std::to_string(flags);
            EXPECT(is_listed(choice.tile), about);
            const bool sm90 = choice.family == KernelFamily::kSm90;
            EXPECT(sm90 == (device.cc_major == 9 && device.has_sm90a_code && !forced_sm80 &&
                            s.out_is_vectorizable && K > 0),
                   about);
            EXPECT(sm90 == (choice.tile.schedule != Schedule::kMultistage), about);
            EXPECT(sm90 == std::string(choice.reason).empty(), about);
            // A TMA load may go on to a multiple of 16 bytes: one operand must hold zeros there.
            const bool pad_a = sm90 && K % 16 != 0 && s.b_is_vectorizable;
            EXPECT(choice.relayout_a == (K > 0 && (!s.a_is_vectorizable || pad_a)), about);
            EXPECT(choice.relayout_b == (!s.b_is_vectorizable && K > 0), about);
          }
        }
      }
    }
  }
}

// A copied operand has room for rows of whole 16 bytes, and the second copy begins aligned.
void workspace_holds_the_copies() {
  for (const int64_t M : {int64_t{1}, int64_t{33}, int64_t{70000}}) {
    for (const int64_t K : {int64_t{1}, int64_t{16}, int64_t{131071}}) {
      const int64_t row = K == 1 ? 16 : K == 16 ? 16 : 131072;
      GemmShape s = shape(M, 77, K);
      const std::string about = text(s, kH200);
      EXPECT((select_config(s, kH200, false).workspace_size() == 0) == (K % 16 == 0), about);
      EXPECT(select_config(s, kH200, true).workspace_size() == 0, about);
      s.a_is_vectorizable = false;
      GemmChoice choice = select_config(s, kH200, false);
      EXPECT(static_cast<int64_t>(choice.relayout_a_bytes) >= M * row, about);
      EXPECT(choice.relayout_a_bytes % 256 == 0, about);
      EXPECT(choice.workspace_size() == choice.relayout_a_bytes, about);
      s.b_is_vectorizable = false;
      choice = select_config(s, kH200, false);
      EXPECT(static_cast<int64_t>(choice.relayout_b_bytes) >= 77 * row, about);
      EXPECT(choice.workspace_size() == choice.relayout_a_bytes + choice.relayout_b_bytes, about);
      EXPECT(select_config(s, kH200, true).workspace_size() == choice.workspace_size(), about);
    }
  }
}

void tiles_fit_the_problem() {
  for (const int64_t N : {int64_t{64}, int64_t{4096}, int64_t{11008}}) {
    // A tile of 64 rows wastes the least of a short batch.
    EXPECT(select_config(shape(1, N, 4096), kH200, false).tile.tile_m == 64, std::to_string(N));
    EXPECT(select_config(shape(64, N, 4096), kH200, false).tile.tile_m == 64, std::to_string(N));
  }
  for (const int64_t size : {int64_t{4096}, int64_t{8192}}) {
    const TileConfig tile = select_config(shape(size, size, size), kH200, false).tile;
    EXPECT(tile.tile_m * tile.tile_n >= 128 * 128, std::to_string(size));
  }
  // On the sm_80 side small tiles where large ones leave SMs without work.
  EXPECT(select_config(shape(128, 128, 64), kA100, false).tile == tiles::kSm80Small, "one tile");
  EXPECT(select_config(shape(8192, 8192, 64), kA100, false).tile == tiles::kSm80Large, "many");
}

// Not every Hopper has 132 SMs: a chip with fewer is full of large tiles earlier.
void choice_follows_the_number_of_sms() {
  int differ = 0;
  for (int64_t M = 128; M <= 16384; M += 128) {
    const GemmShape s = shape(M, 4096, 4096);
    const TileConfig on_large = select_config(s, kH200, false).tile;
    const TileConfig on_small = select_config(s, kSmallHopper, false).tile;
    EXPECT(on_small.tile_m * on_small.tile_n >= on_large.tile_m * on_large.tile_n,
           text(s, kSmallHopper));
    differ += !(on_large == on_small);
  }
  EXPECT(differ > 0, "a sweep of M");
}

// A problem whose operands lie as the tensor cores want them: w.t() of an (N, K) weight.
fastq::Int8GemmProblem good_problem() {
  fastq::Int8GemmProblem p;
  p.M = 32, p.N = 48, p.K = 64;
  p.a = reinterpret_cast<const int8_t*>(0x1000), p.stride_am = 64, p.stride_ak = 1;
  p.b = reinterpret_cast<const int8_t*>(0x2000), p.stride_bn = 64, p.stride_bk = 1;
  p.out = reinterpret_cast<void*>(0x3000), p.stride_om = 48, p.stride_on = 1;
  return p;
}

void shape_sees_how_the_operands_lie() {
  const auto check = [](const char* about, bool a, bool b, bool out, auto&& change) {
    fastq::Int8GemmProblem p = good_problem();
    change(p);
    const GemmShape s = gemm_shape(p);
    EXPECT(s.M == p.M && s.N == p.N && s.K == p.K, about);
    EXPECT(s.a_is_vectorizable == a, about);
    EXPECT(s.b_is_vectorizable == b, about);
    EXPECT(s.out_is_vectorizable == out, about);
  };
  using Problem = fastq::Int8GemmProblem;
  check("the good one", true, true, true, [](Problem&) {});
  check("padded rows", true, true, true, [](Problem& p) { p.stride_am = 80, p.stride_bn = 96; });
  check("odd rows of a", false, true, true, [](Problem& p) { p.stride_am = 65; });
  check("unaligned a", false, true, true, [](Problem& p) { p.a += 8; });
  check("unaligned b", true, false, true, [](Problem& p) { p.b += 1; });
  check("row-major b", true, false, true, [](Problem& p) { p.stride_bk = 48, p.stride_bn = 1; });
  check("a of one row", true, true, true, [](Problem& p) { p.M = 1, p.stride_am = 7; });
  check("b of one column", true, true, false, [](Problem& p) { p.N = 1, p.stride_bn = 7; });
  check("67 columns in rows of 80", true, true, false,
        [](Problem& p) { p.N = 67, p.stride_om = 80; });
  check("rows repeated", false, true, true, [](Problem& p) { p.stride_am = 0; });
  check("rows backwards", false, true, true, [](Problem& p) { p.stride_am = -64; });
  check("every other k", false, true, true, [](Problem& p) { p.stride_ak = 2; });
  check("transposed out", true, true, false, [](Problem& p) { p.stride_om = 1, p.stride_on = 32; });
  check("unaligned out", true, true, false,
        [](Problem& p) { p.out = static_cast<char*>(p.out) + 2; });
  check("rows of 100 bytes", true, true, false, [](Problem& p) { p.stride_om = 50; });
  check("rows of 200 bytes", true, true, false, [](Problem& p) {
    p.out_dtype = fastq::DType::kFloat32;
    p.stride_om = 50;
  });
  check("rows of 208 bytes", true, true, true, [](Problem& p) {
    p.out_dtype = fastq::DType::kFloat32;
    p.stride_om = 52;
  });
}

void names_tell_configurations_apart() {
  std::set<std::string> names;
  for (const TileConfig& tile : tiles::kAll) names.insert(config_name(tile));
  EXPECT(names.size() == std::size(tiles::kAll), "config_name");
  EXPECT(names.count("64x64x128") == 1, "config_name");
}

#ifdef FASTQ_TEST_CUDA_INSTANCES
void every_configuration_has_its_instances() {
  for (const TileConfig& tile : tiles::kAll) {
    const bool sm80 = tile.schedule == Schedule::kMultistage;
    if (!sm80 && !FASTQ_TEST_CUDA_SM90) continue;
    for (const int output_bytes : {2, 4}) {
      const GemmKernel* kernel =
          find_gemm_kernel(sm80 ? KernelFamily::kSm80 : KernelFamily::kSm90, tile, output_bytes);
      const std::string about =
          config_name(tile) + " of " + std::to_string(output_bytes) + " bytes";
      EXPECT(kernel != nullptr, about);
      EXPECT(kernel == nullptr || (kernel->launch != nullptr && kernel->load != nullptr), about);
    }
  }
}
#endif

}  // namespace

int main() {
  every_choice_is_sound();
  workspace_holds_the_copies();
  tiles_fit_the_problem();
  choice_follows_the_number_of_sms();
  shape_sees_how_the_operands_lie();
  names_tell_configurations_apart();
#ifdef FASTQ_TEST_CUDA_INSTANCES
  every_configuration_has_its_instances();
#endif
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
