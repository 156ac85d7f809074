// Tuning tables of the INT8 GEMM on CUDA: how they are read, when they choose, and what there is to
// choose from. Pure functions as select_config: no GPU, no CUDA.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "expect.hpp"
#include "int8_gemm/int8_gemm_tuning.hpp"

namespace {

using namespace fastq::cuda;  // NOLINT

const GemmDevice kH200{9, 0, 132, true};
const GemmDevice kSmallHopper{9, 0, 78, true};
const GemmDevice kHopperWithoutItsCode{9, 0, 132, false};
const GemmDevice kA100{8, 0, 108, true};

GemmShape shape(int64_t M, int64_t N, int64_t K) {
  GemmShape s;
  s.M = M, s.N = N, s.K = K;
  return s;
}

std::string name_of(const GemmConfig* config) {
  return config == nullptr ? "heuristic" : config_name(*config);
}

// What the table's line says for M x 4096 x 4096 on an H200, in the words of the table.
std::string line_for(const TuningTable& table, int64_t M) {
  return name_of(table.find(shape(M, 4096, 4096), kH200));
}

// The message of the error that `call` throws; empty when it throws none.
template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const fastq::Error& error) {
    EXPECT(error.status() == FASTQ_INVALID_VALUE, error.what());
    return error.what();
  }
  return "";
}

void expect_error(const std::string& actual, const std::string& part) {
  EXPECT(actual.find(part) != std::string::npos, "\"" + actual + "\", expected " + part);
}

struct TemporaryFile {
  std::string path = "tuning_" + std::to_string(getpid()) + ".txt";

  explicit TemporaryFile(const std::string& text) { std::ofstream(path) << text; }
  ~TemporaryFile() { std::remove(path.c_str()); }
};

constexpr const char* kSwapped16 = "sm90/16x64x256_swapped_width32_blocks2";
constexpr const char* kSwapped64 = "sm90/64x64x256_swapped_width40";
const std::string kTable = std::string("# a comment\n\n") +                         //
                           "9.0 132 1 4096 4096 heuristic\n" +                      //
                           "9.0 132 16 4096 4096 " + kSwapped16 + "  # 6.8 us\n" +  //
                           "  9.0\t132 64 4096 4096 " + kSwapped64 + "\r\n" +       //
                           "9.0 132 128 4096 4096 heuristic\n" +                    //
                           "9.0 132 1024 4096 4096 sm90/128x128x128_pingpong\n" +   //
                           "8.0 108 64 4096 4096 sm80/128x128x64";  // no end of line

void a_line_speaks_for_its_part_of_m() {
  const TuningTable table(kTable, "table");
  EXPECT(line_for(table, 1) == "heuristic", "1");
  for (const int64_t M : {2, 8, 9, 16}) EXPECT(line_for(table, M) == kSwapped16, std::to_string(M));
  for (const int64_t M : {17, 33, 64}) EXPECT(line_for(table, M) == kSwapped64, std::to_string(M));
  EXPECT(line_for(table, 65) == "heuristic", "65");
  EXPECT(line_for(table, 128) == "heuristic", "128");
  // As many tiles of 128 as in 1024 rows.
  EXPECT(line_for(table, 129) == "heuristic", "129");
  EXPECT(line_for(table, 896) == "heuristic", "896");
  EXPECT(line_for(table, 897) == "sm90/128x128x128_pingpong", "897");
  EXPECT(line_for(table, 1024) == "sm90/128x128x128_pingpong", "1024");
  EXPECT(line_for(table, 1025) == "heuristic", "1025");
}

void a_line_speaks_for_its_weight_and_device_alone() {
  const TuningTable table(kTable, "table");
  EXPECT(table.find(shape(16, 4096, 4096), kH200) != nullptr, "the one measured");
  EXPECT(table.find(shape(16, 4104, 4096), kH200) == nullptr, "another N");
  EXPECT(table.find(shape(16, 4096, 4112), kH200) == nullptr, "another K");
  EXPECT(table.find(shape(16, 4096, 4096), kSmallHopper) == nullptr, "fewer SMs");
  EXPECT(table.find(shape(16, 4096, 4096), {10, 0, 132, true}) == nullptr, "another arch");
  EXPECT(table.find(shape(16, 4096, 4096), {9, 1, 132, true}) == nullptr, "another arch");
  EXPECT(name_of(table.find(shape(64, 4096, 4096), kA100)) == "sm80/128x128x64", "A100");
  EXPECT(TuningTable().find(shape(16, 4096, 4096), kH200) == nullptr, "an empty table");
}

