#include "int8_gemm/int8_gemm_tuning.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sstream>

#include "core/error.hpp"

namespace fastq::cuda {
namespace {

// Whether all of `text` is a number from `least` to INT32_MAX.
bool parse_number(const std::string& text, int64_t least, int64_t& value) {
  const char* const end = text.data() + text.size();
  const auto [last, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && last == end && value >= least && value <= INT32_MAX;
}

// "sm90/...": whatever follows may be the name that another version gave to a configuration.
bool looks_like_a_config(const std::string& name) {
  const size_t slash = name.find('/');
  return name.compare(0, 2, "sm") == 0 && slash != std::string::npos && slash + 1 < name.size();
}

std::string read_file(const char* path) {
  const auto fail = [path] {
    invalid_value(std::string("FASTQ_TUNING_TABLE is ") + path + ", which cannot be read: " +
                  std::strerror(errno) + "; expected a file that `fastq tune` wrote, or none");
  };
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), &std::fclose);
  if (!file) fail();
  std::string text;
  char block[4096];
  while (const size_t count = std::fread(block, 1, sizeof(block), file.get())) {
    text.append(block, count);
  }
  if (std::ferror(file.get()) != 0) fail();
  return text;
}

// Of swapped tiles with as many channels, the one that holds M with the least to spare, and the
// tallest, several along M.
bool suits(const TileConfig& tile, int64_t M) {
  return std::none_of(std::begin(tiles::kSm90), std::end(tiles::kSm90), [&](const TileConfig& t) {
    const bool is_better =
        tile.tile_m < M ? t.tile_m > tile.tile_m : t.tile_m >= M && t.tile_m < tile.tile_m;
    return t.schedule == tile.schedule && t.tile_n == tile.tile_n && is_better;
  });
}

// Every width that shares the weight evenly among the multiprocessors, in as few turns as there
// can be and in one more, and the whole tile; K in one part, and in several where that leaves
// enough to each and there are few tiles.
template <class Add>
void add_swapped(const TileConfig& tile, const GemmShape& s, const GemmDevice& device,
                 const Add& add) {
  const int64_t rows = ceil_div(s.M, tile.tile_m), k_tiles = ceil_div(s.K, tile.tile_k);
  const bool few_tiles = rows * ceil_div(s.N, tile.tile_n) <= 2 * int64_t{device.sm_count};
  for (int split_k = 1; split_k <= (few_tiles ? 8 : 1); split_k *= 2) {
    if (split_k > 1 && k_tiles < 2 * split_k) break;
    const int64_t channels = s.N * rows * split_k;
    const int64_t turns = ceil_div(channels, int64_t{tile.tile_n} * device.sm_count);
    for (const int64_t share : {ceil_div(channels, turns * device.sm_count),
                                ceil_div(channels, (turns + 1) * device.sm_count), int64_t{0}}) {
      const int width = std::max(static_cast<int>(round_up(share, 8)), share > 0 ? 16 : 0);
      for (const int blocks_per_sm : {1, 2}) {
        add({KernelFamily::kSm90, tile, width < tile.tile_n ? width : 0, split_k, blocks_per_sm});
      }
    }
  }
}

}  // namespace

TuningTable::TuningTable(const std::string& text, const std::string& file) {
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    const auto malformed = [&](const std::string& what) {
      invalid_value("the tuning table " + file + ", line " + std::to_string(number) + ": " + what +
                    "; expected: compute capability, SMs, M, N, K, configuration or heuristic");
    };
    std::istringstream words(line.substr(0, line.find('#')));
    std::vector<std::string> fields;
    for (std::string word; words >> word;) fields.push_back(word);
    if (fields.empty()) continue;
    if (fields.size() != 6) malformed("there are " + std::to_string(fields.size()) + " fields");

    const std::string &capability = fields[0], &name = fields[5];
    const size_t dot = capability.find('.');
    int64_t major = 0, minor = 0, sms = 0, M = 0, N = 0, K = 0;
    if (dot == std::string::npos || !parse_number(capability.substr(0, dot), 1, major) ||
        !parse_number(capability.substr(dot + 1), 0, minor)) {
      malformed(capability + " is no compute capability");
    }
    int64_t* const numbers[] = {&sms, &M, &N, &K};
    for (int i = 0; i < 4; ++i) {
      if (!parse_number(fields[i + 1], 1, *numbers[i])) {
        malformed(fields[i + 1] + " is no number from 1 to 2147483647");
      }
    }
    if (name != "heuristic" && !looks_like_a_config(name)) {
      malformed(name + " is no configuration");
    }
    GemmShape measured;
    measured.M = M, measured.N = N, measured.K = K;
    GemmConfig config;
    const bool known = parse_config(name, config) && *config_problem(config, measured) == '\0';
    std::optional<GemmConfig>& entry = weights_[weight(N, K, sms, major, minor)][M];
    entry = known ? std::optional<GemmConfig>(config) : std::nullopt;
  }
}

