// Keys and values of a cache, from memory to the operands of a warp's products.
//
// An int8 cache's keys are operands as they are where columns are few: queries have become three
// int8 numbers each, digits
//   q = scale * (2^14 a + 2^7 b + c),  at most kLargestQuery = 127 * 2^14 + 2^13 - 1
// of a row, and scores are exact sums of them. For many columns that is more work than to turn the
// keys into float16, exactly, as the values always are; queries become float16 by a power of two
// for each row, which loses nothing that counts. Exponentials, relative to a reference, are in its
// range.
#pragma once

#include <type_traits>

#include "flash_decode/flash_decode_kernels.hpp"
#include "flash_decode/flash_decode_work.cuh"
#include "runtime/copy_async.cuh"
#include "runtime/mma_sync.cuh"

namespace fastq::cuda {

template <class T_, bool kInt8_, int kHeadDim_, int kColumns_, int kWarps_, int kStages_>
struct FlashDecodeTraits {
  using T = T_;                                          // of the queries
  static constexpr bool kInt8 = kInt8_;                  // of the cache; otherwise it is of T
  using Product = std::conditional_t<kInt8, __half, T>;  // of exponentials and values
  using Element = std::conditional_t<kInt8, int8_t, T>;
  static constexpr int kHeadDim = kHeadDim_, kColumns = kColumns_, kTiles = kColumns / 8;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps, kStages = kStages_;
  static constexpr int kKeys = 16;  // of a warp at a time
  static constexpr int kBlockKeys = kKeys * kWarps;
  static constexpr int kRowBytes = kHeadDim * sizeof(Element);
  static constexpr int kBlocksPerSm = 2;

  struct Ring {
    uint8_t k[kStages][kKeys][kRowBytes], v[kStages][kKeys][kRowBytes];
  };
  // A column's sums in the ring: those who write them meet fewer bank conflicts with a few between.
  static constexpr int kSumsPitch =
      kHeadDim + (sizeof(Ring) >= kColumns * (kHeadDim + 4) * sizeof(float) ? 4 : 0);
  static_assert(sizeof(Ring) >= kColumns * kSumsPitch * sizeof(float));

  struct Scales {
    float k[kKeys], v[kKeys];
  };
  static constexpr bool kConvertsKeys = kInt8 && kTiles >= 4;
  static constexpr int kQueryDigits = kInt8 && !kConvertsKeys ? 3 : 1;
  static constexpr int kQueryRowBytes = kConvertsKeys ? 2 * kHeadDim : kRowBytes;
  struct Shared {
    Ring ring[kWarps];
    uint8_t q[kQueryDigits][kColumns][kQueryRowBytes];
    float q_scale[kColumns];  // int8 only, as the next
    Scales scales[kInt8 ? kWarps : 1][kInt8 ? kStages : 1];
    struct {
      alignas(16) uint8_t k[kRowBytes], v[kRowBytes];
      float k_scale, v_scale;  // int8 only
    } newest;                  // a sequence's new token, where it is appended
    float2 references[kWarps][kColumns];
    DecodePiece piece;
  };
  __device__ static float* sums_of_warp(Shared& shared, int warp) {
    return reinterpret_cast<float*>(&shared.ring[warp]);
  }
};

constexpr float kLeastScale = 1.0f / (1ll << 60);  // 2^-60
constexpr int kLargestQuery = 127 * (1 << 14) + (1 << 13) - 1;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Rows of kRowBytes in chunks of 16 bytes, reordered so that the same chunk of eight rows lies in
// eight different groups of banks.
template <int kRowBytes>
__device__ constexpr uint32_t swizzled(uint32_t offset) {
  constexpr int kShift = kRowBytes <= 128 ? 7 : kRowBytes == 256 ? 8 : 9;
  static_assert(kRowBytes == 64 || kRowBytes == 128 || kRowBytes == 256 || kRowBytes == 512);
  return offset ^ ((offset >> kShift & 7) << 4);
}

// Which element of the output this lane's sums of row tile m are.
template <class Traits>
__device__ inline int output_element(int m, int half) {
  const int row = threadIdx.x % 32 / 4;
  return 16 * m + (Traits::kInt8 ? 2 * row + half : row + 8 * half);
}

// Of a word of four int8, bytes 0 and 2 as float16: 2^10 + (x + 128) less 2^10 + 128, where the
// lowest 8 bits are x with its sign turned.
__device__ inline uint32_t bytes_0_and_2(uint32_t x) {
  uint32_t y;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(y) : "r"((x & 0x00ff00ffu) ^ 0x64806480u), "r"(0x64806480u));
  return y;
}

