// Attention of a few queries to a cache of keys and values, by mma.sync, for Ampere and everything
// after it.
//
//   s (keys, columns) = k (keys, d) . q^T (d, columns)         a column is a query of some head
//   o (d, columns) += v^T (d, keys) . exp2(s) (keys, columns)
//
// Time goes to reading the cache, so everything serves that. Keys are the rows of the products: a
// tile of 16 keys is full, and only 8 columns are, or lie idle, where others have rows of 64
// queries. A warp takes 16 keys at a time, all on its own: cp.async brings them to a ring of its
// own, a few turns ahead, and no warp waits for another till their sums are added. Blocks of
// threads take equal pieces of all work (flash_decode_work.cuh); flash_decode_combine.cu adds what
// they divided, or on Hopper and after the blocks of a cluster.
//
// Of an int8 cache, scores are multiplied by k's scale after their sum, and exponentials by v's
// before the product. The largest product is looked for, not the largest exponential: none is out
// of range.
//
// Template parameters: the dtypes, head_dim (rounded up) and columns; all else is a run-time
// branch.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "flash_decode/flash_decode_append.cuh"
#include "flash_decode/flash_decode_cluster.cuh"
#include "flash_decode/flash_decode_keys.cuh"
#include "flash_decode/flash_decode_queries.cuh"
#include "flash_decode/flash_decode_work.cuh"
#include "runtime/dependent_launch.cuh"
#include "runtime/device.hpp"

namespace fastq::cuda {

// The running softmax of this lane's columns: 2 * (lane % 4) and the next of each 8. Exponentials
// are relative to a reference as RowSoftmax has it, kLift below the largest score: so that of
// float16's small numbers more are left.
template <int kTiles>
struct ColumnSoftmax {
  static constexpr float kSlack = 8, kLift = 7;  // 2^15 is within float16's range
  float reference[kTiles][2];                    // exponents of 2
  float sum[kTiles][2];                          // of this lane's keys alone

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) reference[n][i] = -INFINITY, sum[n][i] = 0;
    }
  }

  // Takes scores into account, to each of which its key's `more` is added. True where the warp's
  // outputs must be multiplied by `rescale`, as the sums have been.
  __device__ __forceinline__ bool refer(const float (&s)[kTiles][4], const float (&more)[2],
                                        float (&rescale)[kTiles][2]) {
    float most[kTiles][2];
    bool is_large = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        most[n][i] = fmaxf(s[n][i] + more[0], s[n][2 + i] + more[1]);
        is_large = is_large || most[n][i] > reference[n][i] + (kLift + kSlack);
      }
    }
    const bool replaces = __any_sync(0xffffffffu, is_large);
    if (replaces) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float x = most[n][i];
#pragma unroll
          for (int lanes = 4; lanes < 32; lanes *= 2) {
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
          }
          rescale[n][i] = 1;
          if (x > reference[n][i] + (kLift + kSlack)) {
            x -= kLift;
            rescale[n][i] = fast_exp2(reference[n][i] - x);
            reference[n][i] = x;
          }
          sum[n][i] *= rescale[n][i];
        }
      }
    }
    return replaces;
  }

  __device__ __forceinline__ void exponentiate(float (&s)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Where there has been nothing to attend to, every exponential is 0.
        const float origin = reference[n][i % 2];
        s[n][i] = fast_exp2(s[n][i] - (origin == -INFINITY ? 0.0f : origin));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) sum[n][i] += s[n][i] + s[n][2 + i];
    }
  }
};

// What a tile's scores become: scaled, capped, less ALiBi's slope times the distance, and -inf
// where the query does not attend to the key.
template <int kTiles>
__device__ __forceinline__ void transform_decode_scores(const FlashDecodeParams& params,
                                                        const DecodeTile& tile, int head_k, int key,
                                                        float (&s)[kTiles][4]) {
  const FlashDecodeProblem& p = params.problem;
  if (p.softcap > 0) {
    const float cap = p.softcap * kLog2e, twice = 2 / p.softcap;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (float& x : s[n]) x = cap - __fdividef(2 * cap, 1 + fast_exp2(twice * x));  // cap tanh
    }
  }
  if (p.alibi_slopes == nullptr) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = min(8 * n + static_cast<int>(threadIdx.x % 4) * 2 + i, tile.rows - 1);
      int query, of_group;
      params.group(query, of_group, tile.first_row + column);
      const int head = head_k * params.group.divisor + of_group;
      const float slope = kLog2e * p.alibi_slopes[tile.batch * p.stride_ab + head * p.stride_ah];
      const int distance = tile.position(query) - key;
      s[n][i] -= slope * fabsf(static_cast<float>(distance));
      s[n][2 + i] -= slope * fabsf(static_cast<float>(distance - 8));
    }
  }
}