void TuningTable::complete_with(const TuningTable& other) {
  weights_.insert(other.weights_.begin(), other.weights_.end());
}

const GemmConfig* TuningTable::find(const GemmShape& s, const GemmDevice& device) const {
  const auto found =
      weights_.find(weight(s.N, s.K, device.sm_count, device.cc_major, device.cc_minor));
  if (found == weights_.end()) return nullptr;
  const auto line = found->second.lower_bound(s.M);
  if (line == found->second.end() || !line->second) return nullptr;
  const GemmConfig& config = *line->second;
  const int64_t rows = config.tile.tile_m;
  return ceil_div(s.M, rows) == ceil_div(line->first, rows) ? &config : nullptr;
}

TuningTable load_tuning_table(const char* setting, const std::string& shipped) {
  const std::string name = setting != nullptr ? setting : "";
  if (name == "none") return {};
  TuningTable table;
  if (!name.empty()) table = TuningTable(read_file(setting), name);
  table.complete_with(TuningTable(shipped, "int8_gemm_tuning.txt"));
  return table;
}

GemmChoice select_config(const GemmShape& s, const GemmDevice& device, const TuningTable& table) {
  const GemmConfig* config = table.find(s, device);
  if (config == nullptr || *config_problem(*config, s) != '\0') {
    return select_config(s, device, false);
  }
  GemmChoice choice = select_config(s, device, config->family == KernelFamily::kSm80);
  if (choice.config.family != config->family) return choice;  // no code for it here
  choice.take(*config, s);
  choice.reason = "tuned";
  return choice;
}

std::vector<GemmConfig> candidate_configs(const GemmShape& s, const GemmDevice& device) {
  std::vector<GemmConfig> found = {select_config(s, device, false).config};
  const auto add = [&](const GemmConfig& config) {
    const auto is_it = [name = config_name(config)](const GemmConfig& c) {
      return config_name(c) == name;
    };
    if (*config_problem(config, s) != '\0') return;
    if (std::none_of(found.begin(), found.end(), is_it)) found.push_back(config);
  };
  if (found.front().family == KernelFamily::kSm80) {
    for (const TileConfig& tile : tiles::kSm80) {
      if (tile.tile_m > 2 * std::max<int64_t>(s.M, 32)) continue;
      for (const int split_k : {1, 2, 4, 8, 16}) add({KernelFamily::kSm80, tile, 0, split_k});
    }
    return found;
  }
  for (const TileConfig& tile : tiles::kSm90) {
    if (tile.schedule != Schedule::kSwapped) {
      if (2 * s.M <= tile.tile_m) continue;
      add({KernelFamily::kSm90, tile});
      if (tile.schedule != Schedule::kSwappedPingpong) continue;
      const auto width = static_cast<int>(pingpong_width(tile.tile_m, s, device));
      add({KernelFamily::kSm90, tile, width < tile.tile_n ? width : 0});
      add({KernelFamily::kSm90, tile, 0, 1, 1, true});
    } else if (suits(tile, s.M)) {
      add_swapped(tile, s, device, add);
    } else if (tile.tile_m >= 64 && tile.tile_m < s.M) {
      add({KernelFamily::kSm90, tile});
    }
  }
  return found;
}

}  // namespace fastq::cuda
