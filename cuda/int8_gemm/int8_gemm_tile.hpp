// How a compiled GEMM instance is named.
#pragma once

#include <cstdint>
#include <string>

namespace fastq::cuda {

enum class KernelFamily { kSm80, kSm90 };
enum class Schedule { kPingpong, kCooperative, kMultistage };

// A compiled tile configuration, in the terms of CUTLASS: the block tile and the cluster.
struct TileConfig {
  int tile_m, tile_n, tile_k;
  int cluster_m, cluster_n;
  Schedule schedule;

  friend bool operator==(const TileConfig& x, const TileConfig& y) {
    return x.tile_m == y.tile_m && x.tile_n == y.tile_n && x.tile_k == y.tile_k &&
           x.cluster_m == y.cluster_m && x.cluster_n == y.cluster_n && x.schedule == y.schedule;
  }
};

inline std::string config_name(const TileConfig& c) {
  const char* schedule = c.schedule == Schedule::kPingpong      ? "_pingpong"
                         : c.schedule == Schedule::kCooperative ? "_cooperative"
                                                                : "";
  std::string name = std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n) + "x" +
                     std::to_string(c.tile_k) + schedule;
  if (c.cluster_m * c.cluster_n > 1) {
    name += "_" + std::to_string(c.cluster_m) + "x" + std::to_string(c.cluster_n);
  }
  return name;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace fastq::cuda