template <int kTiles>
__device__ __forceinline__ void mask_decode_scores(const FlashDecodeParams& params,
                                                   const DecodeTile& tile, int key,
                                                   float (&s)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = min(8 * n + static_cast<int>(threadIdx.x % 4) * 2 + i, tile.rows - 1);
      const int query = tile.query(params, column);
      const int first = tile.first_key(query), last = tile.last_key(query);
      if (key < first || key >= last) s[n][i] = -INFINITY;
      if (key + 8 < first || key + 8 >= last) s[n][2 + i] = -INFINITY;
    }
  }
}

// Adds the warps' sums of a tile, and writes its outputs, or the part of them that these are.
template <class Traits, bool kFuses>
__device__ inline void finish_tile(const FlashDecodeParams& params,
                                   ColumnSoftmax<Traits::kTiles>& softmax,
                                   float (&o)[Traits::kHeadDim / 16][Traits::kTiles][4],
                                   typename Traits::Shared& shared) {
  constexpr int kTiles = Traits::kTiles, kHeadDim = Traits::kHeadDim, kColumns = Traits::kColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto& references = shared.references;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = softmax.sum[n][i];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
      const int column = 8 * n + lane % 4 * 2 + i;
      if (lane < 4) references[warp][column] = make_float2(softmax.reference[n][i], sum);
    }
  }
  __syncthreads();
  // Relative to the largest reference of all warps, to this warp's part of the ring.
  float* const sums = Traits::sums_of_warp(shared, warp);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 8 * n + lane % 4 * 2 + i;
      float reference = references[0][column].x;
#pragma unroll
      for (int w = 1; w < Traits::kWarps; ++w) {
        reference = fmaxf(reference, references[w][column].x);
      }
      const float scale =
          reference == -INFINITY ? 1.0f : fast_exp2(softmax.reference[n][i] - reference);
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sums[column * Traits::kSumsPitch + output_element<Traits>(m, half)] =
              o[m][n][2 * half + i] * scale;
        }
      }
    }
  }
  __syncthreads();
  constexpr int kStep = Traits::kThreads / kColumns;  // threads of a column
  constexpr int kCount = kHeadDim / kStep;
  const int column = threadIdx.x / kStep, first = threadIdx.x % kStep;
  const DecodePiece& piece = shared.piece;
  const DecodeTile tile = decode_tile(params, piece.place.index);
  const int blocks = decode_blocks(params, tile, Traits::kBlockKeys).count;
  const bool is_in_cluster = kFuses && params.cluster > 1, is_row = column < tile.rows;
  const int part = is_in_cluster ? 0 : piece.part(blocks);
  if (threadIdx.x == 0 && !is_in_cluster) piece.store_parts(params, blocks);
  float reference = -INFINITY, sum = 0, x[kCount] = {};
  if (is_row) {
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      reference = fmaxf(reference, references[w][column].x);
    }
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      const float2 its = references[w][column];
      sum += reference == -INFINITY ? its.y : its.y * fast_exp2(its.x - reference);
      const float* const from = Traits::sums_of_warp(shared, w) + column * Traits::kSumsPitch;
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] += from[first + i * kStep];
    }
  }
  if (is_in_cluster) {
    __syncthreads();  // all have read what is written now
    const ClusterPart<kHeadDim> mine = cluster_part<Traits>(shared);
    if (is_row) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) mine.x[column * kHeadDim + first + i * kStep] = x[i];
      if (first == 0) mine.sums[column] = make_float2(reference, sum);
    }
    return combine_in_cluster<Traits>(params, tile, piece.place.head_k, mine);
  }
  if (is_row) {
    if (part < 0) {
      store_row<typename Traits::T>(params, tile, piece.place.head_k, column, reference, sum, first,
                                    kStep, x);
    } else {
      float* const to = part_of(params, part);
#pragma unroll
      for (int i = 0; i < kCount; ++i) to[column * kHeadDim + first + i * kStep] = x[i];
      if (first == 0) {
        reinterpret_cast<float2*>(to + kColumns * kHeadDim)[column] = make_float2(reference, sum);
      }
    }
  }
  __syncthreads();  // the ring and the piece are free
}

