// Which kernel an INT8 GEMM takes: a pure choice from the problem and the device, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "core/problem.hpp"
#include "int8_gemm/int8_gemm_tile.hpp"

namespace fastq::cuda {

// Every instance that the build holds (cuda/CMakeLists.txt names them, a test compares).
namespace tiles {
inline constexpr TileConfig kSm90Medium{64, 128, 128, Schedule::kPingpong};
inline constexpr TileConfig kSm90Large{128, 128, 128, Schedule::kPingpong};
inline constexpr TileConfig kSm80Few{16, 128, 128, Schedule::kMultistage};
inline constexpr TileConfig kSm80Small{64, 64, 128, Schedule::kMultistage};
inline constexpr TileConfig kSm80Large{128, 128, 64, Schedule::kMultistage};
inline constexpr TileConfig kSm80Deep{128, 128, 128, Schedule::kMultistage};
constexpr TileConfig swapped(int tokens, int channels) {
  return {tokens, channels, tokens <= 32 ? 256 : 128, Schedule::kSwapped};
}
constexpr TileConfig swapped_pingpong(int tokens) {
  return {tokens, 128, 128, Schedule::kSwappedPingpong};
}
inline constexpr TileConfig kSm90[] = {
    kSm90Medium,          kSm90Large,           swapped(8, 64),       swapped(16, 64),
    swapped(32, 64),      swapped(64, 64),      swapped(16, 128),     swapped(64, 128),
    swapped(80, 128),     swapped(128, 128),    swapped_pingpong(64), swapped_pingpong(80),
    swapped_pingpong(96), swapped_pingpong(128)};
inline constexpr TileConfig kSm80[] = {kSm80Few, kSm80Small, kSm80Large, kSm80Deep};
}  // namespace tiles

// What select_config reads of a device and of this build.
struct GemmDevice {
  int cc_major = 9, cc_minor = 0;
  int sm_count = 132;
  bool has_sm90a_code = true;
  int64_t smem_per_sm = 228 * 1024;
};

// The problem in the terms that matter for the choice.
struct GemmShape {
  int64_t M = 0, N = 0, K = 0;
  // The operand can be read by 16-byte copies along a contiguous K where it lies.
  bool a_is_vectorizable = true, b_is_vectorizable = true;
  // Its weight may be read before its turn in the stream.
  bool b_is_constant = false;
  // The output is scales, a bias and 16-bit floats, and TMA can store it: rows are contiguous, and
  // start and end at multiples of 16 bytes (a TMA store rounds the end of a row up to that, over
  // whatever lies behind it).
  bool out_is_tma_storable = true;
};

struct GemmChoice {
  GemmConfig config;
  // The operand is first copied to the workspace, K contiguous and padded to 16 bytes.
  bool relayout_a = false, relayout_b = false;
  size_t relayout_a_bytes = 0, relayout_b_bytes = 0;
  size_t partial_sums_bytes = 0;  // of an sm_80 kernel that splits K
  const char* reason = "";        // why not the fast family, for FASTQ_LOG=dispatch