void the_last_of_equal_lines_counts() {
  const std::string line = "9.0 132 16 4096 4096 ";
  EXPECT(line_for({line + "heuristic\n" + line + kSwapped16, "t"}, 16) == kSwapped16, "the second");
  EXPECT(line_for({line + kSwapped16 + "\n" + line + "heuristic", "t"}, 16) == "heuristic",
         "the second");
}

void unknown_configurations_count_as_the_heuristic() {
  for (const char* name :
       {"sm90/16x64x256_swapped_turbo3", "sm90/24x64x256_swapped", "sm100/256x256x128",
        "sm90/0x64x128", "sm90/16x64x256_swapped_width72", "sm90/99999999999x64x128"}) {
    const std::string line = "9.0 132 16 4096 4096 ";
    const TuningTable table(line + name + "\n9.0 132 64 4096 4096 " + kSwapped64, "table");
    EXPECT(line_for(table, 16) == "heuristic", name);
    EXPECT(line_for(table, 17) == kSwapped64, name);
  }
}

void malformed_lines_are_errors() {
  const auto check = [](const std::string& line, const std::string& what) {
    const std::string text = "# first\n" + line + "\n";
    const std::string error = error_of([&] { TuningTable(text, "/a/table.txt"); });
    expect_error(error, "the tuning table /a/table.txt, line 2: " + what);
    expect_error(error, "expected: compute capability, SMs, M, N, K, configuration");
  };
  const std::string config = kSwapped16;
  check("9.0 132 16 4096 4096", "there are 5 fields");
  check("9.0 132 16 4096 4096 # " + config, "there are 5 fields");
  check("9.0 132 16 4096 4096 " + config + " 6.8", "there are 7 fields");
  check("9 132 16 4096 4096 " + config, "9 is no compute capability");
  check("9. 132 16 4096 4096 " + config, "9. is no compute capability");
  check("H200 132 16 4096 4096 " + config, "H200 is no compute capability");
  check("9.0.1 132 16 4096 4096 " + config, "9.0.1 is no compute capability");
  check("9.0 many 16 4096 4096 " + config, "many is no number");
  check("9.0 132 0 4096 4096 " + config, "0 is no number from 1");
  check("9.0 132 -16 4096 4096 " + config, "-16 is no number");
  check("9.0 132 16.5 4096 4096 " + config, "16.5 is no number");
  check("9.0 132 16 4096x 4096 " + config, "4096x is no number");
  check("9.0 132 16 4096 99999999999999999999 " + config, "99999999999999999999 is no number");
  check("9.0 132 16 4096 2147483648 " + config, "2147483648 is no number");
  check("9.0 132 16 4096 4096 fast", "fast is no configuration");
  check("9.0 132 16 4096 4096 sm90", "sm90 is no configuration");
  check("9.0 132 16 4096 4096 sm90/", "sm90/ is no configuration");
  check("9.0 132 16 4096 4096 cuda/" + config, "cuda/" + config + " is no configuration");
}

void a_users_table_goes_before_the_shipped_one() {
  const std::string shipped = kTable + "\n9.0 132 16 8192 8192 " + kSwapped16;
  const auto find = [](const TuningTable& table, int64_t M, int64_t size) {
    return name_of(table.find(shape(M, size, size), kH200));
  };
  for (const char* unset : {static_cast<const char*>(nullptr), ""}) {
    EXPECT(find(load_tuning_table(unset, shipped), 16, 4096) == kSwapped16, "the shipped one");
  }
  EXPECT(find(load_tuning_table("none", shipped), 16, 4096) == "heuristic", "none");

  const std::string other = "sm90/32x64x256_swapped";
  const TemporaryFile file("9.0 132 32 4096 4096 " + other);
  const TuningTable table = load_tuning_table(file.path.c_str(), shipped);
  EXPECT(find(table, 16, 4096) == other, "the user's");
  EXPECT(find(table, 64, 4096) == "heuristic", "not the shipped lines of the same weight");
  EXPECT(find(table, 16, 8192) == kSwapped16, "the shipped lines of another weight");
}