// The keys of a piece's first tile.
template <class Traits, bool kFuses>
__device__ inline void attend(const FlashDecodeParams& params,
                              ColumnSoftmax<Traits::kTiles>& softmax,
                              float (&o)[Traits::kHeadDim / 16][Traits::kTiles][4],
                              typename Traits::Shared& shared) {
  using Product = typename Traits::Product;
  constexpr int kTiles = Traits::kTiles, kHeadDim = Traits::kHeadDim, kStages = Traits::kStages;
  const FlashDecodeProblem& p = params.problem;
  const DecodePiece& piece = shared.piece;
  const int head_k = piece.place.head_k;
  const DecodeTile tile = decode_tile(params, piece.place.index);
  const DecodeBlocks blocks = decode_blocks(params, tile, Traits::kBlockKeys);
  const int begin = blocks.begin + piece.place.block;
  const int count = min(blocks.count - piece.place.block, piece.end - piece.at);
  int key = begin * Traits::kBlockKeys + threadIdx.x / 32 * Traits::kKeys;
  // The new token, if this piece has it.
  int newest = kFuses && params.appends ? new_token(params, tile.batch) : -1;
  if (newest < begin * Traits::kBlockKeys || newest >= (begin + count) * Traits::kBlockKeys) {
    newest = -1;
  }
  // No key is read that no query attends to, nor one that is only being appended.
  KeyLoader<Traits> loader(params, tile.batch, head_k, tile.first_key_of_all(params),
                           newest < 0 ? tile.last_key_of_all(params) : newest, key, shared);
  int stage = 0;
  if (params.is_settled) {  // the keys that are there before the turn of the kernel has come
    const int old = tile.seqlen_k - tile.seqlen_q - begin * Traits::kBlockKeys;
#pragma unroll 1
    for (; stage < min(kStages - 1, count) && old >= (stage + 1) * Traits::kBlockKeys; ++stage) {
      loader.load(stage);
      copy_async_commit();
    }
    wait_for_predecessor();
  }
#pragma unroll 1
  for (; stage < kStages - 1; ++stage) {
    if (stage < count) loader.load(stage);
    copy_async_commit();
  }
  if (kFuses && newest >= 0) append_token<Traits>(params, tile, head_k, newest, shared);
  load_queries<Traits, kFuses>(params, tile, head_k, shared);
  __syncthreads();
  const KeyReader<Traits> reader(params, shared);
  const bool is_plain = p.softcap == 0 && p.alibi_slopes == nullptr;
  // Keys that all queries attend to.
  const int whole_begin = tile.first_key(tile.last_query(params));
  const int whole_end = tile.last_key(tile.query(params, 0)) - Traits::kKeys;
  stage = 0;
#pragma unroll 1
  for (int left = count; left > 0; --left, key += Traits::kBlockKeys) {
    copy_async_wait<kStages - 2>();
    __syncwarp();  // all lanes' copies have arrived, and the stage before has been read
    if (left > kStages - 1) loader.load(stage == 0 ? kStages - 1 : stage - 1);
    copy_async_commit();
    if (kFuses && newest >= key && newest < key + Traits::kKeys) {
      join_newest<Traits>(shared, stage, newest - key);
    }

    float s[kTiles][4], rescale[kTiles][2], value_scale[2], more[2];
    reader.scores(stage, s);
    reader.value_scales(stage, value_scale, more);
    if (!is_plain || key < whole_begin || key > whole_end) {
      // Worked out anew, sooner than take registers from the loop.
      const DecodeTile its = decode_tile(params, piece.place.index);
      const int first = key + not_hoisted(threadIdx.x) % 32 / 4;
      if (!is_plain) transform_decode_scores(params, its, piece.place.head_k, first, s);
      mask_decode_scores(params, its, first, s);
    }
    if (softmax.refer(s, more, rescale)) {
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) o[m][n][i] *= rescale[n][i % 2];
        }
      }
    }
    softmax.exponentiate(s);
    uint32_t exponentials[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const x = s[n] + 2 * half;
        if (Traits::kInt8) {  // a scale may be NaN where a query does not attend to the key
#pragma unroll
          for (int i = 0; i < 2; ++i) x[i] = x[i] == 0 ? 0 : x[i] * value_scale[half];
        }
        exponentials[n][half] = transpose_matrix(pack(x[0], x[1], Product{}));
      }
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 32; ++d) {
      uint32_t v[2][4];
      reader.values(stage, d, v);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        mma<Product>(v[0], exponentials[n][0], exponentials[n][1], o[2 * d][n]);
        mma<Product>(v[1], exponentials[n][0], exponentials[n][1], o[2 * d + 1][n]);
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();
}

