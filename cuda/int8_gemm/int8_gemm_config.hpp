// Which kernel an INT8 GEMM takes: a pure choice from the problem and the device, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/problem.hpp"
#include "int8_gemm/int8_gemm_tile.hpp"

namespace fastq::cuda {

// Every configuration that select_config may return; the build holds an instance of each
// (cuda/CMakeLists.txt names them, a test compares).
namespace tiles {
inline constexpr TileConfig kSm90Small{64, 64, 256, 1, 1, Schedule::kPingpong};
inline constexpr TileConfig kSm90Medium{64, 128, 128, 2, 1, Schedule::kPingpong};
inline constexpr TileConfig kSm90Large{128, 128, 128, 2, 1, Schedule::kPingpong};
inline constexpr TileConfig kSm90Huge{128, 256, 128, 2, 1, Schedule::kCooperative};
inline constexpr TileConfig kSm80Small{64, 64, 128, 1, 1, Schedule::kMultistage};
inline constexpr TileConfig kSm80Large{128, 128, 64, 1, 1, Schedule::kMultistage};
inline constexpr TileConfig kAll[] = {kSm90Small, kSm90Medium, kSm90Large,
                                      kSm90Huge,  kSm80Small,  kSm80Large};
}  // namespace tiles

// What select_config reads of a device and of this build.
struct GemmDevice {
  int cc_major = 9, cc_minor = 0;
  int sm_count = 132;
  bool has_sm90a_code = true;
};

// The problem in the terms that matter for the choice.
struct GemmShape {
  int64_t M = 0, N = 0, K = 0;
  // The operand can be read by 16-byte copies along a contiguous K where it lies.
  bool a_is_vectorizable = true, b_is_vectorizable = true;
  // Rows of out are contiguous, and start and end at multiples of 16 bytes: a TMA store rounds the
  // end of a row up to that, over whatever lies behind it.
  bool out_is_vectorizable = true;
};

struct GemmChoice {
  KernelFamily family = KernelFamily::kSm80;
  TileConfig tile = tiles::kSm80Large;
  // The operand is first copied to the workspace, K contiguous and padded to 16 bytes.
  bool relayout_a = false, relayout_b = false;
  size_t relayout_a_bytes = 0, relayout_b_bytes = 0;
  const char* reason = "";  // why not the fast family, for FASTQ_LOG=dispatch

  size_t workspace_size() const { return relayout_a_bytes + relayout_b_bytes; }
};

inline GemmShape gemm_shape(const Int8GemmProblem& p) {
  const auto readable = [&p](const void* data, int64_t stride_row, int64_t stride_k, int64_t rows) {
    const bool k_contiguous = stride_k == 1 || p.K <= 1;
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                         (rows == 1 || (stride_row % 16 == 0 && stride_row > 0));
    return k_contiguous && aligned;
  };
  const int64_t out_size = element_size(p.out_dtype);
  GemmShape shape;
  shape.M = p.M, shape.N = p.N, shape.K = p.K;
  shape.a_is_vectorizable = readable(p.a, p.stride_am, p.stride_ak, p.M);
  shape.b_is_vectorizable = readable(p.b, p.stride_bn, p.stride_bk, p.N);
  shape.out_is_vectorizable = p.stride_on == 1 && p.N * out_size % 16 == 0 &&
                              reinterpret_cast<uintptr_t>(p.out) % 16 == 0 &&
                              (p.M == 1 || (p.stride_om > 0 && p.stride_om * out_size % 16 == 0));
  return shape;
}

// 128x256 tiles move fewer bytes per product and win once they fill the chip for several waves;
// below that the finer tile quantises better.
inline TileConfig select_sm90_tile(const GemmShape& s, const GemmDevice& device) {
  if (s.M <= 64) return tiles::kSm90Small;
  if (s.M <= 128) return tiles::kSm90Medium;
  const int64_t huge_tiles = (round_up(s.M, 128) / 128) * (round_up(s.N, 256) / 256);
  return huge_tiles >= int64_t{8} * device.sm_count ? tiles::kSm90Huge : tiles::kSm90Large;
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
  } else if (!s.out_is_vectorizable) {
    choice.reason = "rows of out do not start and end at multiples of 16 bytes";
  } else if (s.K == 0) {
    choice.reason = "K is 0";
  } else {
    choice.family = KernelFamily::kSm90;
    choice.tile = select_sm90_tile(s, device);
    // A TMA store goes on to a multiple of 16 bytes. Should a load do so too, what lies behind a
    // row of K elements would take part in the sums: let it be zero in one of the operands, as
    // relayout leaves it.
    if (s.K % 16 != 0 && !choice.relayout_b) choice.relayout_a = true;
  }
  const int64_t padded_k = round_up(s.K, 16);
  if (choice.relayout_a) choice.relayout_a_bytes = round_up(s.M * padded_k, 256);
  if (choice.relayout_b) choice.relayout_b_bytes = round_up(s.N * padded_k, 256);
  if (choice.family == KernelFamily::kSm90) return choice;

  const int64_t large_tiles = (round_up(s.M, 128) / 128) * (round_up(s.N, 128) / 128);
  choice.tile = large_tiles < device.sm_count ? tiles::kSm80Small : tiles::kSm80Large;
  return choice;
}

}  // namespace fastq::cuda
