// The choice of a CUDA kernel for an INT8 GEMM is a pure function: it is tested without a GPU, and
// without CUDA. In a build with the CUDA backend each configuration must also have its instances.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <set>
#include <string>
#include <utility>
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
const GemmDevice kA100{8, 0, 108, true, 164 * 1024};
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

void every_choice_is_sound() {
  for (const GemmDevice& device : kDevices) {
    for (const int64_t M : kSizes) {
      for (const int64_t N : kSizes) {
        for (const int64_t K : {int64_t{0}, int64_t{1}, int64_t{96}, int64_t{131071}}) {
          for (int flags = 0; flags < 16; ++flags) {
            GemmShape s = shape(M, N, K);
            s.a_is_vectorizable = flags & 1;
            s.b_is_vectorizable = flags & 2;
            s.out_is_tma_storable = flags & 4;
            const bool forced_sm80 = flags & 8;
            const GemmChoice choice = select_config(s, device, forced_sm80);
            const std::string about = text(s, device) + ", flags " + std::to_string(flags);
            EXPECT(std::string(config_problem(choice.config, s)).empty(), about);
            const bool sm90 = choice.config.family == KernelFamily::kSm90;
            EXPECT(sm90 == (device.cc_major == 9 && device.has_sm90a_code && !forced_sm80 && K > 0),
                   about);
            EXPECT(sm90 == (choice.config.tile.schedule != Schedule::kMultistage), about);
            GemmConfig parsed;
            EXPECT(parse_config(config_name(choice.config), parsed), about);
            EXPECT(config_name(parsed) == config_name(choice.config), about);
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
      // The other family needs none, but for the sums of parts of K.
      const GemmChoice sm80 = select_config(s, kH200, true);
      const int64_t sums = sm80.config.split_k > 1 ? sm80.config.split_k * M * 80 * 4 : 0;
      EXPECT(static_cast<int64_t>(sm80.workspace_size()) == sums, about);
      s.a_is_vectorizable = false;
      GemmChoice choice = select_config(s, kH200, false);
      EXPECT(static_cast<int64_t>(choice.relayout_a_bytes) >= M * row, about);
      EXPECT(choice.relayout_a_bytes % 256 == 0, about);
      EXPECT(choice.workspace_size() == choice.relayout_a_bytes, about);
      s.b_is_vectorizable = false;
      choice = select_config(s, kH200, false);
      EXPECT(static_cast<int64_t>(choice.relayout_b_bytes) >= 77 * row, about);
      EXPECT(choice.workspace_size() == choice.relayout_a_bytes + choice.relayout_b_bytes, about);
      EXPECT(select_config(s, kH200, true).workspace_size() == choice.workspace_size() + sums,
             about);
    }
  }
}

void tiles_fit_the_problem() {
  const auto config = [](int64_t M, int64_t N, int64_t K, const GemmDevice& device) {
    return select_config(shape(M, N, K), device, false).config;
  };
  for (const int64_t N : {int64_t{64}, int64_t{4096}, int64_t{11008}, int64_t{28672}}) {
    for (const int64_t M : {1, 8, 9, 16, 17, 32, 33, 64}) {
      // A short batch is one tile of tokens, and wastes less than half of it.
      const GemmConfig c = config(M, N, 4096, kH200);
      EXPECT(c.tile.schedule == Schedule::kSwapped && c.tile.tile_m >= M, config_name(c));
      EXPECT(c.tile.tile_m <= 2 * std::max<int64_t>(M, 8), config_name(c));
    }
  }
  // Every multiprocessor has its share of a large weight.
  for (const int64_t N : {8192, 11008, 12288, 14336, 16384, 22016, 28672}) {
    const GemmConfig c = config(16, N, 4096, kH200);
    const int64_t width = c.width > 0 ? c.width : c.tile.tile_n;
    const int64_t tiles = fastq::ceil_div(N, width) * c.split_k;
    const int64_t turns = fastq::ceil_div(tiles, kH200.sm_count);
    EXPECT(turns * kH200.sm_count * width <= N * c.split_k * 5 / 4, config_name(c));
  }
  // A small one leaves some for the next kernel, a very small one has K shared as well.
  for (const int64_t N : {256, 512, 1024, 2048, 4096}) {
    const GemmConfig c = config(16, N, 4096, kH200);
    const int64_t blocks = fastq::ceil_div(N, c.width > 0 ? c.width : c.tile.tile_n) * c.split_k;
    EXPECT(blocks <= kH200.sm_count / 2 && 2 * blocks >= N / 64, config_name(c));
    EXPECT((c.split_k > 1) == (N <= 1024), config_name(c));
  }
  for (const int64_t size : {int64_t{4096}, int64_t{8192}}) {
    const TileConfig tile = config(size, size, size, kH200).tile;
    EXPECT(tile.tile_m * tile.tile_n >= 128 * 128, std::to_string(size));
  }
  // Up to 128 tokens are one tile, where its channels give work to all.
  for (const auto& [M, tokens] : {std::pair{65, 80}, {80, 80}, {81, 96}, {113, 128}, {128, 128}}) {
    const GemmConfig c = config(M, 11008, 4096, kH200);
    EXPECT(c.tile == tiles::swapped(tokens, 128) && c.width == 88, config_name(c));
  }
  // With fewer channels, narrow tiles of all tokens.
  for (const auto& [M, tokens] : {std::pair{65, 80}, {81, 96}, {97, 112}}) {
    const GemmConfig c = config(M, 5120, 13824, kH200);
    EXPECT(c.tile == tiles::swapped(tokens, 64) && c.width == 40, config_name(c));
  }
  // A constant weight has the largest ring to be read ahead into.
  for (const int64_t N : {1024, 4096, 6144, 8192, 22016}) {
    GemmShape s = shape(16, N, 4096);
    s.b_is_constant = true;
    EXPECT(select_config(s, kH200, false).config.blocks_per_sm == 1, std::to_string(N));
  }
  // Or two of them, where a tile would be wide: without outliers.
  for (const auto& [N, width] : {std::pair{11008, 48}, {12288, 48}, {15360, 64}, {16384, 64}}) {
    for (const int M : {1, 8, 9, 16}) {
      GemmShape s = shape(M, N, 4096);
      s.b_is_constant = true;
      const GemmConfig c = select_config(s, kH200, false).config;
      EXPECT(c.tile == tiles::swapped(M <= 8 ? 8 : 16, 64), config_name(c));
      EXPECT(c.width == width && c.blocks_per_sm == 2, config_name(c));
      s.has_outliers = true;
      EXPECT(select_config(s, kH200, false).config.blocks_per_sm == 1, std::to_string(N));
    }
  }
  EXPECT(config(16, 6144, 4096, kH200).blocks_per_sm == 2, "another kernel settles in beside it");
  // The height of tiles follows M, so that a token more costs no whole wave of the largest; and an
  // output that TMA cannot store needs no other tile than its neighbour.
  for (const auto& [M, tokens] :
       {std::pair{130, 64}, {257, 80}, {384, 96}, {385, 112}, {500, 128}}) {
    GemmShape s = shape(M, 4096, 4096);
    const TileConfig tile = select_config(s, kH200, false).config.tile;
    EXPECT(tile.tile_m == tokens, std::to_string(M));
    s.out_is_tma_storable = false;
    const TileConfig other = select_config(s, kH200, false).config.tile;
    EXPECT(other.tile_m == tokens && other.schedule != Schedule::kPingpong, std::to_string(M));
  }
  // With outliers several waves, or one of 64 tokens and a wide weight, are those of ping-pong
  // tiles.
  for (const auto& [M, N, K] :
       {std::array{512, 8192, 2048}, {384, 10240, 2560}, {1024, 4096, 1024}, {256, 4096, 11008}}) {
    GemmShape s = shape(M, N, K);
    s.out_is_tma_storable = false;
    EXPECT(select_config(s, kH200, false).config.tile.schedule == Schedule::kSwapped,
           text(s, kH200));
    s.has_outliers = true;
    const TileConfig tile = select_config(s, kH200, false).config.tile;
    EXPECT(tile.schedule == Schedule::kSwappedPingpong, text(s, kH200));
  }
  EXPECT(config(2048, 3072, 768, kH200).tile == tiles::kSm90Large, "a short K");
  EXPECT(config(512, 4096, 4096, kH200).tile == tiles::swapped(128, 128), "a single wave");
  EXPECT(config(4096, 4096, 4096, kH200).tile == tiles::kSm90Large, "many");
  // Narrower tiles where those of 128 channels leave much of the last wave idle.
  const GemmConfig narrow = config(192, 22016, 4096, kH200);
  EXPECT(narrow.tile == tiles::swapped_pingpong(96) && narrow.width == 112, config_name(narrow));
  const GemmConfig single = config(160, 11008, 4096, kH200);
  EXPECT(single.tile == tiles::swapped(160, 128) && single.width == 88, config_name(single));
  EXPECT(config(1024, 11008, 4096, kH200).width == 0, "the products are the limit");
  // An odd number of rows of tiles has its pairs along N, where one more would cost a wave.
  const GemmConfig odd = config(260, 11008, 4096, kH200);
  EXPECT(odd.tile == tiles::swapped_pingpong(96) && odd.cluster_n, config_name(odd));
  // On the sm_80 side small tiles where large ones leave SMs without work.
  EXPECT(config(128, 128, 64, kA100).tile == tiles::kSm80Small, "one tile");
  EXPECT(config(8192, 8192, 64, kA100).tile == tiles::kSm80Large, "many");
  EXPECT(select_config(shape(8192, 8192, 64), kH200, true).config.tile == tiles::kSm80Deep,
         "room for two blocks of it");
  // And K in parts where even those are few, though not where they would be short.
  EXPECT(config(8, 1024, 8192, kA100).split_k > 1, "a narrow weight");
  EXPECT(config(8, 1024, 512, kA100).split_k == 1, "a short K");
  EXPECT(config(1024, 1024, 8192, kA100).split_k == 1, "a long batch");
}

void names_are_parsed() {
  GemmConfig c;
  EXPECT(parse_config("sm90/16x64x256_swapped_width32_blocks2", c), "a whole name");
  EXPECT(c.tile == tiles::swapped(16, 64) && c.width == 32 && c.blocks_per_sm == 2, "its fields");
  for (const char* name : {"", "sm80", "sm90/", "sm70/64x64x128", "sm90/16x64x256_swapped_width",
                           "sm90/16x64x256_swapped_blocks2_width32", "sm90/16x64x256_swapped2",
                           "sm90/96x128x128_swapped_pingpong_cluster"}) {
    EXPECT(!parse_config(name, c), name);
  }
}

void bad_configurations_are_refused() {
  const auto refused = [](const char* name, const GemmShape& s) {
    GemmConfig c;
    EXPECT(parse_config(name, c), name);
    EXPECT(*config_problem(c, s) != '\0', name);
  };
  const GemmShape s = shape(16, 4096, 512);
  refused("sm90/24x64x256_swapped", s);
  refused("sm90/16x64x256_swapped_width72", s);
  refused("sm90/16x64x256_swapped_width12", s);
  refused("sm90/16x64x256_swapped_split9", s);
  refused("sm90/16x64x256_swapped_split5", s);
  refused("sm90/64x128x128_swapped_blocks2", s);
  refused("sm90/48x128x128_swapped", s);
  refused("sm90/64x64x256_swapped_cluster_n", s);
  refused("sm90/128x128x128_pingpong_cluster_n", s);
  refused("sm90/96x128x128_swapped_pingpong_width64", s);
  refused("sm90/96x128x128_swapped_pingpong_width88", s);
  refused("sm90/96x128x128_swapped_pingpong_split2", s);
  refused("sm90/128x128x128_pingpong_split2", s);
  refused("sm80/128x128x64_width64", s);
  refused("sm80/128x128x64_split9", s);
  refused("sm80/128x128x64_split2", shape(4096, 4096, 4096));
  GemmShape strided = s;
  strided.out_is_tma_storable = false;
  refused("sm90/128x128x128_pingpong", strided);
}

// Not every Hopper has 132 SMs: the share of a weight that one of them takes follows their number.
void choice_follows_the_number_of_sms() {
  for (const int64_t N : {6144, 8192, 11008}) {
    const GemmShape s = shape(16, N, 4096);
    const GemmConfig large = select_config(s, kH200, false).config;
    const GemmConfig small = select_config(s, kSmallHopper, false).config;
    EXPECT(config_name(large) != config_name(small), text(s, kSmallHopper));
  }
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
    EXPECT(s.out_is_tma_storable == out, about);
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
  check("float32", true, true, false, [](Problem& p) { p.out_dtype = fastq::DType::kFloat32; });
  check("an activation", true, true, false,
        [](Problem& p) { p.activation = fastq::Activation::kRelu; });
  check("a residual", true, true, false, [](Problem& p) { p.residual.data = p.a; });
  check("a zero point", true, true, false, [](Problem& p) { p.zero_point.data = p.a; });
}

std::vector<GemmConfig> instances() {
  std::vector<GemmConfig> list;
  for (const TileConfig& tile : tiles::kSm80) list.push_back({KernelFamily::kSm80, tile});
  for (const TileConfig& tile : tiles::kSm90) list.push_back({KernelFamily::kSm90, tile});
  return list;
}

void names_tell_configurations_apart() {
  std::set<std::string> names;
  for (const GemmConfig& config : instances()) names.insert(config_name(config));
  EXPECT(names.size() == instances().size(), "config_name");
  EXPECT(names.count("sm80/64x64x128") == 1, "config_name");
}

#ifdef FASTQ_TEST_CUDA_INSTANCES
void every_configuration_has_its_instance() {
  for (const GemmConfig& config : instances()) {
    if (config.family == KernelFamily::kSm90 && !FASTQ_TEST_CUDA_SM90) continue;
    const GemmKernel* kernel = find_gemm_kernel(config.family, config.tile);
    EXPECT(kernel != nullptr, config_name(config));
    EXPECT(kernel == nullptr || (kernel->launch != nullptr && kernel->load != nullptr),
           config_name(config));
  }
}
#endif

}  // namespace

int main() {
  every_choice_is_sound();
  workspace_holds_the_copies();
  tiles_fit_the_problem();
  names_are_parsed();
  bad_configurations_are_refused();
  choice_follows_the_number_of_sms();
  shape_sees_how_the_operands_lie();
  names_tell_configurations_apart();
#ifdef FASTQ_TEST_CUDA_INSTANCES
  every_configuration_has_its_instance();
#endif
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
