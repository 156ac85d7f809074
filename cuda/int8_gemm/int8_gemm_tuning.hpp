// A tuning table: for shapes that `fastq tune` measured on a device, the configuration that was
// faster there than select_config's own choice. Host code without CUDA, as that is.
//
// A table is a text of lines, `#` begins a comment:
//
//   compute capability, SMs, M, N, K, configuration
//   9.0 132 16 4096 4096 sm90/16x64x128_swapped_width32_blocks2
//   9.0 132 64 4096 4096 heuristic
//
// The lines of an (N, K) on a device divide the sizes M between them: a problem belongs to the
// line with the least M that is not below its own, and beyond the last line to none. It takes the
// line's configuration where that makes as many tiles along M of it as of the measured M, so that
// the launch is the measured one, and where config_problem has nothing against it. Elsewhere the
// choice is the heuristic's, as it is where the line says so: nothing measured was faster there,
// and the next larger M must not speak for it.
//
// A configuration that this build does not have, of another version, counts as `heuristic`. Of
// lines for the same M, N, K and device the last counts.
//
// The sums are exact, so a table changes the time of a product and never its bits.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "int8_gemm/int8_gemm_config.hpp"

namespace fastq::cuda {

class TuningTable {
 public:
  TuningTable() = default;
  // Throws an error with `file` and the line for text that is not of the form above.
  TuningTable(const std::string& text, const std::string& file);

  // Takes from `other` the lines for each (N, K) on a device that this table has none for.
  void complete_with(const TuningTable& other);

  // Null: the choice is the heuristic's. Does not ask whether the configuration can run.
  const GemmConfig* find(const GemmShape& shape, const GemmDevice& device) const;

 private:
  // (N, K) and the device, each in one number: a look-up compares few of them.
  using Weight = std::pair<uint64_t, uint64_t>;
  static Weight weight(int64_t N, int64_t K, int64_t sm_count, int64_t cc_major, int64_t cc_minor) {
    return {static_cast<uint64_t>(N) << 32 | static_cast<uint64_t>(K),
            static_cast<uint64_t>(sm_count) << 32 | static_cast<uint64_t>(cc_major) << 16 |
                static_cast<uint64_t>(cc_minor)};
  }
  using Lines = std::map<int64_t, std::optional<GemmConfig>>;  // by M; without: the heuristic

  std::map<Weight, Lines> weights_;
};

// The table that dispatch reads. `setting` is FASTQ_TUNING_TABLE: null or empty for `shipped`,
// "none" for an empty table, else a file, whose lines for an (N, K) take the place of the shipped
// ones. Throws where the file cannot be read.
TuningTable load_tuning_table(const char* setting, const std::string& shipped);

// int8_gemm_tuning.txt, which CMake embeds.
const char* shipped_tuning_table();

// The table's choice, else the heuristic's.
GemmChoice select_config(const GemmShape& shape, const GemmDevice& device,
                         const TuningTable& table);

// The configurations that are worth measuring for a problem, all of which can run. The heuristic's
// choice is the first.
std::vector<GemmConfig> candidate_configs(const GemmShape& shape, const GemmDevice& device);

}  // namespace fastq::cuda