  size_t workspace_size() const { return relayout_a_bytes + relayout_b_bytes + partial_sums_bytes; }
  void take(const GemmConfig& c, const GemmShape& s);
};

inline GemmShape gemm_shape(const Int8GemmProblem& p) {
  const auto readable = [&p](const void* data, int64_t stride_row, int64_t stride_k, int64_t rows) {
    const bool k_contiguous = stride_k == 1 || p.K <= 1;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                         (rows == 1 || (stride_row % 16 == 0 && stride_row > 0));
    return k_contiguous && aligned;
  };
  GemmShape shape;
  shape.M = p.M, shape.N = p.N, shape.K = p.K;
  shape.a_is_vectorizable = readable(p.a, p.stride_am, p.stride_ak, p.M);
  shape.b_is_vectorizable = readable(p.b, p.stride_bn, p.stride_bk, p.N);
  shape.b_is_constant = p.b_is_constant;
  const bool is_plain = p.zero_point.data == nullptr && p.activation == Activation::kNone &&
                        p.residual.data == nullptr && element_size(p.out_dtype) == 2;
  shape.out_is_tma_storable = is_plain && p.stride_on == 1 && p.N % 8 == 0 &&
                              reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
                              (p.M == 1 || (p.stride_om > 0 && p.stride_om % 8 == 0));
  return shape;
}

inline void GemmChoice::take(const GemmConfig& c, const GemmShape& s) {
  config = c;
  const bool has_parts = c.family == KernelFamily::kSm80 && c.split_k > 1;
  partial_sums_bytes = has_parts ? c.split_k * s.M * round_up(s.N, 8) * sizeof(int32_t) : 0;
}

// Their partial sums take at most 16 times 4 bytes an element of out.
inline constexpr int64_t kMostSplitTokens = 512;

// With 64 channels the second half of the tile would be idle.
inline constexpr int kLeastPingpongWidth = 80;

// Why a configuration cannot run, or does not exist; empty when it can.
inline const char* config_problem(const GemmConfig& c, const GemmShape& s) {
  const bool sm90 = c.family == KernelFamily::kSm90;
  const auto* first = sm90 ? std::begin(tiles::kSm90) : std::begin(tiles::kSm80);
  const auto* last = sm90 ? std::end(tiles::kSm90) : std::end(tiles::kSm80);
  if (std::find(first, last, c.tile) == last) return "there is no such instance";
  const bool is_pingpong = c.tile.schedule == Schedule::kSwappedPingpong;
  if (is_pingpong && c.width != 0 &&
      (c.width < kLeastPingpongWidth || c.width > c.tile.tile_n || c.width % 16 != 0)) {
    return "the width of a ping-pong tile is not a multiple of 16 from 80 to 128";
  }
  if (c.tile.schedule != Schedule::kSwapped) {
    if ((c.width > 0 && !is_pingpong) || c.blocks_per_sm > 1 || (sm90 && c.split_k > 1)) {
      return "only swapped tiles have such options";
    }
    if (!sm90) {
      if (c.split_k < 1 || c.split_k > 16) return "split_k is not 1 to 16";
      if (c.split_k > 1 && s.M > kMostSplitTokens) return "K is split for at most 512 tokens";
      return c.split_k > std::max<int64_t>(ceil_div(s.K, c.tile.tile_k), 1) ? "K has fewer parts"
                                                                            : "";
    }
    return c.tile.schedule == Schedule::kPingpong && !s.out_is_tma_storable
               ? "TMA cannot store this output"
               : "";
  }
  if (c.width < 0 || c.width > c.tile.tile_n || c.width % 8 != 0) {
    return "the width is not a multiple of 8 up to the tile's";
  }
  if (c.split_k < 1 || c.split_k > 8) return "split_k is not 1 to 8";
  if (c.split_k > ceil_div(s.K, c.tile.tile_k)) return "K has fewer parts";
  if (c.blocks_per_sm != 1 && c.blocks_per_sm != 2) return "there are 1 or 2 blocks";
  if (c.blocks_per_sm == 2 && c.tile.tile_m * c.tile.tile_n > 64 * 64) {
    return "two blocks of this tile do not fit";
  }
  return "";
}

// The channels of each multiprocessor, were they shared out evenly.
inline int64_t weight_share(const GemmShape& s, const GemmDevice& device) {
  return round_up(ceil_div(s.N, device.sm_count), 8);
}

// Few tokens: the time is the weight's bytes over the bandwidth, so every multiprocessor should
// have the same share of the weight. A constant weight is read ahead of the kernel's turn, into as
// large a ring as there is; another kernel starts sooner where its blocks can settle in beside
// those of the one before.
inline GemmConfig select_swapped_config(const GemmShape& s, const GemmDevice& device) {
  GemmConfig config;
  config.family = KernelFamily::kSm90;
  const int64_t share = weight_share(s, device);
  if (s.M > 64) {
    config.tile = share <= 64 ? tiles::swapped(64, 64) : tiles::swapped(s.M <= 80 ? 80 : 128, 128);
    if (share > 64) config.width = static_cast<int>(share);
    return config;
  }
  const int tokens = s.M <= 8 ? 8 : s.M <= 16 ? 16 : s.M <= 32 ? 32 : 64;
  const int64_t k_tiles = ceil_div(s.K, 128);
  if (share <= 64) {
    config.tile = tiles::swapped(tokens, 64);
    // Half of a tile idle costs nothing, but where K is short a share of 64 channels with fewer
    // blocks has less to read of the tokens.
    config.width = static_cast<int>(std::max<int64_t>(share, 16));
    config.blocks_per_sm = tokens <= 32 && !s.b_is_constant ? 2 : 1;
    const bool is_narrow = ceil_div(s.N, 64) * 2 <= device.sm_count;
    if (tokens == 64 && is_narrow && !s.b_is_constant) config.width = 64;
    // A narrow weight: share K too, though half of the multiprocessors do without it as well.
    const int64_t tiles = ceil_div(s.N, config.width);
    while (config.split_k < 8 && 4 * tiles * config.split_k <= device.sm_count &&
           k_tiles >= 8 * config.split_k) {
      config.split_k *= 2;
    }
    if (config.width == 64) config.width = 0;
    return config;
  }
  if (share <= 96 && tokens > 32) {
    config.tile = tiles::swapped(64, 128);
    config.width = static_cast<int>(share);
    return config;
  }
  if (share <= 128 && share > 64 && tokens <= 16) {
    config.tile = tiles::swapped(16, 128);
    config.width = static_cast<int>(share);
    return config;
  }
  // Several tiles a multiprocessor.
  config.tile = tiles::swapped(tokens, 64);
  const int64_t tiles_per_sm = ceil_div(s.N, int64_t{64} * device.sm_count);
  config.width = static_cast<int>(round_up(ceil_div(s.N, tiles_per_sm * device.sm_count), 8));
  return config;
}

// The narrowest ping-pong tile, in steps of 16 channels, that takes no more waves than the widest.
// A cluster has two tiles along M, so an odd number of them costs one more.
inline int pingpong_width(int tokens, const GemmShape& s, const GemmDevice& device) {
  const int64_t rows = round_up(ceil_div(s.M, tokens), 2);
  const int64_t waves = ceil_div(rows * ceil_div(s.N, 128), device.sm_count);
  const int64_t columns = std::max<int64_t>(waves * device.sm_count / rows, 1);
  return static_cast<int>(
      std::clamp<int64_t>(round_up(ceil_div(s.N, columns), 16), kLeastPingpongWidth, 128));
}

// Many tokens: the tile with the shortest sequence of waves.
inline GemmConfig select_pingpong_config(const GemmShape& s, const GemmDevice& device) {
  GemmConfig config;
  config.family = KernelFamily::kSm90;
  struct Option {
    int tokens;
    double wave;  // its time, measured on an H200
  };
  // CUTLASS's kernel is 1-4 % faster where its boxes, which leave the matrix at the edge, do so by
  // little.
  const auto suits_cutlass = [&](int tokens) {
    const int64_t rows = ceil_div(s.M, tokens);
    const bool fits = rows >= 16 || (rows % 2 == 0 && rows * tokens - s.M <= s.M / 64);
    return s.out_is_tma_storable && fits && (tokens == 64 || tokens == 128);
  };
  double least = 0;
  const auto consider = [&](double time, const TileConfig& tile, int width) {
    if (least > 0 && time >= least) return;
    least = time;
    config.tile = tile;
    config.width = width;
  };
  for (const Option& option :
       {Option{128, 1.0}, Option{96, 0.85}, Option{80, 0.79}, Option{64, 0.66}}) {
    const int64_t rows = round_up(ceil_div(s.M, option.tokens), 2);
    const int64_t waves = ceil_div(rows * ceil_div(s.N, 128), device.sm_count);
    const double time = option.wave * static_cast<double>(waves);
    if (suits_cutlass(option.tokens)) {
      consider(0.96 * time, option.tokens == 64 ? tiles::kSm90Medium : tiles::kSm90Large, 0);
    }
    // For 128 bytes of K the products of 128 channels take 4 cycles a token, whatever the width,
    // and what they are made of comes in at 64 bytes a cycle. Of what that saves a third is seen.
    const auto cycles = [&](int width) {
      return std::max(4 * option.tokens, 2 * (option.tokens + width));
    };
    const int width = pingpong_width(option.tokens, s, device);
    // Where the products are far from being the limit even then, it was no faster.
    const bool narrow = cycles(width) < cycles(128) && width <= option.tokens + 16;
    consider(narrow ? time * (2 + static_cast<double>(cycles(width)) / cycles(128)) / 3 : time,
             tiles::swapped_pingpong(option.tokens), narrow ? width : 0);
  }
  // Two warpgroups that share a tile end it sooner, but not under the next one's main loop; and
  // their blocks need no neighbours.
  const int64_t waves = ceil_div(ceil_div(s.M, 128) * ceil_div(s.N, 128), device.sm_count);
  const double time = waves == 1 ? 0.93 : 0.05 + 1.2 * static_cast<double>(waves);
  consider(time, tiles::swapped(128, 128), 0);
  return config;
}

inline GemmConfig select_sm90_config(const GemmShape& s, const GemmDevice& device) {
  // Up to 128 tokens where one tile, or a pair of narrow ones, gives work to all at once.
  const int64_t share = weight_share(s, device);
  const bool is_one_wave = 2 * ceil_div(s.N, 64) <= device.sm_count || (share > 64 && share <= 128);
  const bool few = s.M <= 64 || (s.M <= 128 && is_one_wave);
  return few ? select_swapped_config(s, device) : select_pingpong_config(s, device);
}

// Large tiles where they give work to all, else smaller ones; and as many parts of K as it takes to
// have two blocks on every multiprocessor, none of less than four tiles.
inline GemmConfig select_sm80_config(const GemmShape& s, const GemmDevice& device) {
  GemmConfig config;
  const auto count = [&](const TileConfig& tile) {
    return ceil_div(s.M, tile.tile_m) * ceil_div(s.N, tile.tile_n);
  };
  if (s.M <= 16) {
    config.tile = tiles::kSm80Few;
  } else if (count(tiles::kSm80Large) < device.sm_count) {
    config.tile = tiles::kSm80Small;
  } else {
    // Two blocks of the deeper one take 192 KiB.
    config.tile = device.smem_per_sm >= 200 * 1024 ? tiles::kSm80Deep : tiles::kSm80Large;
  }
  if (s.M > kMostSplitTokens) return config;
  const int64_t blocks = count(config.tile), k_tiles = ceil_div(s.K, config.tile.tile_k);
  while (config.split_k < 16 && blocks * config.split_k * 2 <= 2 * int64_t{device.sm_count} &&
         k_tiles >= 8 * config.split_k) {
    config.split_k *= 2;
  }
  return config;
}

// `forced_sm80` is FASTQ_KERNELS=sm80.
inline GemmChoice select_config(const GemmShape& s, const GemmDevice& device, bool forced_sm80) {
  GemmChoice choice;
  choice.relayout_a = !s.a_is_vectorizable && s.K > 0;
  choice.relayout_b = !s.b_is_vectorizable && s.K > 0;
  if (forced_sm80) {
    choice.reason = "FASTQ_KERNELS=sm80";
  } else if (device.cc_major != 9) {
    choice.reason = "not a Hopper GPU";
  } else if (!device.has_sm90a_code) {
    choice.reason = "this build has no sm_90a code";
  } else if (s.K == 0) {
    choice.reason = "K is 0";
  } else {
    choice.take(select_sm90_config(s, device), s);
    // A TMA store goes on to a multiple of 16 bytes. Should a load do so too, what lies behind a
    // row of K elements would take part in the sums: let it be zero in one of the operands, as
    // relayout leaves it.
    if (s.K % 16 != 0 && !choice.relayout_b) choice.relayout_a = true;
  }
  const int64_t padded_k = round_up(s.K, 16);
  if (choice.relayout_a) choice.relayout_a_bytes = round_up(s.M * padded_k, 256);
  if (choice.relayout_b) choice.relayout_b_bytes = round_up(s.N * padded_k, 256);
  if (choice.config.family == KernelFamily::kSm90) return choice;

  choice.take(select_sm80_config(s, device), s);
  return choice;
}

}  // namespace fastq::cuda