// A warp's copies from the cache of one sequence and key head to its ring.
template <class Traits>
class KeyLoader {
 public:
  // Keys before first_key and from last_key on become zeros, unread. Loads are of `key` and then
  // of kBlockKeys further ones each.
  __device__ KeyLoader(const FlashDecodeParams& params, int batch, int head_k, int first_key,
                       int last_key, int key, typename Traits::Shared& shared)
      : params_(params),
        batch_(batch),
        first_key_(first_key),
        last_key_(last_key),
        key_(key),
        shared_(shared) {
    const KvCache& cache = params.problem.cache;
    const int row = lane() / kChunks, d = lane() % kChunks * kChunk;
    is_in_head_ = d < params.problem.head_dim;
    k_ = static_cast<const Element*>(cache.k.data) + head_k * cache.k.stride_head + d;
    v_ = static_cast<const Element*>(cache.v.data) + head_k * cache.v.stride_head + d;
    k_ = moved(k_, cache.k, row), v_ = moved(v_, cache.v, row);
    if constexpr (Traits::kInt8) {
      const CacheScales& scales = scales_of_lane();
      scale_ = moved(scales.data + head_k * scales.stride_head, scales, lane() % 16);
    }
    if (cache.page_size != 0) {
      look_up();
    } else {
      k_ = moved(k_ + batch * cache.k.stride_batch, cache.k, key);
      v_ = moved(v_ + batch * cache.v.stride_batch, cache.v, key);
      if constexpr (Traits::kInt8) {
        const CacheScales& scales = scales_of_lane();
        scale_ = moved(scale_ + batch * scales.stride_batch, scales, key);
      }
    }
  }

  __device__ __forceinline__ void load(int stage) {
    const KvCache& cache = params_.problem.cache;
    const Element *k = k_, *v = v_;
    const float* scale = scale_;
    if (cache.page_size != 0) {
      const int at = key_ & (cache.page_size - 1);
      k = moved(k + page_ * cache.k.stride_batch, cache.k, at);
      v = moved(v + page_ * cache.v.stride_batch, cache.v, at);
      if constexpr (Traits::kInt8) {
        const CacheScales& scales = scales_of_lane();
        scale = moved(scale + page_ * scales.stride_batch, scales, at);
      }
    } else {
      k_ = moved(k_, cache.k, Traits::kBlockKeys);
      v_ = moved(v_, cache.v, Traits::kBlockKeys);
      if constexpr (Traits::kInt8) scale_ = moved(scale_, scales_of_lane(), Traits::kBlockKeys);
    }
    typename Traits::Ring& ring = shared_.ring[threadIdx.x / 32];
    load_rows(cache.k, k, ring.k[stage]);
    load_rows(cache.v, v, ring.v[stage]);
    if constexpr (Traits::kInt8) {
      const float* const to = shared_.scales[threadIdx.x / 32][stage].k + lane();
      copy_async_4_or_zero(shared_address(to), scale, is_there(key_ + lane() % 16));
    }
    key_ += Traits::kBlockKeys;
    if (cache.page_size != 0) look_up();
  }

 private:
  using Element = typename Traits::Element;
  static constexpr int kChunk = 16 / sizeof(Element);  // elements
  static constexpr int kChunks = Traits::kRowBytes / 16, kRowsAtATime = 32 / kChunks;

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ bool is_there(int key) const { return key >= first_key_ && key < last_key_; }
  // The first half of a warp brings k's scales, the second v's.
  __device__ const CacheScales& scales_of_lane() const {
    const KvCache& cache = params_.problem.cache;
    return lane() < 16 ? cache.k_scale : cache.v_scale;
  }
  template <class Data, class Tensor>
  __device__ static const Data* moved(const Data* data, const Tensor& t, int tokens) {
    return data + tokens * t.stride_seqlen;
  }

  // Reads which page the next load needs, well before it.
  __device__ void look_up() {
    const KvCache& cache = params_.problem.cache;
    if (key_ >= last_key_ || key_ + Traits::kKeys <= first_key_) return;
    page_ = cache.block_table[batch_ * cache.stride_table + (key_ >> params_.page_shift)];
  }

  __device__ __forceinline__ void load_rows(
      const AttentionTensor& t, const Element* from,
      uint8_t (&rows)[Traits::kKeys][Traits::kRowBytes]) const {
    if (!params_.is_vectorizable) {
      load_elements(t, from, rows);
    } else if (key_ >= first_key_ && key_ + Traits::kKeys <= last_key_) {
      load_chunks(t, from, rows, [&](int) { return is_in_head_; });
    } else {
      load_chunks(t, from, rows, [&](int row) { return is_in_head_ && is_there(key_ + row); });
    }
  }

