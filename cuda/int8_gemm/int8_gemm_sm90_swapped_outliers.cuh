// Outliers in the kernels of int8_gemm_sm90_swapped.cuh: two producer warps fill the staging of a
// warpgroup with them, a half at a time, and the warpgroup adds their products to its sums before
// it takes the staging for its output.
#pragma once

#include "int8_gemm/gather_outliers.cuh"
#include "int8_gemm/int8_gemm_sm90_swapped_output.cuh"
#include "int8_gemm/int8_gemm_sm90_swapped_tiles.cuh"

namespace fastq::cuda {

// What belongs to some columns with outliers, from `first` on, and to a warpgroup's tokens (kIsX)
// or channels. By a warp; all loads are on their way before the first is looked at.
template <class Traits, bool kIsX>
__device__ inline void swapped_fill(const OutlierParams& p, const FoundOutliers& found, int first,
                                    int count, int row0,
                                    typename Traits::Shared::Outliers* outliers) {
  constexpr int kRows = kIsX ? Traits::kTileM : 64 * Traits::kBlocks, kTurns = (kRows + 31) / 32;
  const int lane = threadIdx.x % 32, rows = min(kRows, (kIsX ? p.M : p.N) - row0);
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    OutlierColumn<kIsX> column(p, found, first + c, row0 + lane, 32);
    float* const to = kIsX ? outliers[c].x : outliers[c].b;
    const uint32_t words = cute::cast_smem_ptr_to_uint(to + lane);
#pragma unroll
    for (int i = 0; i < kTurns; ++i, column.next()) {
      if (32 * i + lane >= rows) break;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(words + 128 * i),
                   "l"(word_of(column.address))
                   : "memory");
    }
  }
  float scales[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (32 * i + lane < rows) scales[i] = outlier_scale<kIsX>(p, row0 + 32 * i + lane);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    OutlierColumn<kIsX> column(p, found, first + c, row0 + lane, 32);
    float* const to = kIsX ? outliers[c].x : outliers[c].b;
    float values[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i, column.next()) {
      if (32 * i + lane >= kRows) break;
      const uint32_t word = __float_as_uint(to[32 * i + lane]);
      values[i] = outlier_value<kIsX>(p, column.is_kept, word,
                                      static_cast<uint32_t>(column.address), scales[i]);
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (32 * i + lane < kRows) to[32 * i + lane] = values[i];
    }
  }
}

// The same of what has been gathered.
template <class Traits, bool kIsX>
__device__ inline void swapped_fill_gathered(const OutlierSplit& split, int first, int count,
                                             int row0,
                                             typename Traits::Shared::Outliers* outliers) {
  constexpr int kRows = kIsX ? Traits::kTileM : 64 * Traits::kBlocks;
  const int lane = threadIdx.x % 32;
  const int64_t stride = kIsX ? split.stride_gx : split.stride_gb;
  // Rows are longer than the matrix.
  const float* from = (kIsX ? split.gathered_x : split.gathered_b) + first * stride + row0 + lane;
#pragma unroll 1
  for (int c = 0; c < count; ++c, from += stride) {
    const uint32_t to = cute::cast_smem_ptr_to_uint((kIsX ? outliers[c].x : outliers[c].b) + lane);
#pragma unroll
    for (int i = 0; 32 * i < kRows; ++i) {
      if (32 * i + lane >= kRows) break;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to + 128 * i),
                   "l"(from + 32 * i)
                   : "memory");
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// A tile's outliers, from where they lie or as they have been gathered. `phases` has two bits of
// each warpgroup's `drained`, and above them which warpgroup's turn it is.
template <class Traits, bool kIsGathered>
__device__ inline void swapped_fill_tile(const SwappedTiles<Traits>& tiles,
                                         typename Traits::Shared& shared, uint32_t& phases) {
  constexpr int kAtATime = Traits::Shared::kOutliers;
  const OutlierParams& p = tiles.p.output.outliers;
  const int2 origin = tiles.origin(), box = tiles.box(origin);
  const auto await_drained = [&](int warpgroup, int half) {
    const int bit = 2 * warpgroup + half;
    shared.drained[warpgroup][half].wait(phases >> bit & 1);
    phases ^= 1u << bit;
  };
#pragma unroll 1
  for (int part = 0; part < Traits::kPerTile; ++part) {
    const int warpgroup = Traits::kPingpong ? phases >> 4 : part, n0 = box.y + 64 * part;
    const bool has_part = n0 < min(p.N, origin.y + tiles.p.width);
    const int count = has_part ? shared.outliers.gathered() : 0;
#pragma unroll 1
    for (int first = 0, half = 0; first < count; first += kAtATime, half ^= 1) {
      // All the staging becomes free with a tile, and then a half when it has been added.
      if (first != kAtATime) await_drained(warpgroup, half);
      if (first == 0) await_drained(warpgroup, 1);
      auto* const to = shared.staging[warpgroup].outliers[half];
      const int some = min(kAtATime, count - first);
      const bool is_x = threadIdx.x % 64 < 32;
      if constexpr (kIsGathered) {
        is_x ? swapped_fill_gathered<Traits, true>(p.split, first, some, box.x, to)
             : swapped_fill_gathered<Traits, false>(p.split, first, some, n0, to);
      } else {
        is_x ? swapped_fill<Traits, true>(p, shared.outliers, first, some, box.x, to)
             : swapped_fill<Traits, false>(p, shared.outliers, first, some, n0, to);
      }
      shared.filled[warpgroup][half].arrive();
    }
  }
  if constexpr (Traits::kPingpong) phases ^= 1u << 4;
}

// The outliers of all tiles, by the other two producer warps. The first tile does not wait for what
// the blocks gather together.
template <class Traits>
__device__ inline void swapped_gather(const SwappedParams& p, typename Traits::Shared& shared) {
  const OutlierParams& outliers = p.output.outliers;
  find_outliers(outliers, shared.outliers, [] { cutlass::arch::NamedBarrier::sync(64, 5); });
  if (threadIdx.x % 64 == 0) shared.found.arrive();
  if (shared.outliers.total() == 0) return;
  SwappedTiles<Traits> tiles(p);
  uint32_t phases = 0;
#pragma unroll 1
  do {
    swapped_fill_tile<Traits, false>(tiles, shared, phases);
    tiles.next();
  } while (tiles.has_tile() && (Traits::kIsNarrow || outliers.split.counters == nullptr));
  if constexpr (!Traits::kIsNarrow) {  // a narrow tile has few elements
    if (!tiles.has_tile()) return;
    gather_together(outliers, shared.outliers);
#pragma unroll 1
    for (; tiles.has_tile(); tiles.next()) swapped_fill_tile<Traits, true>(tiles, shared, phases);
  }
}

// The sums become floats, in place.
template <class Traits>
__device__ inline void swapped_scale(const float* scales, const SwappedPart& part,
                                     const SwappedPlainColumns<Traits>& columns,
                                     typename Traits::Sums& acc) {
#pragma unroll
  for (int j = 0; j < Traits::kTileM / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4 * Traits::kBlocks; ++i) {
      uint32_t& sum = acc[i / 4][4 * j + i % 4];
      const float scale = scales[8 * j + part.lane128 % 4 * 2 + i % 2];
      sum = __float_as_uint(scale_sum(sum, scale, columns.scale_b[i / 4][i % 4 / 2]));
    }
  }
}

