// How a compiled GEMM instance, and a way to launch it, are named.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "core/integers.hpp"
#include "runtime/kernel_family.hpp"

namespace fastq::cuda {

// kSwapped, kSwappedPingpong: the weight's rows are the MMA's (int8_gemm_sm90_swapped.cuh).
enum class Schedule { kMultistage, kPingpong, kSwapped, kSwappedPingpong };

inline const char* schedule_name(Schedule schedule) {
  switch (schedule) {
    case Schedule::kPingpong:
      return "_pingpong";
    case Schedule::kSwapped:
      return "_swapped";
    case Schedule::kSwappedPingpong:
      return "_swapped_pingpong";
    default:
      return "";
  }
}

// A compiled instance: the block's tile of out, and the bytes of K that a stage holds.
struct TileConfig {
  int tile_m, tile_n, tile_k;
  Schedule schedule;

  friend bool operator==(const TileConfig& x, const TileConfig& y) {
    return x.tile_m == y.tile_m && x.tile_n == y.tile_n && x.tile_k == y.tile_k &&
           x.schedule == y.schedule;
  }
};

// An instance and how it is launched; config_problem knows which options a schedule has.
struct GemmConfig {
  KernelFamily family = KernelFamily::kSm80;
  TileConfig tile{};
  int width = 0;           // columns of out of a tile, a multiple of 8; 0: tile_n
  int split_k = 1;         // blocks that share an output tile, each with a part of K
  int blocks_per_sm = 1;   // of the persistent grid, 1 or 2
  bool cluster_n = false;  // kSwappedPingpong: pairs of blocks are neighbours along N, not M
};

// "sm90/16x64x128_swapped_width32_blocks2": what FASTQ_KERNELS, the logs and the benchmarks call
// it.
inline std::string config_name(const GemmConfig& c) {
  std::string name = family_name(c.family);
  name += "/" + std::to_string(c.tile.tile_m) + "x" + std::to_string(c.tile.tile_n) + "x" +
          std::to_string(c.tile.tile_k) + schedule_name(c.tile.schedule);
  if (c.width > 0) name += "_width" + std::to_string(c.width);
  if (c.split_k > 1) name += "_split" + std::to_string(c.split_k);
  if (c.blocks_per_sm > 1) name += "_blocks" + std::to_string(c.blocks_per_sm);
  if (c.cluster_n) name += "_cluster_n";
  return name;
}

// The inverse. False when `name` is none.
inline bool parse_config(const std::string& name, GemmConfig& c) {
  c = GemmConfig{};
  c.family = name.compare(0, 5, "sm90/") == 0 ? KernelFamily::kSm90 : KernelFamily::kSm80;
  TileConfig& t = c.tile;
  if (std::sscanf(name.c_str(), "sm%*2d/%dx%dx%d", &t.tile_m, &t.tile_n, &t.tile_k) != 3) {
    return false;
  }
  for (const Schedule s : {Schedule::kPingpong, Schedule::kSwapped, Schedule::kSwappedPingpong}) {
    if (name.find(schedule_name(s)) != std::string::npos) t.schedule = s;
  }
  const auto option = [&name](const std::string& key, int& value) {
    const size_t at = name.find(key);
    if (at != std::string::npos) std::sscanf(name.c_str() + at + key.size(), "%d", &value);
  };
  option("_width", c.width);
  option("_split", c.split_k);
  option("_blocks", c.blocks_per_sm);
  c.cluster_n = name.find("_cluster_n") != std::string::npos;
  return config_name(c) == name;
}

}  // namespace fastq::cuda