void an_unreadable_table_is_an_error() {
  expect_error(error_of([] { load_tuning_table("/no/such/table", ""); }),
               "FASTQ_TUNING_TABLE is /no/such/table, which cannot be read: No such file");
  expect_error(error_of([] { load_tuning_table("/", ""); }),
               "FASTQ_TUNING_TABLE is /, which cannot be read: Is a directory");
  const TemporaryFile file("9.0 132 16 4096\n");
  expect_error(error_of([&] { load_tuning_table(file.path.c_str(), ""); }),
               "the tuning table " + file.path + ", line 1: there are 4 fields");
}

void dispatch_follows_the_table_where_it_can() {
  const TuningTable table(kTable + "\n9.0 132 256 4096 4096 sm80/128x128x64", "table");
  const auto expect_heuristic = [&](const GemmShape& s, const GemmDevice& device,
                                    const char* about) {
    const GemmChoice actual = select_config(s, device, table);
    const GemmChoice expected = select_config(s, device, false);
    EXPECT(config_name(actual.config) == config_name(expected.config), about);
    EXPECT(std::string(actual.reason) == expected.reason, about);
  };
  GemmShape s = shape(16, 4096, 4096);
  GemmChoice choice = select_config(s, kH200, table);
  EXPECT(config_name(choice.config) == kSwapped16, config_name(choice.config));
  EXPECT(choice.reason == std::string("tuned"), choice.reason);
  expect_heuristic(shape(1, 4096, 4096), kH200, "a line of the heuristic");
  expect_heuristic(shape(4096, 4096, 4096), kH200, "beyond the table");
  expect_heuristic(s, kSmallHopper, "another device");
  expect_heuristic(s, kHopperWithoutItsCode, "a build without the kernel");

  // Operands are copied as they are without a table; the family decides about K's padding.
  s.a_is_vectorizable = s.b_is_vectorizable = false;
  choice = select_config(s, kH200, table);
  EXPECT(choice.reason == std::string("tuned") && choice.relayout_a && choice.relayout_b, "copies");
  EXPECT(choice.workspace_size() == select_config(s, kH200, false).workspace_size(), "copies");
  choice = select_config(shape(256, 4096, 4096), kH200, table);
  EXPECT(config_name(choice.config) == "sm80/128x128x64", config_name(choice.config));
  EXPECT(choice.reason == std::string("tuned"), choice.reason);
  const TuningTable odd("9.0 132 16 64 100 sm80/64x64x128\n9.0 132 32 64 100 " +
                            std::string("sm90/32x64x256_swapped"),
                        "table");
  EXPECT(select_config(shape(16, 64, 100), kH200, odd).workspace_size() == 0, "sm80 reads any K");
  EXPECT(select_config(shape(32, 64, 100), kH200, odd).relayout_a, "sm90 wants K padded");
}

// A tile that TMA stores, for an output which it cannot store.
void a_configuration_that_cannot_run_leaves_the_choice_to_the_heuristic() {
  for (const TileConfig& tile : tiles::kSm90) {
    const std::string name = config_name({KernelFamily::kSm90, tile});
    const TuningTable table("9.0 132 512 4096 4096 " + name, "table");
    GemmShape s = shape(512, 4096, 4096);
    EXPECT(config_name(select_config(s, kH200, table).config) == name, name);
    s.out_is_tma_storable = false;
    const GemmChoice choice = select_config(s, kH200, table);
    EXPECT(*config_problem(choice.config, s) == '\0', name);
    const bool can_run = *config_problem({KernelFamily::kSm90, tile}, s) == '\0';
    EXPECT((choice.reason == std::string("tuned")) == can_run, name);
  }
}