// `count` columns with outliers are added to what are floats by then; see epilogue/outliers.cuh.
template <class Traits>
__device__ inline void swapped_add_outliers(const typename Traits::Shared::Outliers* outliers,
                                            int count, int lane128, typename Traits::Sums& acc) {
  const int lane = lane128 % 32;
#pragma unroll 1
  for (int c = 0; c < count; ++c) {
    const auto& x = outliers[c].x;
    const auto& b = outliers[c].b;
    float v[Traits::kBlocks][2];
#pragma unroll
    for (int i = 0; i < 2 * Traits::kBlocks; ++i) {
      v[i / 2][i % 2] = b[i / 2 * 64 + lane128 / 32 * 16 + i % 2 * 8 + lane / 4];
    }
#pragma unroll
    for (int j = 0; j < Traits::kTileM / 8; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&x[8 * j + lane % 4 * 2]);
#pragma unroll
      for (int token = 0; token < 2; ++token) {
        const float its_x = token == 0 ? pair.x : pair.y;
        if (its_x == 0) continue;
#pragma unroll
        for (int i = 0; i < 2 * Traits::kBlocks; ++i) {
          uint32_t& y = acc[i / 2][4 * j + i % 2 * 2 + token];
          y = __float_as_uint(__fmaf_rn(its_x, v[i / 2][i % 2], __uint_as_float(y)));
        }
      }
    }
  }
}

// The outliers' products, as they are filled in, are added to what are floats by then.
template <class Traits>
__device__ inline void swapped_add_outliers(typename Traits::Shared& shared,
                                            const SwappedPart& part, int warpgroup,
                                            typename Traits::Sums& acc) {
  constexpr int kAtATime = Traits::Shared::kOutliers;
  const int count = shared.outliers.gathered(), chunks = (count + kAtATime - 1) / kAtATime;
  const uint32_t phases = shared.phases[warpgroup];
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int half = chunk % 2, first = chunk * kAtATime;
    shared.filled[warpgroup][half].wait((phases >> half ^ chunk >> 1) & 1);
    swapped_add_outliers<Traits>(shared.staging[warpgroup].outliers[half],
                                 min(kAtATime, count - first), part.lane128, acc);
    if (chunk + 2 < chunks) shared.drained[warpgroup][half].arrive();
  }
  part.sync();  // what is written takes the same place
  // The first half has been filled once more than the second where the chunks are odd.
  const uint32_t turned = ((chunks + 1) / 2 & 1) | (chunks / 2 & 1) << 1;
  if (part.lane128 == 0) shared.phases[warpgroup] = phases ^ turned;
}

}  // namespace fastq::cuda
