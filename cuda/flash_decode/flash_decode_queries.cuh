// A tile's queries, from memory to the operands of products: rotated, where a new token is
// appended, and of an int8 cache as flash_decode_keys.cuh says.
#pragma once

#include <cfloat>
#include <cmath>

#include "flash_decode/flash_decode_append.cuh"
#include "flash_decode/flash_decode_keys.cuh"
#include "quantize/row_scale.cuh"
#include "runtime/float_io.cuh"

namespace fastq::cuda {

// Where an element of a query goes whose products are with converted keys: of each 16, a lane has
// bytes 0 and 2 of a word of four as its first two operands, and bytes 1 and 3 as the other two.
__device__ inline int query_position(int element) {
  const int word = element % 16 / 4, byte = element % 4;
  return element / 16 * 16 + byte % 2 * 8 + 2 * word + byte / 2;
}

// The rows of a tile to shared memory, zeros where there are none.
template <class Traits, bool kFuses>
__device__ inline void load_queries(const FlashDecodeParams& params, const DecodeTile& tile,
                                    int head_k, typename Traits::Shared& shared) {
  using T = typename Traits::T;
  constexpr int kPerLane = Traits::kHeadDim / 32, kBytes = Traits::kQueryRowBytes;
  const FlashDecodeProblem& p = params.problem;
  const int lane = threadIdx.x % 32, head_dim = static_cast<int>(p.head_dim);
  const bool rotates = kFuses && params.appends && params.append.rotary_dim > 0;
  const int token = rotates ? new_token(params, tile.batch) : -1;
#pragma unroll
  for (int column = threadIdx.x / 32; column < Traits::kColumns; column += Traits::kWarps) {
    int query, of_group;
    params.group(query, of_group, tile.first_row + column);
    const T* const q = static_cast<const T*>(p.q.data) + tile.batch * p.q.stride_batch +
                       query * p.q.stride_seqlen +
                       (head_k * params.group.divisor + of_group) * p.q.stride_head;
    T x[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + 32 * i;
      x[i] = column >= tile.rows || d >= head_dim ? T{}
             : token < 0 ? q[d]
                         : from_float<T>(rotated(params.append, q, d, token));
    }
    if constexpr (!Traits::kInt8) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const uint32_t at = swizzled<kBytes>(column * kBytes + 2 * (lane + 32 * i));
        *reinterpret_cast<T*>(shared.q[0][0] + at) = x[i];
      }
    } else {
      uint32_t absmax = 0;
#pragma unroll
      for (const T& y : x) absmax = max(absmax, abs_bits(to_float(y)));
      absmax = __reduce_max_sync(0xffffffffu, absmax);
      const bool is_finite = absmax < 0x7f800000u;
      // A power of two that leaves less than 2^15.
      const uint32_t power = max(absmax, 30u << 23) & 0x7f800000u, fourteen = 14u << 23;
      const float scale = Traits::kConvertsKeys
                              ? __uint_as_float(power - fourteen)
                              : fmaxf(__uint_as_float(absmax) / kLargestQuery, FLT_MIN);
      const float inverse = __uint_as_float((254u << 23) - (power - fourteen));
      if (lane == 0) shared.q_scale[column] = is_finite ? scale : NAN;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float y = is_finite ? to_float(x[i]) : 0.0f;
        if constexpr (Traits::kConvertsKeys) {
          const int at = swizzled<kBytes>(column * kBytes + 2 * query_position(lane + 32 * i));
          *reinterpret_cast<__half*>(shared.q[0][0] + at) = __float2half_rn(y * inverse);
        } else {
          const int z = __float2int_rn(__fdiv_rn(y, scale));
          const int a = (z + (1 << 13)) >> 14, rest = z - (a << 14), b = (rest + (1 << 6)) >> 7;
          const uint32_t at = swizzled<kBytes>(column * kBytes + lane + 32 * i);
          shared.q[0][0][at] = static_cast<uint8_t>(a);
          shared.q[1][0][at] = static_cast<uint8_t>(b);
          shared.q[2][0][at] = static_cast<uint8_t>(rest - (b << 7));
        }
      }
    }
  }
}

}  // namespace fastq::cuda