void candidates_can_all_run() {
  size_t most = 0;
  for (const GemmDevice& device : {kH200, kSmallHopper, kHopperWithoutItsCode, kA100}) {
    for (const int64_t M : {1, 2, 8, 9, 16, 17, 33, 64, 65, 96, 128, 200, 512, 4096, 70000}) {
      for (const int64_t N : {1, 8, 64, 520, 1024, 4096, 11008, 22016, 128256}) {
        for (const int64_t K : {0, 1, 64, 128, 500, 1024, 4096, 131071}) {
          for (const bool tma : {true, false}) {
            GemmShape s = shape(M, N, K);
            s.out_is_tma_storable = tma && N % 8 == 0;
            const std::string about = std::to_string(M) + "x" + std::to_string(N) + "x" +
                                      std::to_string(K) + " on " + std::to_string(device.sm_count);
            const std::vector<GemmConfig> found = candidate_configs(s, device);
            const GemmChoice heuristic = select_config(s, device, false);
            EXPECT(config_name(found.front()) == config_name(heuristic.config), about);
            std::set<std::string> names;
            for (const GemmConfig& config : found) {
              EXPECT(*config_problem(config, s) == '\0', about + ": " + config_name(config));
              EXPECT(config.family == heuristic.config.family, about);
              names.insert(config_name(config));
            }
            EXPECT(names.size() == found.size(), about + ": one of them twice");
            most = std::max(most, found.size());
          }
        }
      }
    }
  }
  // A shape is to be measured in a second or two.
  EXPECT(most <= 64, std::to_string(most) + " candidates");
}

void candidates_hold_every_kind() {
  const auto count = [](const GemmShape& s, const GemmDevice& device, auto&& is_it) {
    const std::vector<GemmConfig> found = candidate_configs(s, device);
    return std::count_if(found.begin(), found.end(), is_it);
  };
  const auto split = [](const GemmConfig& c) { return c.split_k > 1; };
  const auto swapped = [](const GemmConfig& c) { return c.tile.schedule == Schedule::kSwapped; };
  const auto two_blocks = [](const GemmConfig& c) { return c.blocks_per_sm == 2; };
  const auto any = [](const GemmConfig&) { return true; };
  const auto idle = [](const GemmConfig& c) { return c.tile.tile_m > 16; };
  EXPECT(count(shape(16, 1024, 4096), kH200, split) > 4, "a narrow weight");
  EXPECT(count(shape(16, 1024, 128), kH200, split) == 0, "a short K");
  EXPECT(count(shape(16, 128256, 4096), kH200, split) == 0, "a wide weight");
  EXPECT(count(shape(16, 4096, 4096), kH200, two_blocks) > 4, "two blocks");
  EXPECT(count(shape(4096, 4096, 4096), kH200, swapped) > 0, "a long batch");
  EXPECT(
      count(shape(4096, 4096, 4096), kH200, any) > count(shape(4096, 4096, 4096), kH200, swapped),
      "a long batch");
  GemmShape s = shape(16, 4096, 4096);
  s.out_is_tma_storable = false;
  EXPECT(count(s, kH200, idle) == 0, "no tile much larger than the batch");
  EXPECT(count(s, kA100, split) > 4, "parts of K on sm80");
  EXPECT(count(shape(4096, 4096, 4096), kA100, any) == 4, "the tiles of sm80");
}

// The table that the library ships, from the file itself: every line is of use to this build.
void the_shipped_table_is_sound() {
  std::ifstream file(FASTQ_SHIPPED_TUNING_TABLE);
  std::stringstream text;
  text << file.rdbuf();
  EXPECT(text.str().find("fastq tune") != std::string::npos, "the file is there");
  EXPECT(text.str().find(")table\"") == std::string::npos, "it fits into a raw string");
  const TuningTable table(text.str(), "int8_gemm_tuning.txt");
  std::set<std::string> seen;
  for (std::string line; std::getline(text, line);) {
    std::istringstream words(line.substr(0, line.find('#')));
    GemmDevice device;
    char dot = 0;
    int64_t M = 0, N = 0, K = 0;
    std::string name;
    if (!(words >> device.cc_major >> dot >> device.cc_minor >> device.sm_count >> M >> N >> K >>
          name)) {
      continue;
    }
    EXPECT(name_of(table.find(shape(M, N, K), device)) == name, line);
    EXPECT(seen.insert(line.substr(0, line.find(name))).second, line + " is there twice");
  }
}

}  // namespace

int main() {
  a_line_speaks_for_its_part_of_m();
  a_line_speaks_for_its_weight_and_device_alone();
  the_last_of_equal_lines_counts();
  unknown_configurations_count_as_the_heuristic();
  malformed_lines_are_errors();
  a_users_table_goes_before_the_shipped_one();
  an_unreadable_table_is_an_error();
  dispatch_follows_the_table_where_it_can();
  a_configuration_that_cannot_run_leaves_the_choice_to_the_heuristic();
  candidates_can_all_run();
  candidates_hold_every_kind();
  the_shipped_table_is_sound();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