  template <class IsRead>
  __device__ __forceinline__ void load_chunks(const AttentionTensor& t, const Element* from,
                                              uint8_t (&rows)[Traits::kKeys][Traits::kRowBytes],
                                              const IsRead& is_read) const {
    constexpr int kBytes = Traits::kRowBytes;
    const uint32_t to = shared_address(rows) + swizzled<kBytes>(16 * lane());
#pragma unroll
    for (int i = 0; i < Traits::kKeys; i += kRowsAtATime) {
      const uint32_t reorder = swizzled<kBytes>(i * kBytes) - i * kBytes;
      const int bytes = is_read(i + lane() / kChunks) ? 16 : 0;
      // Of several tiles of rows each reads the same keys.
      if (params_.tiles.divisor == 1) {
        copy_async_16_once((to ^ reorder) + i * kBytes, from, bytes);
      } else {
        copy_async_16((to ^ reorder) + i * kBytes, from, bytes);
      }
      from = moved(from, t, kRowsAtATime);
    }
  }

  __device__ void load_elements(const AttentionTensor& t, const Element* from,
                                uint8_t (&rows)[Traits::kKeys][Traits::kRowBytes]) const {
    const int head_dim = static_cast<int>(params_.problem.head_dim);
    from = moved(from - lane() % kChunks * kChunk, t, -(lane() / kChunks));
#pragma unroll 1
    for (int i = lane(); i < Traits::kKeys * Traits::kHeadDim; i += 32) {
      const int row = i / Traits::kHeadDim, d = i % Traits::kHeadDim;
      const uint32_t to =
          swizzled<Traits::kRowBytes>(row * Traits::kRowBytes + d * sizeof(Element));
      *reinterpret_cast<Element*>(rows[0] + to) =
          is_there(key_ + row) && d < head_dim ? *(moved(from, t, row) + d) : Element{};
    }
  }

  const FlashDecodeParams& params_;
  int batch_, first_key_, last_key_, key_;
  typename Traits::Shared& shared_;
  bool is_in_head_;  // this lane's chunk
  // This lane's rows of the next load; with pages, of a page's first tokens.
  const Element *k_, *v_;
  const float* scale_ = nullptr;
  int page_ = 0;
};

// Operands from a warp's ring.
template <class Traits>
class KeyReader {
 public:
  static constexpr int kTiles = Traits::kTiles;

  // After the queries have been loaded.
  __device__ KeyReader(const FlashDecodeParams& params, const typename Traits::Shared& shared)
      : factor_(params.problem.softmax_scale * kLog2e),
        q_scale_(shared.q_scale),
        scales_(shared.scales[Traits::kInt8 ? threadIdx.x / 32 : 0]) {
    constexpr int kBytes = Traits::kRowBytes;
    const int lane = threadIdx.x % 32;
    const typename Traits::Ring& ring = shared.ring[threadIdx.x / 32];
    const uint32_t of_rows = swizzled<kBytes>(lane % 16 * kBytes + lane / 16 * 16);
    const uint32_t transposed =
        swizzled<kBytes>((lane % 8 + lane / 16 * 8) * kBytes + lane / 8 % 2 * 16);
    k_ = shared_address(ring.k) + of_rows;
    v_ = shared_address(ring.v) + (Traits::kInt8 ? of_rows : transposed);
    constexpr int kQueryBytes = Traits::kQueryRowBytes;
    q_ = shared_address(shared.q) + swizzled<kQueryBytes>(lane % 8 * kQueryBytes + lane / 8 * 16);
    if constexpr (kHoldsQueries) {
#pragma unroll
      for (int step = 0; step < kQuerySteps; ++step) queries(0, step, held_[step]);
    }
  }

  // Scores, scaled: exponents of 2.
  __device__ __forceinline__ void scores(int stage, float (&s)[kTiles][4]) const {
    if constexpr (Traits::kInt8 && !Traits::kConvertsKeys) {
      int8_scores(stage, s);
    } else {
      float_scores(stage, s);
    }
  }

