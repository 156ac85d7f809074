// A sequence's new token, appended by the kernel that attends to it (kv_append.cu has the
// formulas). Whoever has a key head's last keys rotates and quantises the token's row on its way to
// the cache, and to shared memory, from where it joins those that come out of the cache; and every
// query is rotated where it is loaded. So nothing waits for the cache to be written.
#pragma once

#include "flash_decode/flash_decode_kernels.hpp"
#include "flash_decode/flash_decode_keys.cuh"
#include "flash_decode/flash_decode_work.cuh"
#include "kv_append/rotation.cuh"
#include "quantize/row_scale.cuh"
#include "runtime/float_io.cuh"

namespace fastq::cuda {

// Where a sequence's new token goes: negative where it goes nowhere.
__device__ inline int new_token(const FlashDecodeParams& params, int batch) {
  const KvCache& cache = params.problem.cache;
  const int token = cache.seqlens[batch * cache.stride_seqlens] - 1;
  return token < cache.capacity ? token : -1;
}

// An element of a row as it is in position `token`. Its pair's other element is read besides, so
// that no lane needs another's.
template <class T>
__device__ inline float rotated(const KvAppendProblem& p, const T* row, int d, int token) {
  const float x = to_float(row[d]);
  if (d >= p.rotary_dim || token < 0) return x;
  const int half = static_cast<int>(p.rotary_dim) / 2;
  const bool is_first = p.rotary_interleaved ? d % 2 == 0 : d < half;
  const int pair = p.rotary_interleaved ? d / 2 : is_first ? d : d - half;
  const int step = p.rotary_interleaved ? 1 : half;
  const float other = to_float(row[is_first ? d + step : d - step]);
  const int position = min(token, static_cast<int>(p.max_seqlen) - 1);
  const auto angle = [&](const MatrixView& table) {
    const int64_t at = position * table.stride_m + pair * table.stride_n;
    return table.dtype == DType::kFloat32 ? static_cast<const float*>(table.data)[at]
                                          : to_float(static_cast<const T*>(table.data)[at]);
  };
  const float cosine = angle(p.rotary_cos), sine = angle(p.rotary_sin);
  return rotated(x, other, cosine, is_first ? -sine : sine);
}

// A sequence and key head's new key (kIsKey) or value, by a warp: as the cache has it, to `to` and
// with `stores` to the cache, and its scale.
template <class Traits, bool kIsKey>
__device__ inline void append_row(const FlashDecodeParams& params, int batch, int head_k, int token,
                                  bool stores, uint8_t (&to)[Traits::kRowBytes], float& scale_to) {
  using T = typename Traits::T;
  using Element = typename Traits::Element;
  constexpr int kPerLane = Traits::kHeadDim / 32;
  const KvAppendProblem& p = params.append;
  const KvCache& cache = params.problem.cache;
  const AttentionTensor &from = kIsKey ? p.k : p.v, &stored = kIsKey ? cache.k : cache.v;
  const T* const row =
      static_cast<const T*>(from.data) + batch * from.stride_batch + head_k * from.stride_head;
  const int lane = threadIdx.x % 32, head_dim = static_cast<int>(p.head_dim);
  float x[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    x[i] = d >= head_dim ? 0.0f : kIsKey ? rotated(p, row, d, token) : to_float(row[d]);
  }
  int64_t page = batch;
  int at = token;
  if (cache.page_size != 0) {
    page = cache.block_table[batch * cache.stride_table + (token >> params.page_shift)];
    at = token & (cache.page_size - 1);
  }
  RowScale scale{};
  if constexpr (Traits::kInt8) {
    uint32_t absmax = 0;
#pragma unroll
    for (const float y : x) absmax = max(absmax, abs_bits(y));
    scale = row_scale(__reduce_max_sync(0xffffffffu, absmax));
    if (lane == 0) {
      scale_to = scale.scale;
      const CacheScales& scales = kIsKey ? cache.k_scale : cache.v_scale;
      if (stores) {
        scales.data[page * scales.stride_batch + at * scales.stride_seqlen +
                    head_k * scales.stride_head] = scale.scale;
      }
    }
  }
  Element* const out = static_cast<Element*>(stored.data) + page * stored.stride_batch +
                       at * stored.stride_seqlen + head_k * stored.stride_head;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int d = lane + 32 * i;
    Element element;
    if constexpr (Traits::kInt8) {
      element = quantize_element<RowRounding::kSymmetric, true>(x[i], scale);
    } else {
      element = from_float<T>(x[i]);
    }
    reinterpret_cast<Element*>(to)[d] = element;
    if (stores && d < head_dim) out[d] = element;
  }
}

// Both, by the block of threads that has the tile's last keys, and there by the last warps: the
// first ones load queries meanwhile. Of several tiles of rows the first one writes to the cache.
template <class Traits>
__device__ inline void append_token(const FlashDecodeParams& params, const DecodeTile& tile,
                                    int head_k, int token, typename Traits::Shared& shared) {
  static_assert(Traits::kWarps >= 2);
  const int from_last = Traits::kWarps - 1 - static_cast<int>(threadIdx.x) / 32;
  const bool stores = tile.first_row == 0;
  auto& its = shared.newest;
  if (from_last == 0) {
    append_row<Traits, true>(params, tile.batch, head_k, token, stores, its.k, its.k_scale);
  } else if (from_last == 1) {
    append_row<Traits, false>(params, tile.batch, head_k, token, stores, its.v, its.v_scale);
  }
}

// The new token's row to a warp's ring, of a stage whose copies have arrived.
template <class Traits>
__device__ inline void join_newest(typename Traits::Shared& shared, int stage, int row) {
  constexpr int kBytes = Traits::kRowBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  typename Traits::Ring& ring = shared.ring[warp];
  if (lane < kBytes / 16) {
    const uint32_t at = swizzled<kBytes>(row * kBytes + 16 * lane);
    *reinterpret_cast<uint4*>(ring.k[stage][0] + at) =
        reinterpret_cast<const uint4*>(shared.newest.k)[lane];
    *reinterpret_cast<uint4*>(ring.v[stage][0] + at) =
        reinterpret_cast<const uint4*>(shared.newest.v)[lane];
  }
  if (Traits::kInt8 && lane == 0) {
    shared.scales[warp][stage].k[row] = shared.newest.k_scale;
    shared.scales[warp][stage].v[row] = shared.newest.v_scale;
  }
  __syncwarp();
}

}  // namespace fastq::cuda