// kFuses: it may append a new token, and its blocks may be in clusters. Where there are several
// sequences, the kernel is spared that code: it took 5 % of a step with 16 of them.
template <class Traits, bool kFuses>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    flash_decode_kernel(const __grid_constant__ FlashDecodeParams params) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  if (!params.is_settled) wait_for_predecessor();  // otherwise before the first query is read
  let_successor_start();
  DecodePiece mine;
  if (kFuses && params.cluster > 1) {
    mine.set_share(params, Traits::kBlockKeys);
  } else if (!mine.set(params, Traits::kBlockKeys)) {
    return;
  }
  // All registers are taken while keys are attended to.
  DecodePiece& piece = shared.piece;
  if (threadIdx.x == 0) piece = mine;
  __syncthreads();
  do {
    ColumnSoftmax<Traits::kTiles> softmax;
    softmax.clear();
    float o[Traits::kHeadDim / 16][Traits::kTiles][4] = {};
    attend<Traits, kFuses>(params, softmax, o, shared);
    finish_tile<Traits, kFuses>(params, softmax, o, shared);
    if (kFuses && params.cluster > 1) return;
    if (threadIdx.x == 0) piece.move(params, Traits::kBlockKeys);
    __syncthreads();
  } while (piece.at < piece.end);
}

template <class Traits>
struct FlashDecode {
  static constexpr auto kKernel = &flash_decode_kernel<Traits, false>;
  static constexpr auto kFusedKernel = &flash_decode_kernel<Traits, true>;
  static constexpr int kSharedBytes = sizeof(typename Traits::Shared);
  static inline std::array<int, kMaxDevices> blocks_of_device{};
  static inline std::array<std::array<int, kMaxDecodeCluster + 1>, kMaxDevices>
      clusters_of_device{};

  static int load(const DeviceProps& props) {
    const int arch = std::min(load_kernel(reinterpret_cast<const void*>(kKernel)),
                              load_kernel(reinterpret_cast<const void*>(kFusedKernel)));
    if (kSharedBytes <= props.shared_memory_per_block) {
      blocks_of_device[props.index] = std::min(blocks_per_sm(kKernel), blocks_per_sm(kFusedKernel));
      if (arch >= kDependentLaunchArch) count_clusters(clusters_of_device[props.index]);
    }
    return arch;
  }
  static int blocks_on(int device) { return blocks_of_device[device]; }
  static int clusters_on(int device, int size) { return clusters_of_device[device][size]; }

  static void launch(const FlashDecodeParams& params, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    const bool has_clusters = params.cluster > 1;
    config.gridDim = static_cast<unsigned>(
        has_clusters ? params.cluster * params.tiles.divisor * params.problem.num_heads_k
                     : int64_t{params.waves} * params.at_a_time.divisor);
    config.blockDim = Traits::kThreads;
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = stream;
    cudaLaunchAttribute attributes[2] = {dependent_launch(), clusters_of(params.cluster)};
    config.attrs = attributes;
    config.numAttrs = !params.launches_dependent ? 0 : has_clusters ? 2 : 1;
    check(cudaLaunchKernelEx(&config, has_clusters || params.appends ? kFusedKernel : kKernel,
                             params),
          "launching a decoding kernel");
  }

  static bool register_kernel() {
    constexpr DType dtype =
        std::is_same_v<typename Traits::T, __half> ? DType::kFloat16 : DType::kBFloat16;
    return register_flash_decode_kernel(
        {dtype, Traits::kInt8 ? DType::kInt8 : dtype, Traits::kHeadDim, Traits::kColumns,
         Traits::kStages, Traits::kBlockKeys, &blocks_on, &clusters_on, &launch, &load});
  }

 private:
  static cudaLaunchAttribute clusters_of(int size) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    return attribute;
  }
  // A cluster lies within one of the groups that a device's multiprocessors come in, whose sizes
  // differ from device to device.
  static void count_clusters(std::array<int, kMaxDecodeCluster + 1>& most) {
    for (int size = 2; size <= kMaxDecodeCluster; ++size) {
      cudaLaunchAttribute attribute = clusters_of(size);
      cudaLaunchConfig_t config{};
      config.gridDim = static_cast<unsigned>(size);
      config.blockDim = Traits::kThreads;
      config.dynamicSmemBytes = kSharedBytes;
      config.attrs = &attribute;
      config.numAttrs = 1;
      check(cudaOccupancyMaxActiveClusters(&most[size], kFusedKernel, &config),
            "loading a decoding kernel");
    }
  }
  static int blocks_per_sm(void (*kernel)(FlashDecodeParams)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
          "loading a decoding kernel");
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, Traits::kThreads,
                                                        kSharedBytes),
          "loading a decoding kernel");
    return blocks;
  }
};

}  // namespace fastq::cuda