  // The transposed values of two row tiles, elements 32 d on.
  __device__ __forceinline__ void values(int stage, int d, uint32_t (&v)[2][4]) const {
    const uint32_t at = v_ + stage * kStageBytes;
    if constexpr (Traits::kInt8) {
      uint32_t x[4];
      load_transposed_matrices(at ^ (d << 5), x);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          v[m][2 * half] = bytes_0_and_2(x[2 * m + half]);
          v[m][2 * half + 1] = bytes_0_and_2(x[2 * m + half] >> 8);
        }
      }
    } else {
      load_transposed_matrices(at ^ (d << 6), v[0]);
      load_transposed_matrices(at ^ (d << 6 | 32), v[1]);
    }
  }

  // What this lane's two keys' exponentials are multiplied by, and its logarithm to base 2.
  __device__ __forceinline__ void value_scales(int stage, float (&scale)[2],
                                               float (&log2_scale)[2]) const {
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = Traits::kInt8 ? scales_[stage].v[row + 8 * half] : 1.0f;
      // A scale may be 0, whose key still counts in the sum of exponentials.
      log2_scale[half] = Traits::kInt8 ? __log2f(fmaxf(scale[half], kLeastScale)) : 0.0f;
    }
  }

 private:
  using T = typename Traits::T;
  static constexpr int kStageBytes = Traits::kKeys * Traits::kRowBytes;
  static constexpr int kQuerySteps = Traits::kQueryDigits * Traits::kQueryRowBytes / 64;
  static constexpr bool kHoldsQueries = kTiles == 1;

  // 64 bytes of columns 8 n on; other digits come after the first.
  __device__ __forceinline__ void queries(int n, int step, uint32_t (&q)[4]) const {
    constexpr int kBytes = Traits::kQueryRowBytes, kSteps = kBytes / 64;
    const uint32_t reorder = swizzled<kBytes>(8 * n * kBytes) - 8 * n * kBytes;
    load_matrices(
        (q_ ^ (step % kSteps << 6) ^ reorder) + (step / kSteps * Traits::kColumns + 8 * n) * kBytes,
        q);
  }
  __device__ __forceinline__ void some_queries(int n, int step, uint32_t (&q)[4]) const {
    if constexpr (kHoldsQueries) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = held_[step][i];
    } else {
      queries(n, step, q);
    }
  }

  // 32 elements of 16 keys, from element 32 * step on, as operands of two products.
  __device__ __forceinline__ void keys(int stage, int step, uint32_t (&k)[2][4]) const {
    const uint32_t at = k_ + stage * kStageBytes;
    if constexpr (Traits::kConvertsKeys) {
      uint32_t x[4];
      load_matrices(at ^ (step << 5), x);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          k[i][half] = bytes_0_and_2(x[2 * i + half]);
          k[i][half + 2] = bytes_0_and_2(x[2 * i + half] >> 8);
        }
      }
    } else {
      load_matrices(at ^ (step << 6), k[0]);
      load_matrices(at ^ (step << 6 | 32), k[1]);
    }
  }

  // What this lane's two keys' sums are multiplied by.
  __device__ __forceinline__ void key_factors(int stage, float (&factor)[2]) const {
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] = Traits::kInt8 ? factor_ * scales_[stage].k[row + 8 * half] : factor_;
    }
  }

  __device__ __forceinline__ void float_scores(int stage, float (&s)[kTiles][4]) const {
    using Product = typename Traits::Product;
    // Two sums in turn where there would be a long chain of products.
    constexpr int kChains = kTiles == 1 ? 2 : 1;
    float chains[kChains][kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kQuerySteps; ++step) {
      uint32_t k[2][4];
      keys(stage, step, k);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        uint32_t q[4];
        some_queries(n, step, q);
        mma<Product>(k[0], q[0], q[1], chains[0][n]);
        mma<Product>(k[1], q[2], q[3], chains[kChains - 1][n]);
      }
    }
    float factor[2];
    key_factors(stage, factor);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float sum = kChains == 2 ? chains[0][n][i] + chains[1][n][i] : chains[0][n][i];
        s[n][i] = sum * (query_scale(n, i) * factor[i / 2]);
      }
    }
  }
  __device__ __forceinline__ float query_scale(int n, int i) const {
    return Traits::kInt8 ? q_scale_[8 * n + threadIdx.x % 4 * 2 + i % 2] : 1.0f;
  }

  __device__ __forceinline__ void int8_scores(int stage, float (&s)[kTiles][4]) const {
    constexpr int kSteps = Traits::kRowBytes / 64;
    const uint32_t at = k_ + stage * kStageBytes;
    uint32_t sums[3][kTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t k[2][4];
      load_matrices(at ^ (step << 6), k[0]);
      load_matrices(at ^ (step << 6 | 32), k[1]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int digit = 0; digit < 3; ++digit) {
          uint32_t q[4];
          some_queries(n, digit * kSteps + step, q);
          mma_int8(k[0], q[0], q[1], sums[digit][n]);
          mma_int8(k[1], q[2], q[3], sums[digit][n]);
        }
      }
    }
    float factor[2];
    key_factors(stage, factor);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int lower = static_cast<int>((sums[1][n][i] << 7) + sums[2][n][i]);
        const float sum = fmaf(static_cast<int>(sums[0][n][i]), 1 << 14, lower);
        s[n][i] = sum * (query_scale(n, i) * factor[i / 2]);
      }
    }
  }

  float factor_;
  const float* q_scale_;
  const typename Traits::Scales (&scales_)[Traits::kInt8 ? Traits::kStages : 1];
  uint32_t k_, v_, q_;
  uint32_t held_[kHoldsQueries ? kQuerySteps : 1][4];
};

}  // namespace fastq::cuda
