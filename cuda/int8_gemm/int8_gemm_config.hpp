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
  return {tokens, channels, tokens <= 32 || channels <= 64 ? 256 : 128, Schedule::kSwapped};
}
constexpr TileConfig swapped_pingpong(int tokens) {
  return {tokens, 128, 128, Schedule::kSwappedPingpong};
}
inline constexpr TileConfig kSm90[] = {
    kSm90Medium,           kSm90Large,           swapped(8, 64),
    swapped(16, 64),       swapped(32, 64),      swapped(64, 64),
    swapped(80, 64),       swapped(96, 64),      swapped(112, 64),
    swapped(16, 128),      swapped(64, 128),     swapped(80, 128),
    swapped(96, 128),      swapped(112, 128),    swapped(128, 128),
    swapped(144, 128),     swapped(160, 128),    swapped(192, 128),
    swapped_pingpong(64),  swapped_pingpong(80), swapped_pingpong(96),
    swapped_pingpong(112), swapped_pingpong(128)};
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
  // Elements of `a` past K are zeros, up to a multiple of 16.
  bool a_is_padded = false;
  bool has_outliers = false;
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
  shape.a_is_padded = p.a_is_padded;
  shape.has_outliers = p.outliers != nullptr;
  const bool is_plain = p.zero_point.data == nullptr && p.activation == Activation::kNone &&
                        p.residual.data == nullptr && p.outliers == nullptr &&
                        element_size(p.out_dtype) == 2;
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
    const bool has_swapped_options = (c.width > 0 || c.cluster_n) && !is_pingpong;
    if (has_swapped_options || c.blocks_per_sm > 1 || (sm90 && c.split_k > 1)) {
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
  if (c.cluster_n) return "only ping-pong tiles come in pairs";
  if (c.split_k < 1 || c.split_k > 8) return "split_k is not 1 to 8";
  if (c.split_k > ceil_div(s.K, c.tile.tile_k)) return "K has fewer parts";
  if (c.split_k > 1 && s.has_outliers) return "K is not split where there are outliers";
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
// large a ring as there is, or two; another kernel starts sooner where its blocks can settle in
// beside those of the one before. The sizes at which one beats the other were measured on an H200.
inline GemmConfig select_few_tokens_config(const GemmShape& s, const GemmDevice& device) {
  GemmConfig config;
  config.family = KernelFamily::kSm90;
  const int64_t share = weight_share(s, device);
  if (share <= 64) {
    const int tokens = s.M <= 8 ? 8 : s.M <= 16 ? 16 : s.M <= 32 ? 32 : 64;
    config.tile = tiles::swapped(tokens, 64);
    // A small weight does not need all multiprocessors, and leaves the others to the next kernel.
    const int64_t columns = ceil_div(s.N, 64), some = device.sm_count / 2;
    const int64_t tiles = ceil_div(s.M, tokens) * columns;
    const bool is_small = s.N * s.K <= int64_t{s.b_is_constant ? 26 : 20} << 20;
    if (4 * tiles <= some && s.K >= 2048 && !s.has_outliers) {
      config.split_k = 4;
    } else if (s.M > 64) {
      if (2 * ceil_div(s.M, 32) * columns <= 3 * some) {
        config.tile = tiles::swapped(32, 64);
      } else if (s.M <= (share > 32 ? 112 : 96) && share >= 32) {
        config.tile = tiles::swapped(s.M <= 80 ? 80 : s.M <= 96 ? 96 : 112, 64);
        config.width = static_cast<int>(share);
      }
    } else if (2 * tiles <= some) {
      config.width = 32;
    } else if (!is_small || tokens == 64 || (tokens == 32 && s.b_is_constant)) {
      config.width = static_cast<int>(share);
      config.blocks_per_sm = tokens <= 32 && !s.b_is_constant ? 2 : 1;
    }
    return config;
  }
  if (share <= 128 && s.M <= 16 && s.b_is_constant && !s.has_outliers) {
    // Two narrow tiles a multiprocessor: while one ends, the other still reads. Measured in steps
    // of LLaMA-7B and 13B and OPT-6.7B, with N = 12288, 15360 and 16384: up to 3 % of a step less
    // than by one wide tile.
    config.tile = tiles::swapped(s.M <= 8 ? 8 : 16, 64);
    config.width = static_cast<int>(round_up(share / 2, 8));
    config.blocks_per_sm = 2;
    return config;
  }
  if (share <= 128 && (s.M > 32 || s.M <= 16)) {
    for (const int tokens : {16, 64, 80, 96, 112, 128}) {
      config.tile = tiles::swapped(tokens, 128);
      if (s.M <= tokens) break;
    }
    config.width = static_cast<int>(share);
    return config;
  }
  // Several tiles a multiprocessor.
  config.tile = tiles::swapped(s.M <= 8 ? 8 : s.M <= 16 ? 16 : s.M <= 32 ? 32 : 64, 64);
  const int64_t tiles_per_sm = ceil_div(s.N, int64_t{64} * device.sm_count);
  config.width = static_cast<int>(round_up(ceil_div(s.N, tiles_per_sm * device.sm_count), 8));
  return config;
}

// The time of a tile's waves for K = 4096, in microseconds on an H200: a line through what was
// measured for N from 1024 to 22016 and M from 129 to 1024. A wave of tiles that share nothing ends
// with writing them, which does not grow with K: kWriting for a token.
struct WaveTime {
  int tokens;
  double first, each;
};
inline constexpr double kWriting = 0.009;
// Ping-pong tiles whose neighbours along M share channels, or along N tokens; and those that two
// warpgroups share, which end sooner, but not under the next one's main loop.
inline constexpr WaveTime kPairsM[] = {
    {64, 2.6, 7.7}, {80, 2.1, 8.5}, {96, 3.0, 9.4}, {112, 3.2, 10.3}, {128, 3.8, 11.6}};
inline constexpr WaveTime kPairsN[] = {
    {64, 2.9, 7.7}, {80, 2.3, 8.8}, {96, 2.8, 9.6}, {112, 3.9, 10.3}, {128, 4.0, 11.5}};
inline constexpr WaveTime kShared[] = {{64, 0.8, 8.7},   {80, 0.3, 9.8},    {96, 0.4, 10.8},
                                       {112, 0.2, 12.1}, {128, -0.3, 13.8}, {144, -0.8, 15.8},
                                       {160, 0.5, 16.8}, {192, -0.2, 20.0}};
inline constexpr WaveTime kNarrow = {64, 0.3, 6.2};  // 64 channels
// Bytes a microsecond of the weight, for which a wave with few rows of tiles may have to wait.
inline constexpr double kWeightBandwidth = 4.2e6, kWeightBandwidthAlone = 3.0e6;

// The narrowest ping-pong tile, in steps of 16 channels, that takes no more waves than the widest.
inline int64_t pingpong_width(int tokens, const GemmShape& s, const GemmDevice& device) {
  const int64_t rows = round_up(ceil_div(s.M, tokens), 2);
  const int64_t waves = ceil_div(rows * ceil_div(s.N, 128), device.sm_count);
  const int64_t columns = std::max<int64_t>(waves * device.sm_count / rows, 1);
  return std::clamp<int64_t>(round_up(ceil_div(s.N, columns), 16), kLeastPingpongWidth, 128);
}

// Many tokens: the tile with the shortest sequence of waves.
inline GemmConfig select_many_tokens_config(const GemmShape& s, const GemmDevice& device) {
  GemmConfig best;
  double least = 0;
  const auto consider = [&](double time, const TileConfig& tile, int64_t width = 0,
                            bool cluster_n = false) {
    if (least > 0 && time >= least) return;
    least = time;
    best.family = KernelFamily::kSm90;
    best.tile = tile;
    best.width = width < tile.tile_n ? static_cast<int>(width) : 0;
    best.cluster_n = cluster_n;
  };
  const auto waves = [&](int64_t rows, int64_t columns) {
    return ceil_div(rows * columns, device.sm_count);
  };
  const auto time = [&](const WaveTime& t, int64_t rows, int64_t columns, double bandwidth,
                        double writing, int channels = 128) {
    const int64_t loaded = std::min<int64_t>(columns, device.sm_count / rows) * channels;
    const double each = std::max(t.each, 4096 / bandwidth * static_cast<double>(loaded));
    const double k = static_cast<double>(s.K) / 4096, fixed = t.tokens * writing;
    return t.first + static_cast<double>(waves(rows, columns)) * (k * (each - fixed) + fixed);
  };
  const auto time_of_pairs = [&](const WaveTime& t, int64_t rows, int64_t columns) {
    return time(t, rows, columns, kWeightBandwidth, 0);
  };
  const int64_t columns = ceil_div(s.N, 128);

  for (const WaveTime& t : kPairsM) {
    const int64_t rows = round_up(ceil_div(s.M, t.tokens), 2);
    const double whole = time_of_pairs(t, rows, columns);
    // CUTLASS's kernel is a little faster where its boxes hardly leave the matrix at the edge.
    const int64_t overhang = rows * t.tokens - s.M;
    const bool fits =
        rows >= 16 || overhang <= s.M / 64 || (t.tokens == 128 && overhang <= 4 * rows);
    if (s.out_is_tma_storable && fits && (t.tokens == 64 || t.tokens == 128)) {
      consider(0.965 * whole, t.tokens == 64 ? tiles::kSm90Medium : tiles::kSm90Large);
    }
    // For 128 bytes of K the products of 128 channels take 4 cycles a token, whatever the width,
    // and what they are made of comes in at 64 bytes a cycle. Of what that saves a third is seen.
    const int64_t width = pingpong_width(t.tokens, s, device);
    const auto cycles = [&](int64_t width) {
      return std::max<int64_t>(4 * t.tokens, 2 * (t.tokens + width));
    };
    // Where the products are far from being the limit even then, it was no faster.
    const bool narrow = t.tokens > 64 && width <= t.tokens + 32;
    const double saved = 1 - static_cast<double>(cycles(width)) / cycles(128);
    consider(narrow && saved > 0 ? whole * (1 - saved / 3) : whole,
             tiles::swapped_pingpong(t.tokens), narrow && saved > 0 ? width : 128);
  }
  for (const WaveTime& t : kPairsN) {
    consider(time_of_pairs(t, ceil_div(s.M, t.tokens), round_up(columns, 2)),
             tiles::swapped_pingpong(t.tokens), 128, true);
  }
  consider(time(kNarrow, ceil_div(s.M, 64), ceil_div(s.N, 64), kWeightBandwidthAlone, kWriting, 64),
           tiles::swapped(64, 64));
  for (const WaveTime& t : kShared) {
    const int64_t rows = ceil_div(s.M, t.tokens), count = waves(rows, columns);
    // Outliers are added after a tile's main loop, by ping-pong tiles while the next one's is under
    // way. Measured on an H200: with several waves those took 1 to 16 % less than any but the
    // tallest of these; and with one wave of 64 tokens 5 to 13 % less, where the weight is wide and
    // the rows of tiles are even (but 2 % more with two rows).
    if (s.has_outliers && count > 1 && t.tokens <= 144) continue;
    const bool is_behind = t.tokens == 64 && columns >= 16 && rows % 2 == 0;
    const double outliers = s.has_outliers && is_behind ? 0.4 : 0;
    // In a single wave, for all to have the same share.
    const int64_t width = count > 1 ? 128 : round_up(ceil_div(s.N, device.sm_count / rows), 8);
    consider(time(t, rows, columns, kWeightBandwidthAlone, kWriting) + outliers,
             tiles::swapped(t.tokens, 128), std::max<int64_t>(width, 72));
  }
  return best;
}

inline GemmConfig select_sm90_config(const GemmShape& s, const GemmDevice& device) {
  // Up to 128 tokens where one tile, or a pair of narrow ones, gives work to all at once.
  const int64_t share = weight_share(s, device);
  const bool is_one_wave = 2 * ceil_div(s.N, 64) <= device.sm_count || (share > 64 && share <= 128);
  const bool few = s.M <= 64 || (s.M <= 112 && share <= 64) || (s.M <= 128 && is_one_wave);
  return few ? select_few_tokens_config(s, device) : select_many_tokens_config(s, device);
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
    if (s.K % 16 != 0 && !choice.relayout_b && !s.a_is_padded) choice.relayout_a = true;
  }
  const int64_t padded_k = round_up(s.K, 16);
  if (choice.relayout_a) choice.relayout_a_bytes = round_up(s.M * padded_k, 256);
  if (choice.relayout_b) choice.relayout_b_bytes = round_up(s.N * padded_k, 256);
  if (choice.config.family == KernelFamily::kSm90) return choice;

  choice.take(select_sm80_config(s, device), s);
  return choice;
}

}  // namespace fastq::cuda
